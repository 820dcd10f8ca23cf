"""A whole run with a failing file system, lost logs, a jumping clock: a clear error or recovery, and the same bits in the end.

MIFO_FAULT_STRIDE = 1 tries every operation of the run (the default takes some).
"""

import contextlib
import errno
import json
import os
import resource
import shutil
import time

import pytest
from fault_storage import FaultyStorage, KilledError
from kill_harness import contents
from safetensors.torch import load_file

from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.errors import CheckpointError
from mifo.eval.score import make_evaluate
from mifo.train.build import build_run, make_grader, prepare
from mifo.train.journal import Journal
from mifo.train.lock import FolderLock
from mifo.train.loop import train
from mifo.train.storage import Storage
from mifo.train.summary import write_results

STRIDE = int(os.environ.get("MIFO_FAULT_STRIDE", "101"))
TABLES = {
    "model": {"path": "tiny", "compute": "float32"},
    "data": {"families": ["tiny"], "train_problems": 30, "evaluation_problems": 4},
    "rollout": {"max_response_tokens": 12},
    "method": {
        "name": "mifo",
        "buffer_size": 4,
        "sft_batch_size": 4,
        "rl": {"prompts_per_step": 4, "rollouts_per_prompt": 2, "updates_per_step": 2},
    },
    "train": {"steps": 3, "threads": 1},
    "run": {"checkpoint_steps": 1, "export": False, "background_checkpoints": False},
}


