"""`mifo probe bugs`: what it runs, what it makes of the runs, and its runs themselves on the tiny model."""

import csv
import json
import math
from dataclasses import replace

import pytest

from mifo.cli import main
from mifo.config.load import load_config
from mifo.errors import ConfigError
from mifo.lab import bug_run
from mifo.lab.arena_toml import config_toml
from mifo.lab.bugs import BOTH, FIRST, LOST, MEANS, RANKS, RIGHT, BugRun, BugSettings, bugs, compare_bugs, variants
from mifo.lab.claims import figure
from mifo.lab.training_plan import Workplace, base_config, sft_config
from mifo.lab.trials import Trials, read_trial


def made(variant, seed, *, correct, loss=1.0, norm=1.0, wobble=0.1):
    """A run of twenty problems with losses that go up and down."""
    losses = tuple(loss + (wobble if i % 2 else -wobble) * (1 + 0.01 * seed) for i in range(8))
    spread = {LOST: (0, 1, -1, 0), BOTH: (1, 0, 0, -1)}.get(variant, (0, 0, 0, 0))[seed]  # no two seeds lose alike
    verdicts = {f"p{i}": float(i < correct + spread) for i in range(20)}
    norms = (norm * (1 + 0.01 * seed),) * 8
    return BugRun(variant=variant, seed=seed, losses=losses, norms=norms, held_out_loss=loss, by_problem=verdicts)


def as_in_the_paper():
    runs = []
    for seed in range(4):
        runs += [made(RIGHT, seed, correct=18), made(RANKS, seed, correct=17), made(FIRST, seed, correct=6)]
        runs += [
            made(MEANS, seed, correct=17, loss=1.0 + 0.001 * seed, wobble=0.2 + 0.01 * seed, norm=1.01 + 0.001 * seed)
        ]
        runs += [made(LOST, seed, correct=8, loss=1.5 + 0.01 * seed, norm=0.4, wobble=0.15 + 0.003 * seed)]
        runs += [made(BOTH, seed, correct=2, loss=1.5, norm=0.4, wobble=0.2)]
    return runs


def test_the_papers_order_of_effects_is_found_where_it_is():
    found = compare_bugs(BugSettings(seeds=4), as_in_the_paper())
    verdicts = {one.text: one.verdict for one in found.claims}
    assert verdicts.pop("a mean of means costs accuracy") == "cannot be told"  # one problem of twenty
    unsaid = verdicts.pop("dropped micro-batches suppress the gradient norm")
    assert unsaid == "cannot be told"  # the ratio is the same at every seed: no interval
    assert set(verdicts.values()) == {"reproduces"}
    rows = {row.variant: row for row in found.table}
    assert rows[LOST].accuracy.value == 0.4
    assert rows[LOST].accuracy_difference.value == pytest.approx(-0.5)
    assert rows[LOST].loss_difference.value == pytest.approx(0.515)
    assert rows[RIGHT].accuracy_difference is None
    assert rows[MEANS].variability_ratio.value == pytest.approx(2.17, abs=0.01)


def test_an_update_that_was_not_taken_is_not_in_the_mean_of_norms():
    run = replace(made(RIGHT, 0, correct=18), norms=(1.0, float("nan"), 3.0))
    assert run.norm == 2.0
    assert not replace(run, norms=(float("inf"),)).norm > 0.0


def test_the_opposite_is_found_where_it_is():
    swap = {RIGHT: LOST, LOST: RIGHT, MEANS: BOTH, BOTH: MEANS}
    runs = [replace(run, variant=swap.get(run.variant, run.variant)) for run in as_in_the_paper()]
    verdicts = {one.text: one.verdict for one in compare_bugs(BugSettings(seeds=4), runs).claims}
    assert verdicts["dropped micro-batches cost accuracy"] == "does not"
    assert verdicts["dropped micro-batches cost more than a mean of means"] == "does not"
    assert verdicts["dropped micro-batches raise the loss"] == "does not"


def test_one_seed_cannot_tell_of_losses_and_norms():
    runs = [run for run in as_in_the_paper() if run.seed == 0]
    found = compare_bugs(BugSettings(seeds=1), runs)
    verdicts = {one.text: one.verdict for one in found.claims}
    assert found.notes == ("One seed says nothing of another: losses and norms have no intervals.",)
    assert verdicts["dropped micro-batches raise the loss"] == "cannot be told"
    assert verdicts["a mean of means leaves the gradient norm as it is"] == "cannot be told"


def test_ratios_are_said_as_factors_and_runs_that_solve_nothing_are_said():
    found = compare_bugs(BugSettings(seeds=4), as_in_the_paper())
    suppressed = next(one for one in found.claims if "suppress" in one.text)
    assert figure(suppressed) == "0.4 [0.4, 0.4]"
    assert found.notes == ()
    hopeless = [replace(run, by_problem=dict.fromkeys(run.by_problem, 0.0)) for run in as_in_the_paper()]
    assert "give more --steps" in compare_bugs(BugSettings(seeds=4), hopeless).notes[0]


