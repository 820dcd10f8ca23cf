"""`mifo probe sparsify --online`: its runs, and what it makes of them."""

import json
from dataclasses import replace

import pytest

from mifo.cli import main
from mifo.config.load import load_config
from mifo.errors import ConfigError
from mifo.lab.sparsify_online import OnlineRun, OnlineSettings, compare_online, extra_cost, sparsify_online
from mifo.lab.training_plan import Workplace
from mifo.lab.trials import Evaluation, Trials

PROBLEMS = 40


def made(kind, rate, seed, correct, mixed=0.5):
    def point(step, right):
        verdicts = {f"p{i}": float(i < right) for i in range(PROBLEMS)}
        return Evaluation(label="", step=step, flops=0.0, by_problem=verdicts)

    correct += (seed - 1) * (kind == "rl") * (2 if rate else 1)  # no two seeds alike
    points = (point(0, 2), point(3, (2 + correct) // 2), point(6, correct))
    return OnlineRun(kind=kind, rate=rate, seed=seed, points=points, mixed_groups=mixed if kind == "rl" else None)


def as_in_the_paper(**changes):
    correct = {("sft", 0.0): 30, ("sft", 0.5): 30, ("rl", 0.0): 30, ("rl", 0.5): 10}
    return [made(kind, rate, seed, right, **changes) for (kind, rate), right in correct.items() for seed in range(3)]


def test_rl_that_suffers_more_is_found():
    found = compare_online(OnlineSettings(), as_in_the_paper())
    told = {one.text: one for one in found.claims}
    more = told["RL suffers more than SFT without 50 % of each gradient"]
    assert (more.verdict, more.measured.value) == ("reproduces", pytest.approx(0.5))
    assert told["RL suffers without 50 % of each gradient"].verdict == "reproduces"
    # no problem tells the two apart, but forty could hide a few points
    assert told["SFT hardly suffers without 50 % of each gradient"].verdict == "cannot be told"
    rows = {(row.kind, row.rate): row for row in found.table}
    assert [step for step, _ in rows["rl", 0.5].curve] == [0, 3, 6]
    assert rows["rl", 0.5].accuracy.value == 0.25
    assert rows["rl", 0.5].cost.value == pytest.approx(0.5)
    assert rows["rl", 0.0].cost is None
    assert len(found.rows()) == 12 * 3


def test_the_opposite_is_found():
    swap = {"sft": "rl", "rl": "sft"}
    runs = [replace(run, kind=swap[run.kind], mixed_groups=0.5) for run in as_in_the_paper()]
    told = {one.text: one.verdict for one in compare_online(OnlineSettings(), runs).claims}
    assert told["RL suffers more than SFT without 50 % of each gradient"] == "does not"
    assert told["SFT hardly suffers without 50 % of each gradient"] == "does not"


def test_rl_without_a_signal_tells_nothing():
    found = compare_online(OnlineSettings(), as_in_the_paper(mixed=0.0))
    told = {one.text: one.verdict for one in found.claims}
    assert told["RL suffers more than SFT without 50 % of each gradient"] == "cannot be told"
    assert "no signal" in found.notes[0]


def test_the_difference_of_differences_is_by_hand():
    def one(score):
        return {0: {"a": score, "b": 0.0}, 1: {"a": score, "b": 1.0}}

    final = {("rl", 0.0): one(1.0), ("rl", 0.5): one(0.0), ("sft", 0.0): one(1.0), ("sft", 0.5): one(0.5)}
    assert extra_cost(final, 0.5).value == pytest.approx((1.0 + 0.0) / 2 - (0.5 + 0.0) / 2)
    assert extra_cost({key: value for key, value in final.items() if key != ("sft", 0.5)}, 0.5) is None


def test_every_rate_is_trained_both_ways_from_one_start(monkeypatch, tmp_path):
    asked = []

    def note(trials, folder, **options):
        asked.extend(trials)
        return Trials(results={}, failures=(), stopped=False)

    monkeypatch.setattr("mifo.lab.sparsify_online.run_trials", note)
    settings = OnlineSettings(rates=(0.9, 0.5), seeds=2, steps=10, warmup=3)
    assert sparsify_online(load_config("tiny")[1], Workplace(folder=tmp_path), settings) is None
    trials = {trial.name: trial for trial in asked}
    assert len(trials) == 2 * 3 * 2
    rl, sft = trials["rl-drop0.5-seed1"], trials["sft-drop0-seed1"]
    assert (rl.config.train.gradient_drop, sft.config.train.gradient_drop) == (0.5, 0.0)
    assert (rl.config.method.name, sft.config.method.name) == ("grpo", "sft")
    assert rl.after == sft.after
    assert (rl.after.name, rl.after.config.train.gradient_drop) == ("warmup-seed1", 0.0)
    assert (rl.config.evaluation.every_steps, rl.config.train.steps) == (2, 10)


def test_the_command_writes_tables_and_a_figure(tmp_path, monkeypatch, capsys):
    found, asked = compare_online(OnlineSettings(), as_in_the_paper()), []
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(
        "mifo.training_probe_commands.sparsify_online", lambda config, place, settings: asked.append(settings) or found
    )
    flags = ["--online", "--recipe", "tiny", "--rates", "0.5", "0.9", "--steps", "4"]
    assert main(["probe", "sparsify", *flags, "--out", str(tmp_path)]) == 0
    assert (asked[0].rates, asked[0].steps, asked[0].seeds) == ((0.5, 0.9), 4, 3)
    assert len(json.loads((tmp_path / "sparsify-online.json").read_text())["runs"]) == 12
    assert "reproduces" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["START", "MODEL", "--online"], "START and MODEL have no effect with --online"),
        (["--online", "--masks", "5"], "--masks has no effect with --online"),
        (["--online", "--steps", "0"], "--steps 0: at least 1"),
        (["START"], "needs START and at least one MODEL"),
        (["START", "MODEL", "--seeds", "2"], "--seeds has no effect without --online"),
        (["START", "MODEL", "--warmup", "2"], "--warmup has no effect without --online"),
    ],
)
def test_flags_without_effect_are_refused(arguments, said, capsys):
    assert main(["probe", "sparsify", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_rates_that_are_no_shares_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="give shares between 0 and 1"):
        sparsify_online(load_config("tiny")[1], Workplace(folder=tmp_path), OnlineSettings(rates=(1.0,)))
