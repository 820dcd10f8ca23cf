"""Who is ranked, who is left out and why; folders of existing runs; the choice of learning rates."""

import dataclasses
import json

import pytest
from arena_runs import make_result, write_run

from mifo.errors import CheckpointError, ConfigError
from mifo.lab.arena_compare import Budget, compare
from mifo.lab.arena_folders import compare_folders
from mifo.lab.arena_results import Failure, SftPhase, read_run
from mifo.lab.arena_tuning import Choice, Trial, select
from mifo.report.compare_text import remarks

FLOPS = Budget(kind="flops", amount=1e12, tolerance=0.05)


def compared(runs, entries=("mifo", "sft"), **changes):
    settings = {"reference": "mifo", "budget": FLOPS, "name": "test", "tuned": False}
    return compare(runs, entries=entries, **(settings | changes))


def rows(comparison):
    return {row.entry: row for row in comparison.rows}


def test_means_ranks_and_differences_by_hand():
    runs = [
        make_result("mifo", 0, (1, 1, 0, 0), ood=(1, 0, 0, 0)),
        make_result("mifo", 1, (1, 0, 0, 0), ood=(0, 0, 0, 0)),
        make_result("sft", 0, (1, 1, 1, 0), ood=(0, 0, 0, 0)),
        make_result("sft", 1, (1, 1, 1, 1), ood=(0, 0, 0, 0)),
    ]
    found = rows(compared(runs))
    assert found["mifo"].accuracy.value == 0.375
    assert found["sft"].accuracy.value == 0.875
    assert found["sft"].difference.value == 0.5
    assert found["mifo"].difference is None
    assert found["mifo"].ood.value == 0.125
    assert found["sft"].ood_difference.value == -0.125
    assert (found["sft"].rank, found["mifo"].rank) == (1, 2)
    assert compared(runs).rows[0].entry == "sft"  # best first
    figures = found["mifo"].figures
    assert figures["response_length"].value == 20.0
    assert figures["forgotten_per_sft_phase"].value == pytest.approx(0.0)  # 0.25 lost, then 0.25 won
    assert figures["unique_demonstrations"].value == 32
    assert figures["minutes"].value == 2.0


def test_a_run_outside_the_budget_is_flagged_and_left_out():
    runs = [
        make_result("mifo", 0, (0, 0, 0, 0)),
        make_result("mifo", 1, (1, 1, 1, 1), flops=1.06e12),
        make_result("sft", 0, (1, 0, 0, 0), flops=1.049e12),
        make_result("sft", 1, (1, 0, 0, 0), flops=0.951e12),
    ]
    comparison = compared(runs)
    found = rows(comparison)
    assert [run.name for run in comparison.outside] == ["mifo-seed1"]
    assert found["mifo"].accuracy.value == 0.0
    assert len(found["mifo"].counted) == 1
    assert (found["sft"].rank, found["mifo"].rank) == (1, 2)
    assert FLOPS.deviation(runs[1]) == pytest.approx(0.06)


def test_a_run_that_ended_before_its_last_stage_is_not_ranked():
    """It may have spent its budget to the letter: the method that it is named after never ran."""
    runs = [make_result("mifo", 0, (1, 1, 1, 1)), make_result("sft", 0, (1, 0, 0, 0))]
    runs[0] = dataclasses.replace(runs[0], whole=False)
    comparison = compared(runs)
    assert [run.name for run in comparison.outside] == ["mifo-seed0"]
    assert (rows(comparison)["mifo"].rank, rows(comparison)["sft"].rank) == (None, 1)
    said = " ".join(remarks(comparison))
    assert "mifo-seed0 ended before the last of its stages began; not ranked" in said


def test_a_method_without_any_run_in_the_budget_has_no_rank():
    runs = [make_result("mifo", 0), make_result("sft", 0, (1, 1, 1, 1), flops=2e12)]
    comparison = compared(runs)
    found = rows(comparison)
    assert found["sft"].rank is None
    assert found["sft"].accuracy.value == 1.0  # shown all the same
    assert [row.entry for row in comparison.rows] == ["mifo", "sft"]


