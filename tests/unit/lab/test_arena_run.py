"""What an arena decides from what lies in its folder; nothing is trained here."""

import json
from dataclasses import replace

import pytest

from mifo.config.decode import encode
from mifo.errors import ConfigError, ModelError
from mifo.lab.arena import ArenaRun, Options
from mifo.lab.arena_file import BudgetConfig, FinalTest
from mifo.lab.arena_plan import final_run, make_entries, tuning_runs
from mifo.lab.arena_quick import quick_arena
from mifo.lab.arena_tuning import Trial
from mifo.train.stop import Stop

ARENA = quick_arena("tiny", ["sft"], seeds=2, budget=BudgetConfig(flops=1e9), tune=True, reference=None)


def at_work(arena, folder):
    options = Options(folder=folder, jobs=1, threads=1)
    return ArenaRun(arena=arena, options=options, stop=Stop(), say=lambda line: None)


@pytest.fixture
def work(tmp_path):
    run = at_work(ARENA, tmp_path)
    (entry,) = make_entries(ARENA, str(tmp_path / "runs"))
    return run, entry, tuning_runs(ARENA, entry)


def begin(tmp_path, run):
    folder = tmp_path / "runs" / run.name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(encode(run.config)))
    return folder


def tried(tmp_path, monkeypatch, point):
    """The point has been run; the others have failed."""
    (begin(tmp_path, point) / "summary.json").write_text("{}")
    monkeypatch.setattr(
        ArenaRun, "_trial", lambda self, factors, run: Trial(factors=factors, rates=run.rates, accuracy=None)
    )


def test_a_grid_is_open_until_its_method_s_final_runs_begin(work):
    run, entry, points = work
    assert run._of_grid(entry, points) == [point for _, point in points]
    assert run._choose(entry, points) is None  # all have failed


def test_final_runs_that_have_begun_keep_their_rates(work, tmp_path, monkeypatch):
    """The other point failed before them: tried again, it might win, and what has been trained would be of no use."""
    run, entry, points = work
    factors, point = points[1]
    tried(tmp_path, monkeypatch, point)
    begin(tmp_path, final_run(entry, 1, factors))
    assert run._of_grid(entry, points) == [point]
    assert run._choose(entry, points).factors == factors
    for final in run._final_runs([entry], [run._choose(entry, points)]):
        run._check_folder(final)


def test_final_runs_without_a_grid_do_not_stand_for_one(work, tmp_path):
    """With --no-tune first and the grid later, the grid is run."""
    run, entry, points = work
    factors, _ = points[0]
    begin(tmp_path, final_run(entry, 0, factors))
    assert run._of_grid(entry, points) == [point for _, point in points]


def test_rates_of_another_arena_are_not_those_of_this_one(work, tmp_path, monkeypatch):
    run, entry, points = work
    tried(tmp_path, monkeypatch, points[0][1])
    begin(tmp_path, final_run(entry, 0, (7.0, 7.0)))
    assert run._of_grid(entry, points) == [point for _, point in points]


@pytest.mark.parametrize("kept", [True, False])
def test_figures_of_other_problems_are_made_again_or_refused(tmp_path, kept):
    arena = replace(ARENA, settings=replace(ARENA.settings, test=FinalTest(ood_problems=9)))
    (entry,) = make_entries(arena, str(tmp_path / "runs"))
    final = final_run(entry, 0)
    folder = begin(tmp_path, final)
    run = at_work(arena, tmp_path)
    measured = folder / "measured.json"
    measured.write_text(json.dumps({"ood_data": {"place": "embedded:ood", "problems": 9}}))
    run._check_folder(final)
    assert measured.exists()
    measured.write_text(json.dumps({"ood_data": {"place": "embedded:ood", "problems": 8}}))
    if kept:
        (folder / "export").mkdir()
        run._check_folder(final)
        assert not measured.exists()
        return
    with pytest.raises(ConfigError, match="was measured on 8 problems of embedded:ood, and the arena now says"):
        run._check_folder(final)


@pytest.mark.parametrize(
    ("test", "words"),
    [
        (
            FinalTest(out_of_distribution="other.jsonl"),
            "test.out_of_distribution = 'other.jsonl': there is no such file",
        ),
        (FinalTest(in_distribution="a/b.jsonl"), "test.in_distribution = 'a/b.jsonl': there is no such file"),
        (FinalTest(in_distribution="embedded:train"), "is also what the methods train on"),
    ],
)
def test_data_are_looked_for_before_the_first_run(tmp_path, monkeypatch, test, words):
    monkeypatch.chdir(tmp_path)
    arena = replace(ARENA, settings=replace(ARENA.settings, test=test))
    with pytest.raises(ConfigError) as caught:
        at_work(arena, tmp_path / "out").execute()
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_models_are_looked_for_before_the_first_run(tmp_path):
    arena = replace(ARENA, shared={**ARENA.shared, "model": {"path": "./nowhere"}})
    with pytest.raises(ModelError, match=r"'\./nowhere' does not exist"):
        at_work(arena, tmp_path / "out").execute()


def test_what_is_allowed_to_differ_is_a_setting():
    arena = replace(ARENA, settings=replace(ARENA.settings, allow_different=("rollout.temprature",)))
    with pytest.raises(ConfigError, match=r"allow_different names 'rollout.temprature', which is neither"):
        make_entries(arena, "runs")
