"""What others do to a run folder while a run holds it."""

import json

import pytest

from mifo.errors import CheckpointError
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
