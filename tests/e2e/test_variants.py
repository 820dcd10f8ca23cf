"""Short runs of MIFO with other losses and other RL: they run, learn from what they should, and resume in the same bits."""

import itertools
import json

import pytest
from conftest_e2e import SMALL, journal, run_small
from test_resume import STRIDE, Calls, assert_same, plain_events

from mifo.config.check import check_config
from mifo.config.decode import decode
from mifo.config.schema import Config

DAPO = {
    "advantage_std": True,
    "clip_high": 0.28,
    "overlong_tokens": 4,
    "dynamic_sampling": True,
    "dynamic_prompts": 3,
    "dynamic_rounds": 3,
}
GRPO = {"advantage_std": True, "normalizer": "sequence"}
RL = {
    "dr_grpo": {"normalizer": "constant"},
    "dapo": DAPO,
    "gspo": {**GRPO, "ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"advantage_std": True, "clip": "weight", "clip_low": None},
    "rloo": {"advantage": "rloo"},
    "reinforce": {"advantage": "reinforce"},
    "reinforce_baseline": {"advantage": "reinforce_baseline"},
}


def config_of(method, **tables):
    plain = {**SMALL, **tables, "method": method}
    plain["run"] = {"checkpoint_steps": "none", "export": False}
    config = decode(Config, json.loads(json.dumps(plain).replace("null", '"none"')))
    check_config(config)
    return config


def mifo(sft, rl):
    base = SMALL["method"]["rl"]
    method = {**SMALL["method"], "sft": sft, "rl": {**base, **rl}}
    return config_of(method, train={**SMALL["train"], "steps": 4})


COMBINATIONS = {
    "SFT+GRPO": ({}, GRPO),
    "DFT+GRPO": ({"loss": "dft"}, GRPO),
    "SFT+DAPO": ({}, DAPO),
    "DFT+DAPO": ({"loss": "dft"}, DAPO),
    "PSFT+GSPO": ({"loss": "psft", "updates_per_batch": 2}, RL["gspo"]),
    "ASFT+RLOO": ({"loss": "asft"}, RL["rloo"]),
    "GEM+CISPO": ({"loss": "gem"}, RL["cispo"]),
    "EAFT+REINFORCE": ({"loss": "eaft"}, RL["reinforce"]),
    "PHI+DRGRPO": ({"loss": "chord_phi"}, RL["dr_grpo"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    return {name: run_small(mifo(*pair), folder / name) for name, pair in COMBINATIONS.items()}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_mifo_takes_any_sft_loss_and_any_rl(runs, name):
    run = runs[name]
    metrics = journal(run.parts.folder, "metrics")
    phases = [record["phase"] for record in metrics]
    assert {"rl", "sft"} <= set(phases)
    assert run.steps == 4
    assert run.ledger.intervals >= 1
    updates = [update for record in metrics for update in record["updates"]]
    assert all(update["taken"] for update in updates)
    sft = [record for record in metrics if record["phase"] == "sft"]
    assert all(u["grad_norm"] > 0 for record in sft for u in record["updates"])
    if name.startswith("PSFT"):
        assert len(sft[0]["updates"]) == 2


def test_the_combinations_are_different_runs(runs):
    figures = {
        name: json.dumps([r["updates"] for r in journal(run.parts.folder, "metrics")]) for name, run in runs.items()
    }
    assert len(set(figures.values())) == len(COMBINATIONS)


def test_dynamic_sampling_shows_in_the_metrics(runs):
    """Rounds of three prompts until four groups are mixed or three rounds are over; only mixed groups are trained."""
    rl = [r for r in journal(runs["SFT+DAPO"].parts.folder, "metrics") if r["phase"] == "rl"]
    assert {r["prompts"] for r in rl} <= {3, 6, 9}
    assert max(r["prompts"] for r in rl) > 3
    for record in rl:
        mixed = round(record["prompts"] * (1 - record["all_equal_groups"]))
        assert sum(u["sequences"] for u in record["updates"]) == 4 * min(4, mixed)
        assert record["prompts"] == 9 or mixed >= 4


STOPPED = ({"loss": "psft", "updates_per_batch": 2}, DAPO)


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """An uninterrupted run and the places at which it could be stopped: (folder, run, names of calls)."""
    calls, folder = Calls(), tmp_path_factory.mktemp("counted") / "run"
    return folder, run_small(mifo(*STOPPED), folder, before=calls), calls.seen


def test_the_run_to_stop_has_later_rounds(counted):
    rounds = [at for at, name in enumerate(counted[2]) if name == "generate"]
    assert any(b - a == 2 and counted[2][a + 1] == "grade" for a, b in itertools.pairwise(rounds))


@pytest.mark.parametrize("part", range(3))
def test_stopped_inside_dynamic_sampling_and_resumed(counted, tmp_path, part):
    """Stopped in any round of sampling and grading, and among the updates: the same bits in the end."""
    folder, run, seen = counted
    for at in range(1 + part, len(seen) + 1, 3 * STRIDE):
        target = tmp_path / f"{at}"
        assert run_small(mifo(*STOPPED), target, before=Calls(at)).stopped
        assert_same(run, run_small(mifo(*STOPPED), target, resume=True))
        for stream in ("metrics", "samples"):
            assert journal(target, stream) == journal(folder, stream), (at, seen[at - 1])
        assert plain_events(target) == plain_events(folder)
