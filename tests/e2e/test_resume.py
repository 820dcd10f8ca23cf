"""Same seed, same bits; and a run that was killed anywhere and resumed ends in the same bits."""

import dataclasses
import os
import shutil

import pytest
import torch
from conftest_e2e import cut_back, journal, replaced, run_small, small_config, without_times

from mifo.errors import CheckpointError, RewardError
from mifo.train.checkpoint import Snapshot, list_checkpoints
from mifo.types import Verdict

STRIDE = int(os.environ.get("MIFO_STOP_STRIDE", "7"))  # 1 stops at every place


def digest(run):
    """Everything that decides the future of a run: tensors as bits, the rest without times."""
    snapshot = run.snapshot()
    tensors = {
        f"{group}/{name}": tensor.detach().numpy().tobytes()
        for group, members in snapshot.tensors.items()
        for name, tensor in members.items()
    }
    state = without_times(dict(snapshot.state))
    del state["journal"], state["verdicts"]  # verdicts on demonstrations are given again when data is read again
    return tensors, state


def assert_same(run, other):
    (tensors, state), (other_tensors, other_state) = digest(run), digest(other)
    assert state == other_state
    assert tensors.keys() == other_tensors.keys()
    assert [name for name in tensors if tensors[name] != other_tensors[name]] == []


def test_the_run_is_worth_resuming(finished):
    """Both phases occur, more than once; SFT phases take several updates; some checkpoints hold a half-filled buffer."""
    folder, run = finished
    metrics = journal(folder, "metrics")
    phases = [record["phase"] for record in metrics]
    assert "rl sft sft rl" in " ".join(phases)
    assert run.ledger.intervals >= 2
    assert any(0 < record["buffer"] < 6 for record in metrics if record["phase"] == "rl")
    assert any(meter["frozen_fraction"] > 0 for meter in run.meters)
    assert len(list_checkpoints(folder / "checkpoints")) == len(phases) + 1  # the last one after the final evaluation


def test_same_seed_same_bits(finished, tmp_path):
    folder, run = finished
    again = run_small(small_config(), tmp_path / "again")
    assert_same(run, again)
    for stream in ("metrics", "samples", "events", "evaluations"):
        assert journal(folder, stream) == journal(tmp_path / "again", stream)


def test_another_seed_gives_another_run(finished, tmp_path):
    other = run_small(small_config(train={"seed": 1}), tmp_path / "other")
    assert digest(other)[0] != digest(finished[1])[0]


def test_killed_after_every_step_and_resumed(finished, tmp_path):
    folder, run = finished
    for iteration in range(1, run.iterations + 1):
        target = tmp_path / f"cut-{iteration}"
        cut_back(folder, target, iteration)
        resumed = run_small(small_config(), target, resume=True)
        assert_same(run, resumed)
        for stream in ("metrics", "samples", "evaluations"):
            assert journal(target, stream) == journal(folder, stream), iteration


def test_a_resumed_run_may_go_on_longer(finished, tmp_path):
    folder, _ = finished
    longer = run_small(small_config(train={"steps": 8}), tmp_path / "longer")
    cut_back(folder, tmp_path / "cut", 4)
    resumed = run_small(small_config(train={"steps": 8}), tmp_path / "cut", resume=True)
    assert_same(longer, resumed)


def test_a_failing_grader_stops_a_resumed_run_at_the_same_step(tmp_path):
    """5 of 16 answers of every step are errors: a quarter of the last 64 is exceeded in the fourth step, resumed or not."""

    def failing(run):
        grade = run.parts.grader.grade
        run.parts.grader.grade = lambda items: [Verdict.ERROR] * 5 + grade(items)[5:]

    def sampled(folder):
        return [record["step"] for record in journal(folder, "metrics") if "verdicts" in record]

    config = small_config(reward={"failure_window": 64}, data={"evaluation": "none"})
    with pytest.raises(RewardError, match="31% of the last 64") as whole:
        run_small(config, tmp_path / "whole", before=failing)
    assert sampled(tmp_path / "whole") == [1, 2, 3]
    cut_back(tmp_path / "whole", tmp_path / "cut", 2)
    with pytest.raises(RewardError) as resumed:
        run_small(config, tmp_path / "cut", resume=True, before=failing)
    assert sampled(tmp_path / "cut") == [1, 2, 3]
    assert str(resumed.value) == str(whole.value)


def test_a_checkpoint_of_another_version_is_refused_by_name(finished):
    snapshot = finished[1].snapshot()
    state = {name: value for name, value in snapshot.state.items() if name != "failures"}
    with pytest.raises(CheckpointError, match="says nothing of failures: another version of mifo wrote it"):
        finished[1].restore(Snapshot(snapshot.tensors, state))