def test_figures_of_a_run():
    run = BugRun(
        variant=RIGHT, seed=0, losses=(9.0, 5.0, 3.0, 5.0), norms=(1.0, 3.0, 1.0, 3.0), held_out_loss=None,
        by_problem={"a": 1.0, "b": 0.0},
    )  # fmt: skip
    assert (run.loss, run.norm, run.accuracy) == (5.0, 2.0, 0.5)
    assert run.variability == pytest.approx(math.log(5 / 3) / 2**0.5)  # steps ∓ log(5/3) behind the first quarter
    assert replace(run, losses=tuple(7 * loss for loss in run.losses)).variability == pytest.approx(run.variability)


def test_every_variant_and_seed_is_a_run_on_the_same_data(tmp_path, monkeypatch):
    asked = []

    def note(trials, folder, **options):
        asked.extend(trials)
        return Trials(results={}, failures=(), stopped=False)

    monkeypatch.setattr("mifo.lab.bugs.run_trials", note)
    _, config = load_config("tiny")
    assert bugs(config, Workplace(folder=tmp_path), BugSettings(seeds=2, steps=3)) is None
    assert len(asked) == 2 * len(variants(BugSettings()))
    lost = next(trial for trial in asked if trial.name == "first-and-last-kept-seed1")
    assert lost.command == (
        "mifo.lab.bug_run", "--dropped", "first_last", "--ranks", "2", "--micro-batches", "8",
    )  # fmt: skip
    right = next(trial for trial in asked if trial.name == "correct-seed1")
    assert right.command == ("mifo.lab.bug_run", "--ranks", "2", "--micro-batches", "8")
    assert right.config == lost.config  # the reduction and nothing else
    assert (right.config.method.name, right.config.method.batch_size, right.config.train.steps) == ("sft", 16, 3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (BugSettings(micro_batches=2), "--micro-batches 2: with fewer than 3"),
        (BugSettings(batch_size=20), "--batch-size 20 does not come out even in 2 ranks of 8"),
        (BugSettings(seeds=0), "--seeds 0: at least 1"),
    ],
)
def test_settings_with_which_nothing_would_show_are_refused(settings, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        bugs(load_config("tiny")[1], Workplace(folder=tmp_path), settings)


def test_a_recipe_that_means_over_sequences_is_refused(tmp_path):
    _, config = load_config("tiny", ["--method.sft.normalizer", "sequence"])
    with pytest.raises(ConfigError, match=r"method\.sft\.normalizer = 'sequence'"):
        bugs(config, Workplace(folder=tmp_path))


def child(folder, *flags, steps=2):
    """One run of the lab's trainer in this process."""
    _, config = load_config("tiny")
    config = sft_config(base_config(config), steps=steps, batch_size=8, seed=0)
    config = replace(config, run=replace(config.run, folder=str(folder.parent), name=folder.name, export=False))
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".toml")
    file.write_text(config_toml(config, "a test"))
    resume = ["--resume"] if (folder / "config.json").is_file() else []
    return bug_run.main([*flags, "--ranks", "1", "--micro-batches", "4", str(file), *resume])


def test_runs_differ_by_the_reduction_alone(tmp_path, capsys):
    assert child(tmp_path / "right") == child(tmp_path / "lost", "--dropped", "first_last") == 0
    right, lost = read_trial(tmp_path / "right"), read_trial(tmp_path / "lost")
    first, other = right.updates[0], lost.updates[0]
    assert first["loss"] == pytest.approx(other["loss"], rel=1e-5)  # the same batch, and the loss does not show the bug
    assert other["grad_norm"] < 0.9 * first["grad_norm"]
    assert right.updates[1]["loss"] != pytest.approx(lost.updates[1]["loss"], rel=1e-5)
    assert right.summary["data"] == lost.summary["data"]
    assert json.loads((tmp_path / "lost" / "held_out.json").read_text())["loss"] > 0
    assert child(tmp_path / "few", "--means", "rank", "--micro-batches", "3", steps=1) == 0


def test_a_child_says_what_is_wrong(tmp_path, capsys):
    assert (
        child(tmp_path / "run", "--ranks", "3", "--dropped", "first", steps=1) == 0
    )  # the later flag counts: one rank
    file = tmp_path / "wrong.toml"
    file.write_text("[train]\nsteps = 0\n")
    assert bug_run.main([str(file)]) == 2
    assert "mifo: " in capsys.readouterr().err


def test_the_command_writes_tables_and_a_figure(tmp_path, monkeypatch, capsys):
    found = compare_bugs(BugSettings(seeds=4), as_in_the_paper())
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("mifo.training_probe_commands.bugs", lambda *arguments: found)
    assert main(["probe", "bugs", "--recipe", "tiny", "--seeds", "4", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "bugs.json").read_text())
    assert len(record["runs"]) == 24
    assert record["claims"][0]["verdict"] == "reproduces"
    with (tmp_path / "bugs.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 24
    said = capsys.readouterr().out
    assert "reproduces" in said
    assert "first only" in said
    assert main(["probe", "bugs", "--steps", "0"]) == 2
