"""`mifo probe forgetting`: its runs, its claims, and the frozen run against its own definition."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mifo.cli import main
from mifo.config.check import check_config
from mifo.config.load import load_config
from mifo.errors import ConfigError
from mifo.lab import frozen_run
from mifo.lab.arena_toml import config_toml
from mifo.lab.forgetting import (
    CE,
    MIFO,
    OTHER_ORDER,
    RL,
    ForgettingRun,
    ForgettingSettings,
    RlRun,
    compare_forgetting,
    forgetting,
)
from mifo.lab.training_plan import Workplace, base_config, mixed_config, sft_config
from mifo.lab.trials import Trials
from mifo.train.manifest import MANIFEST
from mifo.train.model import tiny_model

SETTINGS = ForgettingSettings(objectives=(RL, CE, MIFO), seeds=3)


def verdicts(correct):
    return {f"p{i}": float(i < correct) for i in range(20)}


def made(objective, seed, before, after):
    """One problem more or less with each seed, and with each objective another way round."""
    spread = (seed - 1) * (-1 if objective == CE else 1)
    return ForgettingRun(objective=objective, seed=seed, before=verdicts(before), after=verdicts(after + spread))


def as_in_the_paper():
    runs = [made(RL, seed, 10, 16) for seed in range(3)] + [made(CE, seed, 10, 2) for seed in range(3)]
    return runs + [made(MIFO, seed, 10, 15) for seed in range(3)]


def rl(seed, *, rewarded=0.4, mixed=0.5):
    return RlRun(seed=seed, before=0.2, after=0.5, rewarded=rewarded, mixed_groups=mixed)


def test_the_papers_table_is_found_where_it_is():
    found = compare_forgetting(SETTINGS, [rl(s) for s in range(3)], as_in_the_paper())
    assert {one.verdict for one in found.claims} == {"reproduces"}
    assert len(found.claims) == 4
    rows = {row.objective: row for row in found.table}
    assert rows[CE].change.value == pytest.approx(-0.4)
    assert rows[MIFO].against_ce.value == pytest.approx(0.65)
    assert rows[CE].against_ce is None
    assert found.notes == ()


def test_the_opposite_is_found_where_it_is():
    runs = [replace(run, before=run.after, after=run.before) for run in as_in_the_paper()]
    found = compare_forgetting(SETTINGS, [rl(s) for s in range(3)], runs)
    told = {one.text: one.verdict for one in found.claims}
    assert told.pop("MIFO's SFT loses less than cross-entropy") == "cannot be told"  # both end at ten of twenty
    assert set(told.values()) == {"does not"}


def test_mixed_methods_are_judged_by_their_rows_of_the_table():
    """LUFFY forgets as in the paper, ReLIFT does not, and SRFT was not run."""
    runs = [made("luffy", seed, 10, 4) for seed in range(3)] + [made("relift", seed, 10, 15) for seed in range(3)]
    settings = replace(SETTINGS, objectives=("luffy", "relift"))
    told = {one.text: one for one in compare_forgetting(settings, [rl(s) for s in range(3)], runs).claims}
    assert {text: one.verdict for text, one in told.items()} == {
        "luffy after RL loses accuracy": "reproduces",
        "relift after RL loses accuracy": "does not",
    }
    assert told["luffy after RL loses accuracy"].paper == "Table 2: −12.6"


def test_without_a_signal_nothing_can_be_told():
    found = compare_forgetting(SETTINGS, [rl(s, rewarded=0.0, mixed=0.0) for s in range(3)], as_in_the_paper())
    assert {one.verdict for one in found.claims} == {"cannot be told"}
    assert "no rollout had a reward" in found.notes[0]
    assert "--warmup" in found.notes[0]
    equal = compare_forgetting(SETTINGS, [rl(0), rl(1, rewarded=1.0, mixed=0.0)], as_in_the_paper())
    assert "seed 1: the rewards of every group were equal" in equal.notes[0]


def plan(monkeypatch, tmp_path, settings, recipe="tiny"):
    """The trials of a call that makes none."""
    asked = []

    def note(trials, folder, **options):
        asked.extend(trials)
        return Trials(results={}, failures=(), stopped=False)

    monkeypatch.setattr("mifo.lab.forgetting.run_trials", note)
    assert forgetting(load_config(recipe)[1], Workplace(folder=tmp_path), settings) is None
    return {trial.name: trial for trial in asked}


def test_every_objective_begins_with_the_same_export(monkeypatch, tmp_path):
    trials = plan(monkeypatch, tmp_path, ForgettingSettings(seeds=2, rl_steps=5, steps=3, warmup=7))
    assert len(trials) == 18
    for name, trial in trials.items():
        assert trial.after.name == f"rl-first-seed{name[-1]}"
        assert trial.config.train.steps == 3
        assert trial.config.train.seed == OTHER_ORDER + int(name[-1])
    first = trials["ce-seed1"].after
    assert (first.config.method.name, first.config.train.steps, first.config.train.seed) == ("grpo", 5, 1)
    assert (first.after.name, first.after.config.train.steps, first.after.keep_export) == ("warmup-seed1", 7, True)
    methods = {name[:-6]: trial.config.method for name, trial in trials.items() if name.endswith("0")}
    assert methods["rl"].name == "grpo"
    assert methods["dft"].sft.loss == "dft"
    assert (methods["es"].token_fraction, methods["pf"].token_fraction) == (0.7, 1.0)  # the recipe's ρ
    assert trials["mifo-seed0"].command == ("mifo.lab.frozen_run", "--top", "0.5")
    assert trials["es-seed0"].command == ("mifo.cli", "train")


def test_a_recipe_is_an_objective_too(monkeypatch, tmp_path):
    settings = ForgettingSettings(objectives=("luffy-smollm2", CE), seeds=1, start="/some/model")
    trials = plan(monkeypatch, tmp_path, settings, "smollm2-arithmetic")
    luffy = trials["luffy-smollm2-seed0"].config
    assert luffy.method.name == "luffy"
    assert luffy.data == trials["ce-seed0"].config.data
    assert luffy.train.minutes is None
    assert trials["ce-seed0"].after.config.model.path == "/some/model"
    assert trials["ce-seed0"].after.after is None


def test_mixed_methods_take_the_recipe_s_own_settings(monkeypatch, tmp_path):
    settings = ForgettingSettings(objectives=("luffy", "srft", "relift", "psft"), seeds=1, batch_size=8)
    trials = plan(monkeypatch, tmp_path, settings)
    own = load_config("tiny")[1].method
    methods = {name.removesuffix("-seed0"): trial.config.method for name, trial in trials.items()}
    assert methods["luffy"].rl == methods["relift"].rl == own.rl
    assert (methods["srft"].prompts_per_step, methods["srft"].rollouts_per_prompt) == (
        own.rl.prompts_per_step,
        own.rl.rollouts_per_prompt,
    )
    assert (methods["relift"].buffer_size, methods["relift"].sft) == (8, own.sft)
    assert (methods["psft"].sft.loss, methods["psft"].sft.updates_per_batch) == ("psft", 2)
    for trial in trials.values():
        check_config(trial.config)


@pytest.mark.parametrize("name", ["srft", "relift"])
def test_mixed_methods_imitate_with_the_recipe_s_loss(name):
    config = load_config("tiny")[1]
    config = replace(config, method=replace(config.method, sft=replace(config.method.sft, loss="dft")))
    assert mixed_config(config, name, steps=2, batch_size=8, seed=0).method.sft == config.method.sft


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (ForgettingSettings(objectives=("cee",)), "--objectives cee: unknown. There are rl, ce, dft"),
        (ForgettingSettings(rl_steps=0), "--rl-steps 0: at least 1"),
    ],
)
def test_mistakes_are_said(settings, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        forgetting(load_config("tiny")[1], Workplace(folder=tmp_path), settings)


# --- the frozen run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rl_export(tmp_path_factory):
    """The folder of a run on `tiny` with seed 3, whose export moved more in some elements than in others."""
    folder = tmp_path_factory.mktemp("runs") / "rl"
    _, config = load_config("tiny", ["--train.seed", "3"])
    (folder / "export").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(frozen_run_encode(config)))
    model = tiny_model(3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder / "export")
    from mifo.data.chartok import char_tokenizer

    char_tokenizer().save_pretrained(folder / "export")
    return folder


def frozen_run_encode(config):
    from mifo.config.decode import encode

    return encode(config)


def child(folder, export, *, top="0.25", steps=3, resume=False):
    _, config = load_config("tiny")
    config = sft_config(base_config(config), steps=steps, batch_size=4, seed=0)
    config = replace(config, model=replace(config.model, path=str(export)))
    config = replace(
        config, run=replace(config.run, folder=str(folder.parent), name=folder.name), data=replace(config.data, evaluation="none")
    )  # fmt: skip
    file = folder.with_suffix(".toml")
    file.write_text(config_toml(config, "a test"))
    return frozen_run.main(["--top", top, str(file), *(["--resume"] if resume else [])])


def test_what_rl_moved_most_keeps_its_bits_and_the_rest_moves(rl_export, tmp_path):
    assert child(tmp_path / "run", rl_export / "export") == 0
    start = dict(tiny_model(3).named_parameters())
    before = load_file(rl_export / "export" / "model.safetensors")
    after = load_file(tmp_path / "run" / "export" / "model.safetensors")
    names = [name for name in start if name in before]
    change = torch.cat([(before[n] - start[n].detach()).abs().flatten() for n in names])
    frozen = change >= change.sort(descending=True).values[int(0.25 * len(change)) - 1]  # the slow way to a top quarter
    same = torch.cat([(before[n] == after[n]).flatten() for n in names])
    assert bool(same[frozen].all())
    assert float(same[~frozen].float().mean()) < 0.5
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert next(e for e in events if e["event"] == "frozen")["frozen_fraction"] == pytest.approx(0.25, abs=1e-4)

    # resumed half-way it ends in the same bits: the mask is not made anew from weights that have moved
    assert child(tmp_path / "half", rl_export / "export", steps=1) == 0
    assert child(tmp_path / "half", rl_export / "export", steps=3, resume=True) == 0
    resumed = load_file(tmp_path / "half" / "export" / "model.safetensors")
    assert all(torch.equal(after[name], resumed[name]) for name in after)


def test_a_model_that_no_run_exported_is_refused(tmp_path, rl_export, capsys):
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in (rl_export / "export").iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    assert child(tmp_path / "run", plain) == 2
    assert "is no export of a run" in capsys.readouterr().err
    assert child(tmp_path / "other", rl_export / "export", top="1.5") == 2


def test_a_checkpoint_is_no_start(tmp_path, capsys):
    place = tmp_path / "run" / "checkpoints" / "step-000001"
    place.mkdir(parents=True)
    (place / MANIFEST).write_text("{}")
    assert main(["probe", "forgetting", "--recipe", "tiny", "--start", str(place), "--out", str(tmp_path / "out")]) == 2
    assert "is a checkpoint of a run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_writes_tables_and_a_figure(tmp_path, monkeypatch, capsys):
    found = compare_forgetting(SETTINGS, [rl(s, mixed=0.0, rewarded=0.0) for s in range(3)], as_in_the_paper())
    asked = []
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(
        "mifo.training_probe_commands.forgetting", lambda config, place, settings: asked.append(settings) or found
    )
    export = tmp_path / "run" / "export"
    export.mkdir(parents=True)
    flags = ["--recipe", "tiny", "--start", str(tmp_path / "run"), "--objectives", "ce", "mifo", "--warmup", "2"]
    assert main(["probe", "forgetting", *flags, "--out", str(tmp_path)]) == 0
    (settings,) = asked
    assert (settings.objectives, settings.start, settings.warmup) == (("ce", "mifo"), str(export), 2)
    assert (settings.rl_steps, settings.steps) == (50, 10)
    assert len(json.loads((tmp_path / "forgetting.json").read_text())["runs"]) == 9
    assert Path(tmp_path / "forgetting.csv").is_file()
    said = capsys.readouterr().out
    assert "no rollout had a reward" in said
    assert "cannot be told" in said
