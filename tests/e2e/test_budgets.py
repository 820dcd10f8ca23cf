"""Runs that end when a budget is spent, their verdicts on single problems, and evaluations by FLOPs."""

import pytest
from conftest_e2e import cut_back, journal, run_small, small_config

from mifo.config.check import check_config
from mifo.config.load import load_config
from mifo.config.schema import TrainConfig
from mifo.errors import ConfigError
from mifo.train.ledger import Ledger


def test_what_is_counted_by_hand():
    ledger = Ledger(parameters=10, generated_tokens=7, prefilled_tokens=3, rl_tokens=4, rl_fed_tokens=6, sft_tokens=5)
    assert ledger.flops == 2 * 10 * (7 + 3) + 6 * 10 * 6
    assert ledger.tokens == 7 + 4 + 5
    for budget, ended_by in (({}, None), ({"max_flops": 560.0}, "max_flops"), ({"max_flops": 561.0}, None),
                             ({"max_tokens": 16}, "max_tokens"), ({"max_tokens": 17}, None),
                             ({"minutes": 2.0}, "minutes")):  # fmt: skip
        assert ledger.spent(TrainConfig(**budget), minutes=2.0) == ended_by, budget


@pytest.mark.parametrize("kind", ["max_flops", "max_tokens"])
def test_a_run_ends_at_the_first_step_that_spends_its_budget(kind, tmp_path):
    spent = []

    def watch(run):
        record = run.record
        run.record = lambda *args: (
            record(*args),
            spent.append((run.ledger.flops, run.ledger.tokens, run.in_sft_phase)),
        )

    whole = run_small(small_config(train={"steps": 6}), tmp_path / "whole", before=watch)
    assert whole.steps == 6
    column = 0 if kind == "max_flops" else 1
    in_phase = next(i for i, row in enumerate(spent) if row[2])  # a budget that an RL step spends before an SFT phase
    budget = spent[in_phase][column] - 1
    end = next(i for i, row in enumerate(spent) if row[column] >= budget and not row[2])
    assert end > in_phase
    run = run_small(small_config(train={"steps": 600, kind: budget}), tmp_path / "run")
    assert run.iterations == end + 1
    assert (run.ledger.flops, run.ledger.tokens) == spent[end][:2]
    assert journal(tmp_path / "run", "metrics") == journal(tmp_path / "whole", "metrics")[: end + 1]


def test_a_run_that_is_resumed_ends_where_it_would_have(tmp_path):
    config = small_config(train={"steps": 600, "max_tokens": 700})
    whole = run_small(config, tmp_path / "whole")
    assert whole.steps < 600
    cut_back(tmp_path / "whole", tmp_path / "cut", 2)
    again = run_small(config, tmp_path / "cut", resume=True)
    assert (again.steps, again.ledger.summary() | {"seconds": 0}) == (
        whole.steps,
        whole.ledger.summary() | {"seconds": 0},
    )


def test_verdicts_on_single_problems_are_kept(finished):
    folder, run = finished
    records = journal(folder, "evaluations")
    assert [record["label"] for record in records if record["label"] != "forgetting meter"] == ["before", "after"]
    assert all(len(record["problems"]) == 10 for record in records)
    assert records[-1]["flops"] == run.ledger.flops
    mean = sum(records[-1]["problems"].values()) / 10
    assert mean == pytest.approx(run.scores["after"]["accuracy"])
    assert "by_problem" not in run.scores["after"]
    meters = [record for record in journal(folder, "events") if record["event"] == "sft_phase"]
    assert [meter["flops"] for meter in meters] == sorted(meter["flops"] for meter in meters)
    assert 0 < meters[0]["flops"] < run.ledger.flops


def test_evaluations_by_flops(finished, tmp_path):
    """Once past each multiple, never inside an SFT phase, not just before the last one; the same after a resume."""
    every = finished[1].ledger.flops / 4
    config = small_config(evaluation={"every_flops": every})
    run_small(config, tmp_path / "run")
    records = [r for r in journal(tmp_path / "run", "evaluations") if r["label"].startswith("step ")]
    crossed = [int(record["flops"] // every) for record in records]
    assert len(crossed) in (2, 3)
    assert crossed == sorted(set(crossed))
    assert crossed[0] >= 1
    events = journal(tmp_path / "run", "events")
    buffers = [r["buffer"] for r in journal(tmp_path / "run", "metrics")]
    assert len(buffers) > len(records)
    phases = [e["phase"] for e in events if e["event"] == "evaluation" and e["label"].startswith("step ")]
    assert len(phases) == len(records)
    cut_back(tmp_path / "run", tmp_path / "cut", 5)
    run_small(config, tmp_path / "cut", resume=True)
    assert journal(tmp_path / "cut", "evaluations") == journal(tmp_path / "run", "evaluations")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--evaluation.every-flops", "1e9", "--evaluation.every-steps", "2"], "would measure some weights twice"),
        (["--evaluation.every-flops", "1e9", "--data.evaluation", "none"], "there is nothing to evaluate"),
        (["--evaluation.every-flops", "1e9", "--train.max-flops", "1e9"], "has no effect with train.max_flops"),
        (["--train.max-flops", "0"], "train.max_flops = 0.0 must be more than 0"),
        (["--train.max-tokens", "0"], "train.max_tokens = 0 must be at least 1"),
    ],
)
def test_settings_that_cannot_work(flags, words):
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", flags)
    assert words in str(caught.value)


def test_a_budget_may_change_on_resume(finished, tmp_path):
    folder, run = finished
    check_config(small_config(train={"max_flops": 1e12}))
    cut_back(folder, tmp_path / "cut", 4)
    shorter = run_small(small_config(train={"max_tokens": 1}), tmp_path / "cut", resume=True)
    assert shorter.iterations < run.iterations