def test_forgotten_state_would_be_noticed(finished, tmp_path):
    """The comparison can fail: leave one component out of the restore, and the bits differ."""

    def forget_moments(run):
        for state in run.parts.optimizers["rl"].optimizer.state.values():
            state["exp_avg"].zero_()

    cut_back(finished[0], tmp_path / "cut", 3)
    resumed = run_small(small_config(), tmp_path / "cut", resume=True, before=forget_moments)
    with pytest.raises(AssertionError):
        assert_same(finished[1], resumed)


def test_other_settings_are_refused(finished, tmp_path):
    cut_back(finished[0], tmp_path / "cut", 3)
    with pytest.raises(CheckpointError, match=r"model\.path|method\.freeze_top = 0\.5, not 0\.25"):
        run_small(small_config(method={"freeze_top": 0.25}), tmp_path / "cut", resume=True)


def test_a_folder_with_a_run_is_not_overwritten(finished):
    with pytest.raises(CheckpointError, match="already holds a run"):
        run_small(small_config(), finished[0])


def test_nothing_to_resume(tmp_path):
    with pytest.raises(CheckpointError, match="no run to resume"):
        run_small(small_config(), tmp_path / "empty", resume=True)


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json", "rl.safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(finished, tmp_path, name):
    cut_back(finished[0], tmp_path / "cut", 2)
    shutil.copytree(finished[0] / "checkpoints" / "step-000003", tmp_path / "cut" / "checkpoints" / "step-000003")
    file = tmp_path / "cut" / "checkpoints" / "step-000003" / name
    file.write_bytes(b"\x00" * file.stat().st_size)
    resumed = run_small(small_config(), tmp_path / "cut", resume=True)
    assert_same(finished[1], resumed)
    (event,) = [e for e in journal(tmp_path / "cut", "events") if e["event"] == "resumed"]
    assert event["checkpoint"] == "step-000002"
    assert f"step-000003: {name} is damaged" in event["refused"][0]
    kept = list_checkpoints(tmp_path / "cut" / "checkpoints")
    assert [p.name for p in kept][:4] == ["step-000002", "step-000003", "step-000003.1", "step-000004"]


def test_no_whole_checkpoint_is_left(finished, tmp_path):
    cut_back(finished[0], tmp_path / "cut", 2)
    (tmp_path / "cut" / "checkpoints" / "step-000002" / "rl.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no whole checkpoint(.|\n)*step-000002: rl\.safetensors is missing"):
        run_small(small_config(), tmp_path / "cut", resume=True)


def test_a_damaged_configuration_is_named(finished, tmp_path):
    cut_back(finished[0], tmp_path / "cut", 2)
    file = tmp_path / "cut" / "config.json"
    file.write_bytes(b"\x00" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        run_small(small_config(), tmp_path / "cut", resume=True)


def test_a_pipe_in_place_of_the_configuration_is_refused_and_not_waited_for(finished, tmp_path):
    cut_back(finished[0], tmp_path / "cut", 2)
    (tmp_path / "cut" / "config.json").unlink()
    os.mkfifo(tmp_path / "cut" / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json is no file"):
        run_small(small_config(), tmp_path / "cut", resume=True)


def test_checkpoints_that_are_gone_do_not_begin_a_run_again(finished, tmp_path):
    """Their disk may not be mounted: to begin again would cut the logs and train for days what is there already."""
    shutil.copytree(finished[0], tmp_path / "cut")
    (tmp_path / "cut" / "checkpoints").rename(tmp_path / "elsewhere")
    before = (tmp_path / "cut" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"holds no checkpoint, but events\.jsonl tells of some(.|\n)*mounted"):
        run_small(small_config(), tmp_path / "cut", resume=True)
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == before


def test_old_checkpoints_are_dropped(tmp_path):
    config = replaced(small_config(), "run", keep_checkpoints=2)
    run_small(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4)), tmp_path / "run")
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 2


def test_a_start_that_failed_leaves_nothing_in_the_way(tmp_path):
    """A model that cannot be loaded must not turn its folder into a run that can neither start nor resume."""
    from mifo.errors import ModelError

    folder = tmp_path / "run"
    with pytest.raises(ModelError):
        run_small(small_config(rollout={"max_response_tokens": 300}), folder)  # the tiny model has 256 positions
    assert run_small(small_config(train={"steps": 1}), folder).steps == 1