@pytest.mark.parametrize(
    ("kind", "amount", "changes"),
    [("tokens", 1000, {"tokens": 1200}), ("steps", 40, {"steps": 50}), ("minutes", 2.0, {"seconds": 150.0})],
)
def test_budgets_of_other_kinds(kind, amount, changes):
    budget = Budget(kind=kind, amount=amount, tolerance=0.05)
    runs = [make_result("mifo", 0, flops=5e15), make_result("sft", 0, **changes)]
    assert [run.entry for run in compared(runs, budget=budget).outside] == ["sft"]


def test_equal_means_share_a_rank():
    runs = [
        make_result(name, 0, scores) for name, scores in (("a", (1, 0, 0, 0)), ("b", (0, 1, 0, 0)), ("c", (0,) * 4))
    ]
    found = rows(compared(runs, ("a", "b", "c"), reference="c"))
    assert [found[name].rank for name in "abc"] == [1, 1, 3]


def test_failed_runs_and_methods_without_runs_are_kept():
    failure = Failure(name="sft-seed0", entry="sft", stage="final", seed=0, reason="no data (status 2)", log="x.log")
    comparison = compared([make_result("mifo", 0)], failures=[failure])
    found = rows(comparison)
    assert found["sft"].failures == (failure,)
    assert found["sft"].rank is None
    assert found["sft"].accuracy is None
    assert comparison.failures == (failure,)


def test_runs_that_do_not_begin_alike_are_noted():
    same = [make_result("mifo", 0), make_result("sft", 0), make_result("sft", 1, before={"p0": 1.0})]
    assert compared(same).notes == ()
    other = make_result("sft", 0, before={"p0": 0.0, "p1": 0.0, "p2": 0.0, "p3": 1.0})
    (note,) = compared([make_result("mifo", 0), other]).notes
    assert "sft-seed0 answered differently from mifo-seed0 (seed 0)" in note


def test_forgetting_is_what_was_lost():
    phase = SftPhase(flops=1.0, before=0.5, after=0.4)
    assert phase.forgotten == pytest.approx(0.1)
    assert make_result(phases=()).forgotten is None


# --- learning rates ----------------------------------------------------------------------------------------------------


def trial(accuracy, *factors):
    return Trial(factors=factors, rates=(1e-3 * factors[0], 1e-3 * factors[1]), accuracy=accuracy)


def test_the_best_on_validation_is_chosen_and_ties_stay_near_the_recipe():
    assert select([trial(0.2, 1, 1), trial(0.4, 2, 2), trial(0.3, 1, 2)]).factors == (2, 2)
    assert select([trial(0.4, 4, 1), trial(0.4, 1, 1), trial(0.4, 0.5, 1)]).factors == (1, 1)
    assert select([trial(0.4, 2, 1), trial(0.4, 1, 2)]).factors == (2, 1)
    assert select([trial(None, 1, 1), trial(0.0, 2, 1)]).factors == (2, 1)
    assert select([trial(None, 1, 1)]) is None
    assert select([]) is None


def test_a_choice_at_the_edge_says_so():
    grid = tuple(trial(0.1, factor, 1) for factor in (0.5, 1, 2))
    choice = Choice(entry="a", factors=(1, 1), rates=(1e-3, 1e-3), optimizers=("rl",), trials=grid)
    assert not choice.at_edge
    assert dataclasses.replace(choice, factors=(2, 1)).at_edge
    assert not dataclasses.replace(choice, factors=(2, 1), trials=()).at_edge
    assert choice.describe() == "rl 0.001"
    both = dataclasses.replace(choice, optimizers=("rl", "sft"), rates=(1e-3, 3e-4))
    assert both.describe() == "rl 0.001, sft 0.0003"


# --- existing runs -----------------------------------------------------------------------------------------------------


def folders(paths, **settings):
    return compare_folders(paths, **({"reference": None, "allow_different": (), "tolerance": 0.05} | settings))


