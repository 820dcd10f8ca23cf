"""What others do to a run folder while a run holds it."""

import json
import os

import pytest

from mifo.errors import CheckpointError
from mifo.train import journal as journal_module
from mifo.train.journal import Journal
from mifo.train.lock import LOCK, FolderLock
from mifo.train.storage import Storage


def test_a_deleted_lock_file_does_not_open_the_folder(tmp_path):
    with FolderLock(tmp_path / "run"):
        (tmp_path / "run" / LOCK).unlink()
        with pytest.raises(CheckpointError, match="is in use by another process"), FolderLock(tmp_path / "run"):
            pass
        with pytest.raises(CheckpointError, match="is in use by"), FolderLock(tmp_path / "run"):
            pass
    with FolderLock(tmp_path / "run"):
        pass


def test_a_log_that_is_emptied_under_way_is_said(tmp_path):
    journal = Journal(tmp_path, Storage())
    journal.write("metrics", {"step": 1})
    journal.write("metrics", {"step": 2})
    lost = journal.paths["metrics"].stat().st_size
    assert journal.take_lost() == {}
    with journal.paths["metrics"].open("w"):
        pass
    journal.write("metrics", {"step": 3})
    assert journal.take_lost() == {"metrics": lost}
    assert journal.take_lost() == {}
    journal.write("metrics", {"step": 4})
    assert journal.take_lost() == {}
    lines = journal.paths["metrics"].read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 4]
    journal.close()


@pytest.fixture
def elsewhere(tmp_path):
    """A file of somebody else's, which must keep every byte."""
    path = tmp_path / "elsewhere"
    path.write_text("mine\n")
    yield path
    assert path.read_text() == "mine\n"


@pytest.mark.parametrize("dangling", [False, True])
def test_a_log_that_is_a_link_is_refused_and_not_written_through(tmp_path, elsewhere, dangling):
    journal = Journal(tmp_path, Storage())
    journal.paths["samples"].symlink_to(tmp_path / "nowhere" if dangling else elsewhere)
    with pytest.raises(
        CheckpointError, match=r"samples.jsonl cannot be opened (.|\n)*is a symbolic link(.|\n)*remove the link"
    ):
        journal.load_state_dict({"samples": 2})
    with pytest.raises(CheckpointError, match=r"samples.jsonl: a line could not be written(.|\n)*is a symbolic link"):
        journal.write("samples", {"step": 1})
    journal.close()
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("to_itself", [False, True])
def test_a_link_that_takes_the_place_of_a_log_under_way_is_replaced(tmp_path, elsewhere, to_itself):
    journal = Journal(tmp_path, Storage())
    path = journal.paths["metrics"]
    journal.write("metrics", {"step": 1})
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved" if to_itself else elsewhere)
    journal.write("metrics", {"step": 2})
    journal.close()
    assert not path.is_symlink()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_lock_that_is_a_link_is_refused_and_not_written_through(tmp_path, elsewhere):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=r"run\.lock is a symbolic link"), FolderLock(tmp_path / "run"):
        pass


def test_logs_longer_than_one_read_are_put_back_and_cut_at_a_line(tmp_path, monkeypatch):
    """Linux gives at most 2 GiB in one call; here a read gives 7 bytes."""
    read = os.pread
    monkeypatch.setattr(journal_module, "BLOCK", 10)
    monkeypatch.setattr(os, "pread", lambda file, size, start: read(file, min(size, 7), start))
    journal = Journal(tmp_path, Storage())
    path = journal.paths["metrics"]
    for step in range(20):
        journal.write("metrics", {"step": step})
    whole = path.read_bytes()
    path.unlink()
    journal.write("metrics", {"step": 20})
    journal.close()
    assert path.read_bytes() == whole + b'{"step": 20}\n'
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        kept = whole[:end].rfind(b"\n") + 1
        missing = journal.load_state_dict({"metrics": len(whole)})
        assert path.read_bytes() == whole[:kept]
        assert missing == ({"metrics": len(whole) - kept} if kept < len(whole) else {})