def test_changed_data_are_refused(tmp_path):
    """Same ids, other text: the run would go on with problems it was not started on."""
    import json

    def write(name, word):
        rows = [
            {"id": f"r{i}", "problem": f"{word} {i}", "answer": str(i), "demonstration": f"\\boxed{{{i}}}"}
            for i in range(12)
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    write("train.jsonl", "copy"), write("test.jsonl", "keep")
    files = {"train": str(tmp_path / "train.jsonl"), "evaluation": str(tmp_path / "test.jsonl"), "families": []}
    run_small(small_config(data=files, train={"steps": 2}), tmp_path / "run")
    for name in ("train.jsonl", "test.jsonl"):
        before = (tmp_path / name).read_text()
        write(name, "other")
        with pytest.raises(CheckpointError, match="holds other problems"):
            run_small(small_config(data=files, train={"steps": 3}), tmp_path / "run", resume=True)
        (tmp_path / name).write_text(before)
    assert run_small(small_config(data=files, train={"steps": 3}), tmp_path / "run", resume=True).steps == 3


def test_interrupted_runs_save_and_go_on(finished, tmp_path):
    """A stop that is asked for between turns saves, and loses nothing."""
    folder = tmp_path / "run"
    config = small_config(run={"checkpoint_steps": "none"})

    def interrupt(run):
        record = run.record

        def count(*arguments):
            record(*arguments)
            if run.iterations == 5:
                run.stop.request()

        run.record = count

    stopped = run_small(config, folder, before=interrupt)
    assert stopped.stopped
    assert stopped.iterations == 5
    assert stopped.scores.keys() == {"before"}
    assert_same(finished[1], run_small(config, folder, resume=True))


class Calls:
    """Counts calls of some methods of a run's parts; asks the run to stop inside call number `at`."""

    def __init__(self, at=None):
        self.at, self.seen = at, []

    def __call__(self, run):
        self.run = run
        self.watch(run.engine, "generate")
        self.watch(run.parts.grader, "grade")
        self.watch(run.learner, "_backward")

    def watch(self, owner, name):
        method = getattr(owner, name)

        def called(*arguments, **keywords):
            result = method(*arguments, **keywords)
            self.seen.append(name)
            if len(self.seen) == self.at:
                self.run.stop.request()
            return result

        setattr(owner, name, called)


CONFIG = {"run": {"checkpoint_steps": "none"}, "evaluation": {"every_steps": 2, "meter_problems": 4}}


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """An uninterrupted run and the places at which it could be stopped: (folder, run, names of calls)."""
    calls = Calls()
    folder = tmp_path_factory.mktemp("counted") / "run"
    return folder, run_small(small_config(**CONFIG), folder, before=calls), calls.seen


@pytest.mark.parametrize("part", range(6))
def test_stopped_inside_a_turn(counted, tmp_path, part):
    """Stopped inside generation, grading, evaluation, first and later updates of both phases: the same bits in the end."""
    folder, run, seen = counted
    assert {"generate", "grade", "_backward"} <= set(seen)
    for at in range(1 + part, len(seen) + 1, 6 * STRIDE):
        target = tmp_path / f"{at}-{seen[at - 1]}"
        stopped = run_small(small_config(**CONFIG), target, before=Calls(at))
        assert stopped.stopped, at
        resumed = run_small(small_config(**CONFIG), target, resume=True)
        assert not resumed.stopped
        assert_same(run, resumed)
        for stream in ("metrics", "samples"):
            assert journal(target, stream) == journal(folder, stream), (at, seen[at - 1])
        assert plain_events(target) == plain_events(folder), (at, seen[at - 1])


def plain_events(folder):
    """Events of training: without those of saving and resuming."""
    return [e for e in journal(folder, "events") if e["event"] not in ("checkpoint", "resumed")]


def test_a_finished_run_is_finished(finished, tmp_path):
    """Resuming it measures nothing again and writes no further checkpoint."""
    shutil.copytree(finished[0], tmp_path / "run")
    again = run_small(small_config(), tmp_path / "run", resume=True)
    assert_same(finished[1], again)
    assert plain_events(tmp_path / "run") == plain_events(finished[0])
    checkpoints = [p.name for p in list_checkpoints(finished[0] / "checkpoints")]
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == checkpoints


def test_other_versions_of_the_code_are_said(finished, tmp_path, monkeypatch):
    cut_back(finished[0], tmp_path / "cut", 2)
    run_small(small_config(), tmp_path / "cut", resume=True)
    monkeypatch.setattr("mifo.train.folder.__version__", "99")
    run_small(small_config(), tmp_path / "cut", resume=True)
    first, second = [e for e in journal(tmp_path / "cut", "events") if e["event"] == "resumed"]
    assert first["other_code"] is None
    assert second["other_code"]["mifo"] != "99"


def test_another_reference_model_is_refused(tmp_path):
    """The KL term would compare with other weights than before."""
    from mifo.data.chartok import char_tokenizer
    from mifo.train.model import tiny_model

    path = tmp_path / "model"
    model = tiny_model()
    model.save_pretrained(path), char_tokenizer().save_pretrained(path)
    tables = {"model": {"path": str(path)}, "method": {"rl": {"kl_coefficient": 0.1}}, "train": {"steps": 1}}
    run_small(small_config(**tables), tmp_path / "run")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    model.save_pretrained(path)
    tables["train"]["steps"] = 2
    with pytest.raises(CheckpointError, match=r"model\.path = .* holds other weights than when"):
        run_small(small_config(**tables), tmp_path / "run", resume=True)