def test_a_run_folder_is_read(tmp_path):
    run = read_run(write_run(tmp_path / "a", accuracy=0.3))
    assert (run.accuracy, run.entry, run.seed, run.steps) == (0.3, "mifo", 0, 12)
    assert run.curve == ((0.0, 0.0), (1e10, 0.3))
    assert run.forgotten == pytest.approx(0.1)
    assert run.movement is None
    (tmp_path / "a" / "measured.json").write_text(
        json.dumps({"movement": {"l2": 3.0, "relative": 0.5}, "ood": {"x": 1.0, "y": 0.0}})
    )
    run = read_run(tmp_path / "a")
    assert (run.movement, run.relative_movement, run.ood_accuracy) == (3.0, 0.5, 0.5)


def test_runs_are_grouped_by_what_they_are(tmp_path):
    paths = [
        write_run(tmp_path / "one", accuracy=0.2),
        write_run(tmp_path / "two", flags=["--train.seed", "1"], accuracy=0.4),
        write_run(tmp_path / "three", flags=["--method.freeze-top", "0"], accuracy=0.8),
    ]
    comparison = folders(paths)
    assert [(row.entry, row.accuracy.value) for row in comparison.rows] == [
        ("mifo (freeze_top=0.0)", 0.8), ("mifo (freeze_top=0.5)", pytest.approx(0.3)),
    ]  # fmt: skip
    assert comparison.reference == "mifo (freeze_top=0.5)"
    assert not comparison.budget.planned
    assert folders(paths[:2]).rows[0].entry == "mifo"


def test_the_folder_of_an_arena_stands_for_its_final_runs(tmp_path):
    runs = tmp_path / "arena" / "runs"
    write_run(runs / "dagger-seed0", flags=["--method.history", "0"])
    write_run(runs / "mifo-seed0")
    write_run(runs / "tuning-mifo-0", flags=["--train.seed", "1000"])
    comparison = folders([tmp_path / "arena"])
    assert {row.entry for row in comparison.rows} == {"dagger", "mifo"}


def test_runs_are_held_to_the_median_of_their_flops(tmp_path):
    paths = [
        write_run(tmp_path / f"r{i}", flags=["--train.seed", str(i)], flops=flops)
        for i, flops in enumerate((1.0e10, 1.01e10, 2e10))
    ]
    comparison = folders(paths)
    assert comparison.budget.amount == 1.01e10
    assert [run.name for run in comparison.outside] == ["r2"]
    assert folders(paths, tolerance=1.0).outside == ()


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    first = write_run(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"a, b are the same method \(mifo\) and seed \(0\)"):
        folders([first, write_run(tmp_path / "b")])
    hot = write_run(tmp_path / "c", flags=["--rollout.temperature", "0.7", "--train.seed", "1"])
    with pytest.raises(ConfigError, match=r"rollout\.temperature = 1\.0 for a and 0\.7 for c"):
        folders([first, hot])
    (note,) = folders([first, hot], allow_different=["rollout"]).notes
    assert "allowed to differ: rollout.temperature" in note
    other = write_run(tmp_path / "d", flags=["--train.seed", "2"], data="changed")
    with pytest.raises(ConfigError, match="problems of different content"):
        folders([first, other])
    with pytest.raises(ConfigError, match=r"both called x, but differ in method\.freeze_top"):
        folders(
            [
                write_run(tmp_path / "x-seed0"),
                write_run(tmp_path / "x-seed1", flags=["--train.seed", "1", "--method.freeze-top", "0"]),
            ]
        )
    with pytest.raises(ConfigError, match="--reference sft is none of the methods found: mifo"):
        folders([first], reference="sft")


def test_unfinished_and_old_runs_are_refused(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "evaluations.jsonl").unlink()
    with pytest.raises(CheckpointError, match="no verdicts on single problems"):
        read_run(folder)
    (folder / "summary.json").unlink()
    with pytest.raises(CheckpointError, match="holds no finished run"):
        read_run(folder)
    with pytest.raises(ConfigError, match="neither a run folder nor the folder of an arena"):
        folders([tmp_path / "nothing"])
    old = write_run(tmp_path / "old")
    (old / "summary.json").write_text(json.dumps({"accuracy_after": 0.1}))
    with pytest.raises(CheckpointError, match="earlier version"):
        read_run(old)