def run_in(folder, *, storage=None, resume=False, before=None, background=False, export=False):
    tables = TABLES | {"run": TABLES["run"] | {"background_checkpoints": background, "export": export}}
    config = decode(Config, tables)
    with make_grader(config) as grader:
        run = build_run(
            prepare(config, grader), grader, folder, make_evaluate=make_evaluate, listener=lambda *_: None, resume=resume,
            storage=storage,
        )  # fmt: skip
        if before is not None:
            before(run)
        train(run)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: (folder, how many operations it took)."""
    folder, storage = tmp_path_factory.mktemp("whole") / "run", FaultyStorage()
    run_in(folder, storage=storage)
    assert {"write", "sync", "rename", "remove_tree", "open_log"} <= {name for name, _ in storage.log}
    return folder, len(storage.log)


@pytest.mark.parametrize("fault", ["EIO", "full disk", "short write", "kill during", "power cut"])
def test_operations_of_a_run_fail(whole, tmp_path, fault):
    """After the fault, --resume ends in the same bits; an error names what was refused and how to go on."""
    folder, count = whole
    for at in range(1 + len(fault), count + 1, STRIDE):
        target = tmp_path / f"{at}"
        storage, outcome = FaultyStorage(fault, at, seed=at), None
        try:
            run_in(target, storage=storage)
        except (CheckpointError, KilledError) as error:
            outcome = error
        if isinstance(outcome, CheckpointError):
            assert str(target) in str(outcome)
        if (target / "config.json").is_file():
            run_in(target, resume=True)
        else:  # refused before there was a run
            run_in(target)
        found = contents(target)
        if fault == "power cut":  # what was logged after the last sync may be gone; what is trained may not
            for stream in ("metrics", "samples", "events"):
                found.pop(stream)
        assert found.items() <= contents(folder).items(), (at, storage.log[-1])


def test_a_full_disk_in_the_background_ends_the_run_with_a_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"turn \d could not be written: No space left on device"):
        run_in(tmp_path / "run", storage=FaultyStorage("full disk", 60), background=True)


def test_results_that_find_no_room_are_an_error_and_are_written_on_resume(tmp_path):
    """A file may have 50 kB: the system refuses the rest of the exported weights, as a full disk does."""
    folder = tmp_path / "run"
    run = run_in(folder, export=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"the results could not be written.*write them with --resume"):
            write_results(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (folder / "export").exists()
    assert not (folder / "summary.json").exists()
    write_results(run_in(folder, resume=True, export=True))
    weights = load_file(folder / "export" / "model.safetensors")
    trained = dict(run.learner.policy.model.named_parameters())
    assert all(bool((weights[name] == trained[name]).all()) for name in weights)
    assert json.loads((folder / "summary.json").read_text())["steps"] == 3
    assert not (folder / "writing-export").exists()


def test_an_old_checkpoint_that_cannot_be_removed_is_an_event_and_no_error(tmp_path):
    class Keeping(Storage):
        def remove_tree(self, path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    run_in(tmp_path / "run", storage=Keeping())
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    told = [event for event in events if event["event"] == "not_removed"]
    assert told[0]["folder"] == str(tmp_path / "run" / "checkpoints" / "removing-step-000001")
    assert "Permission denied" in told[0]["reason"]
    assert len({event["folder"] for event in told}) == len(told)  # once each
    assert [event["iteration"] for event in events if event["event"] == "checkpoint"][:3] == [1, 2, 3]
    run_in(tmp_path / "run", resume=True)


def test_a_checkpoint_without_rights_ends_a_resume_with_an_error(whole, tmp_path):
    class Forbidden(Storage):
        def open_to_read(self, path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    shutil.copytree(whole[0], tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json cannot be read: Permission denied"):
        run_in(tmp_path / "run", storage=Forbidden(), resume=True)
    assert contents(tmp_path / "run") == contents(whole[0])


def test_a_read_only_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written to"):
        run_in(tmp_path / "run", storage=FaultyStorage("EROFS", 1))
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match=r"cannot be used \(Not a directory\)"),
        FolderLock(tmp_path / "file" / "run"),
    ):
        pass


@pytest.mark.parametrize(
    ("number", "words"), [(30, "cannot be written to"), (37, "cannot lock files"), (95, "--run.no-lock")]
)
def test_locks_that_cannot_be_had(tmp_path, monkeypatch, number, words):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("mifo.train.lock.fcntl.flock", refuse)
    with pytest.raises(CheckpointError, match=words), FolderLock(tmp_path / "run"):
        pass
    with FolderLock(tmp_path / "run", enabled=False):
        pass


def test_a_lock_is_held_and_leaves_nothing_where_nothing_began(tmp_path):
    with FolderLock(tmp_path / "run"):
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on "), FolderLock(tmp_path / "run"):
            pass
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
    with FolderLock(tmp_path / "run"):
        (tmp_path / "run" / "config.json").write_text("{}")
    with FolderLock(tmp_path / "run"):
        pass
    assert (tmp_path / "run").is_dir()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("how", ["deleted", "replaced", "moved"])
def test_a_log_lost_under_way_is_put_back_whole(whole, tmp_path, how):
    def lose(run):
        record = run.record

        def recorded(*arguments):
            record(*arguments)
            path = run.journal.paths["metrics"]
            if run.iterations == 2:
                if how == "moved":
                    path.rename(tmp_path / "elsewhere")
                else:
                    path.unlink()
                if how == "replaced":
                    path.write_text("something else\n")

        run.record = recorded

    run_in(tmp_path / "run", before=lose)
    assert contents(tmp_path / "run") == contents(whole[0])


def test_a_log_lost_between_sessions_is_said_and_training_the_same(whole, tmp_path):
    storage = FaultyStorage("kill before", whole[1] - 30)
    with contextlib.suppress(KilledError):
        run_in(tmp_path / "run", storage=storage)
    (tmp_path / "run" / "samples.jsonl").unlink()
    metrics = tmp_path / "run" / "metrics.jsonl"
    first = metrics.read_text().splitlines()[0]
    metrics.write_text(first + "\n" + '{"cut in the mid')
    run_in(tmp_path / "run", resume=True)
    lost = {e["log"]: e["bytes"] for e in lines(tmp_path / "run" / "events.jsonl") if e["event"] == "log_lost"}
    assert lost.keys() == {"metrics", "samples"}
    assert min(lost.values()) > 0
    assert lines(metrics)[0] == json.loads(first)  # whole lines stay, half a line goes
    found, expected = contents(tmp_path / "run"), contents(whole[0])
    for name in ("metrics", "samples"):
        found.pop(name), expected.pop(name)
    assert found == expected


def test_a_line_that_finds_no_room_leaves_no_half(tmp_path):
    storage = FaultyStorage("full disk", 3)
    journal = Journal(tmp_path, storage)
    journal.write("metrics", {"step": 1})
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: a line could not be written \(No space left"):
        journal.write("metrics", {"step": 2, "text": "x" * 100})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_half_a_line_is_cut_on_resume(tmp_path):
    journal = Journal(tmp_path, Storage())
    journal.write("metrics", {"step": 1})
    state = journal.state_dict()
    journal.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "cut')
    again = Journal(tmp_path, Storage())
    assert again.load_state_dict(state) == {}
    again.write("metrics", {"step": 2})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_clock_jumps_change_nothing(whole, tmp_path, monkeypatch):
    """The wall clock goes back by an hour at every look; durations come from a clock that does not."""
    start, looks = time.time(), []

    def jumping():
        looks.append(1)
        return start - 3600.0 * len(looks)

    monkeypatch.setattr(time, "time", jumping)
    run = run_in(tmp_path / "run")
    assert contents(tmp_path / "run") == contents(whole[0])
    assert 0 < run.elapsed < 60
    assert all(seconds >= 0 for seconds in run.ledger.seconds.values())
    assert all(record["elapsed"] > 0 for record in lines(tmp_path / "run" / "metrics.jsonl"))
