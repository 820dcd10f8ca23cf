"""Every operation of a save goes wrong in every way: what was committed stands, and the next save works."""

import contextlib
import errno
import itertools
import json
import os
import random
import shutil

import pytest
import torch
from fault_storage import FAULTS, OPERATIONS, FaultyStorage, KilledError
from safetensors.torch import load_file, save_file

from mifo.errors import CheckpointError
from mifo.train.checkpoint import (
    Checkpoints,
    Retention,
    Snapshot,
    gathered,
    list_checkpoints,
    load_checkpoint,
    tensor_chunks,
)
from mifo.train.manifest import MANIFEST, Manifest, read_manifest
from mifo.train.storage import Storage
from mifo.train.writer import CheckpointWriter

FLIPS = int(os.environ.get("MIFO_FLIPS", "1000"))


def snapshot(step):
    """A small state in which every value tells the step."""
    torch.manual_seed(step)
    tensors = {
        "model": {"weight": torch.randn(3, 5), "bias": torch.full((5,), float(step))},
        "rl": {"0.exp_avg": torch.randn(7), "0.step": torch.tensor(float(step))},
        "sft": {},
        "importance": {"importance.0": torch.rand(15), "frozen_zeros.0": torch.rand(15) > 0.5},
    }
    return Snapshot(tensors, {"steps": step, "phase": "rl", "seen": [f"p{i}" for i in range(step)]})


def opened(folder, storage=None, **changes):
    settings = {"retention": Retention(newest=2), "code": {"mifo": "0"}, "settings": "s"} | changes
    return Checkpoints(folder / "checkpoints", storage=storage or Storage(), **settings)


def same(loaded, expected):
    assert loaded.state == expected.state
    assert {g: sorted(m) for g, m in loaded.tensors.items()} == {g: sorted(m) for g, m in expected.tensors.items()}
    for group, members in expected.tensors.items():
        for name, tensor in members.items():
            assert torch.equal(loaded.tensors[group][name], tensor)
            assert loaded.tensors[group][name].dtype == tensor.dtype


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """Two committed checkpoints; the third save drops the first."""
    folder = tmp_path_factory.mktemp("before")
    for step in (1, 2):
        opened(folder).save(step, snapshot(step))
    return folder


def operations_of_a_save(before, tmp_path):
    shutil.copytree(before, tmp_path / "count")
    storage = FaultyStorage()
    opened(tmp_path / "count", storage).save(3, snapshot(3))
    return storage.log


def test_a_save_syncs_all_it_wrote_before_the_rename(before, tmp_path):
    log = operations_of_a_save(before, tmp_path)
    names = [name for name, _ in log]
    rename = next(i for i, (name, target) in enumerate(log) if name == "rename" and target.name == "step-000003")
    created = [path for name, path in log[:rename] if name == "create"]
    synced = [path for name, path in log[:rename] if name == "sync"]
    assert created == synced
    assert created[-1].name == MANIFEST
    assert log[rename - 1][0] == "sync_folder"
    assert log[rename - 1][1] == created[-1].parent
    assert log[rename + 1] == ("sync_folder", tmp_path / "count" / "checkpoints")
    assert {"remove_tree", "write", "close", "make_folder"} <= set(names) <= set(OPERATIONS)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_operation_of_a_save_fails_once(before, tmp_path, fault):
    count = len(operations_of_a_save(before, tmp_path))
    assert count > 30
    for at in range(1, count + 1):
        folder = tmp_path / f"{at}"
        shutil.copytree(before, folder)
        storage, outcome = FaultyStorage(fault, at, seed=at), None
        try:
            opened(folder, storage).save(3, snapshot(3))
        except (CheckpointError, KilledError) as error:
            outcome = error
        if isinstance(outcome, CheckpointError):
            assert "turn 3 could not be written" in str(outcome)
            assert "--resume" in str(outcome)
        path, refused = opened(folder).newest_good(verify=True)
        assert refused == [], (at, storage.log[-1])
        assert path.name in ("step-000002", "step-000003")
        if outcome is None:
            assert path.name == "step-000003"
        same(load_checkpoint(path), snapshot(int(path.name[-6:])))
        opened(folder).save(4, snapshot(4))
        path, refused = opened(folder).newest_good(verify=True)
        assert (path.name, refused) == ("step-000004", [])
        assert all(p.name.startswith("step-") for p in path.parent.iterdir()), (at, storage.log[-1])
        assert len(list_checkpoints(path.parent)) == 2
        shutil.rmtree(folder)


def test_a_short_write_is_continued(before, tmp_path):
    """The harness strikes: half of the bytes of one write were not taken, and the save made them good."""
    log = operations_of_a_save(before, tmp_path)
    first = next(i for i, (name, _) in enumerate(log, 1) if name == "write")
    shutil.copytree(before, tmp_path / "run")
    storage = FaultyStorage("short write", first)
    opened(tmp_path / "run", storage).save(3, snapshot(3))
    assert len(storage.log) == len(log) + 1


def test_unsynced_files_would_be_noticed(before, tmp_path):
    """The power cut cuts: without syncs a committed checkpoint is found damaged, so the syncs are needed."""

    class Hasty(FaultyStorage):
        def sync(self, file):
            self._strikes("sync", None)

    damaged = 0
    for at in range(30, 50):
        folder = tmp_path / f"{at}"
        shutil.copytree(before, folder)
        with contextlib.suppress(KilledError):
            opened(folder, Hasty("power cut", at, seed=at)).save(3, snapshot(3))
        damaged += bool(opened(folder).newest_good(verify=True)[1])
    assert damaged


def test_random_byte_flips_are_refused(before, tmp_path):
    shutil.copytree(before, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-000002"
    files = sorted(folder.iterdir())
    contents = {path: path.read_bytes() for path in files}
    draw, refused = random.Random(0), 0
    for _ in range(FLIPS):
        path = draw.choices(files, [len(contents[p]) for p in files])[0]
        changed = bytearray(contents[path])
        changed[draw.randrange(len(changed))] ^= draw.randrange(1, 256)
        path.write_bytes(changed)
        newest, reasons = opened(tmp_path / "run").newest_good(verify=True)
        assert newest.name == "step-000001"
        assert f"step-000002: {path.name}" in reasons[0]
        refused += 1
        path.write_bytes(contents[path])
    assert refused == FLIPS
    assert opened(tmp_path / "run").newest_good(verify=True)[0] == folder


def _link(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def _rewrite(change):
    """Damage that a hand-made manifest with valid hashes would hide."""

    def damage(folder):
        manifest = read_manifest(folder)
        files = dict(manifest.files)
        change(folder, files)
        made = Manifest(step=manifest.step, files=files, code=manifest.code, settings=manifest.settings)
        (folder / MANIFEST).write_bytes(made.encode())

    return damage


def _outside(name):
    def change(folder, files):
        files[name] = files["state.json"]

    return _rewrite(change)


DAMAGE = {
    "cut short": (lambda f: os.truncate(f / "rl.safetensors", 20), "rl.safetensors has 20 bytes"),
    "empty": (lambda f: os.truncate(f / "state.json", 0), "state.json has 0 bytes"),
    "missing": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "MANIFEST.json is missing"),
    "empty manifest": (lambda f: os.truncate(f / MANIFEST, 0), "MANIFEST.json is damaged"),
    "manifest cut short": (lambda f: os.truncate(f / MANIFEST, 99), "MANIFEST.json is damaged"),
    "other spelling": (
        lambda f: (f / MANIFEST).write_text(json.dumps(json.loads((f / MANIFEST).read_text()), indent=1)),
        "does not match its own hash",
    ),
    "extra file": (lambda f: (f / "extra.safetensors").write_bytes(b""), "extra.safetensors does not belong"),
    "hidden file": (lambda f: (f / ".x").write_bytes(b""), ".x does not belong"),
    "extra folder": (lambda f: (f / "sub").mkdir(), "sub does not belong"),
    "folder for a file": (lambda f: ((f / "state.json").unlink(), (f / "state.json").mkdir()), "no plain file"),
    "linked file": (lambda f: _link(f / "state.json"), "state.json is no plain file"),
    "pipe for a file": (lambda f: ((f / "state.json").unlink(), os.mkfifo(f / "state.json")), "no plain file"),
    "pipe for the manifest": (lambda f: ((f / MANIFEST).unlink(), os.mkfifo(f / MANIFEST)), "no plain file"),
    "linked manifest": (lambda f: _link(f / MANIFEST), "MANIFEST.json is no plain file"),
    "linked folder": (_link, "no folder"),
    "parent": (_outside("../state.json"), "'../state.json', which is no name"),
    "absolute": (_outside("/etc/passwd"), "'/etc/passwd', which is no name"),
    "nested": (_outside("a/state.json"), "'a/state.json', which is no name"),
    "nul": (_outside("a\0.json"), "which is no name"),
    "deep json": (lambda f: (f / MANIFEST).write_text("[" * 100_000), "MANIFEST.json is damaged"),
    "endless manifest": (lambda f: (f / MANIFEST).write_text("[" + "1," * 600_000 + "1]"), "MANIFEST.json is damaged"),
    "list": (lambda f: (f / MANIFEST).write_text("[]"), "MANIFEST.json is damaged"),
    "other format": (lambda f: (f / MANIFEST).write_text('{"format": 99}'), "format 99; this version reads format 2"),
    "files no table": (lambda f: (f / MANIFEST).write_text('{"format": 2, "files": 3}'), "MANIFEST.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_and_named(before, tmp_path, damage):
    shutil.copytree(before, tmp_path / "run")
    harm, words = DAMAGE[damage]
    harm(tmp_path / "run" / "checkpoints" / "step-000002")
    for verify in (True, False):
        path, (reason,) = opened(tmp_path / "run").newest_good(verify=verify)
        assert path.name == "step-000001"
        assert "step-000002" in reason
        assert words in reason


def test_no_verify_skips_hashes_and_nothing_else(before, tmp_path):
    shutil.copytree(before, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-000002" / "model.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    assert opened(tmp_path / "run").newest_good(verify=True)[0].name == "step-000001"
    assert opened(tmp_path / "run").newest_good(verify=False)[0].name == "step-000002"


def test_a_checkpoint_of_other_settings_is_not_this_run(before, tmp_path):
    with pytest.raises(CheckpointError, match=r"no whole checkpoint(.|\n)*other settings"):
        opened(before, settings="t").newest_good(verify=True)


class ForbiddingStorage(Storage):
    """Rights, which bind no superuser: nothing below `path` may be read, and with `removing` nothing of it removed."""

    def __init__(self, path, number=errno.EACCES, *, removing=False):
        self.path, self.number, self.removing = path, number, removing

    def _check(self, path, wanted):
        if wanted and (self.path == path or self.path in path.parents):
            raise OSError(self.number, os.strerror(self.number), str(path))

    def open_to_read(self, path):
        self._check(path, not self.removing)
        return super().open_to_read(path)

    def names(self, folder):
        self._check(folder, not self.removing)
        return super().names(folder)

    def rename(self, source, target):
        self._check(source, self.removing)
        super().rename(source, target)

    def remove_tree(self, path):
        self._check(path.with_name(path.name.removeprefix("removing-")), self.removing)
        super().remove_tree(path)


@pytest.mark.parametrize("part", ["", "step-000002", "step-000002/MANIFEST.json", "step-000002/rl.safetensors"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EMFILE])
@pytest.mark.parametrize("verify", [True, False])
def test_a_checkpoint_that_may_not_be_read_is_no_damaged_one(before, tmp_path, part, number, verify):
    """It may be whole: to take an older one in its place would lose what lies between, in silence."""
    shutil.copytree(before, tmp_path / "run")
    place = tmp_path / "run" / "checkpoints" / part
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path / "run", ForbiddingStorage(place, number)).newest_good(verify=verify)
    message = str(caught.value)
    assert str(place) in message
    assert os.strerror(number) in message
    assert ("chmod" in message) == (number != errno.EMFILE)
    assert "--resume" in message
    assert "damaged" not in message
    assert "step-000001" not in message
    assert opened(tmp_path / "run").newest_good(verify=verify)[0].name == "step-000002"


def test_a_file_that_the_disk_cannot_read_is_damage(before, tmp_path):
    shutil.copytree(before, tmp_path / "run")
    place = tmp_path / "run" / "checkpoints" / "step-000002" / "rl.safetensors"
    path, (reason,) = opened(tmp_path / "run", ForbiddingStorage(place, errno.EIO)).newest_good(verify=True)
    assert path.name == "step-000001"
    assert "rl.safetensors cannot be read" in reason


@pytest.mark.parametrize("background", [True, False])
def test_an_old_checkpoint_that_cannot_be_removed_is_said_once_and_saves_go_on(before, tmp_path, background):
    shutil.copytree(before, tmp_path / "run")
    old = tmp_path / "run" / "checkpoints" / "step-000001"
    checkpoints = opened(tmp_path / "run", ForbiddingStorage(old, removing=True))
    writer = CheckpointWriter(checkpoints, background=background)
    for step in (3, 4):
        writer.save(step, snapshot(step))
        writer.wait()
    assert writer.poll() == [3, 4]
    assert checkpoints.take_not_removed() == [(old, f"Permission denied ({old})")]
    assert checkpoints.take_not_removed() == []
    assert [p.name for p in checkpoints.list()] == ["step-000001", "step-000003", "step-000004"]
    opened(tmp_path / "run").save(5, snapshot(5))  # once the rights are there again
    assert [p.name for p in checkpoints.list()] == ["step-000004", "step-000005"]


def test_a_checkpoint_half_removed_is_not_in_the_way(before, tmp_path):
    """Its name is gone, its files are not."""
    shutil.copytree(before, tmp_path / "run")
    count = [name for name, _ in operations_of_a_save(before, tmp_path)].index("remove_tree") + 1
    storage = FaultyStorage("EIO", count)
    checkpoints = opened(tmp_path / "run", storage)
    checkpoints.save(3, snapshot(3))
    ((path, reason),) = checkpoints.take_not_removed()
    assert path.name == "removing-step-000001"
    assert reason == "Input/output error"
    checkpoints.save(4, snapshot(4))
    assert sorted(p.name for p in path.parent.iterdir()) == ["step-000003", "step-000004"]


def test_retention(tmp_path):
    checkpoints = opened(tmp_path, retention=Retention(newest=2, every=4))
    for step in range(1, 11):
        checkpoints.save(step, snapshot(step))
    assert [p.name for p in checkpoints.list()] == ["step-000004", "step-000008", "step-000009", "step-000010"]


def test_a_bad_checkpoint_does_not_push_out_a_good_one(before, tmp_path):
    shutil.copytree(before, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-000002" / "state.json").unlink()
    checkpoints = opened(tmp_path / "run")
    checkpoints.newest_good(verify=True)
    checkpoints.save(2, snapshot(2))
    names = [p.name for p in checkpoints.list()]
    assert names == ["step-000001", "step-000002", "step-000002.1"]
    checkpoints.save(3, snapshot(3))
    assert [p.name for p in checkpoints.list()] == ["step-000002.1", "step-000003"]


def test_files_are_safetensors_as_the_library_writes_them(tmp_path):
    tensors = {
        "a": torch.randn(3, 4, dtype=torch.bfloat16), "b": torch.arange(5), "c": torch.tensor(1.5), "d": torch.empty(0, 3),
        "e": torch.rand(4) > 0.5, "f": torch.randn(6, 2).t(), "g": torch.randn(3, dtype=torch.float64),
        "h": torch.zeros(2, dtype=torch.uint8),
    }  # fmt: skip
    (tmp_path / "ours").write_bytes(b"".join(bytes(chunk) for chunk in tensor_chunks(tensors)))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    read = load_file(tmp_path / "ours")
    assert read.keys() == tensors.keys()
    assert b"".join(map(bytes, gathered(tensor_chunks(tensors)))) == (tmp_path / "ours").read_bytes()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size


class SlowStorage(Storage):
    """Writes that wait until they may go on."""

    def __init__(self, gate):
        self.gate = gate

    def create(self, path):
        assert self.gate.wait(10)
        return super().create(path)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    """The copy is taken at once: what changes while the disk is slow is not in it."""
    import threading

    gate = threading.Event()
    writer = CheckpointWriter(opened(tmp_path, SlowStorage(gate)), background=True)
    state = snapshot(1)
    writer.save(1, state)
    for tensor in state.tensors["model"].values():
        tensor.zero_()
    state.state["seen"].append("later")
    assert writer.poll() == []
    gate.set()
    writer.wait()
    assert writer.poll() == [1]
    same(load_checkpoint(opened(tmp_path).newest_good(verify=True)[0]), snapshot(1))


def test_at_most_one_write_is_in_flight(tmp_path):
    writer = CheckpointWriter(opened(tmp_path), background=True)
    for step in range(1, 6):
        writer.save(step, snapshot(step))
        assert len(list((tmp_path / "checkpoints").glob("writing-*"))) <= 1
    writer.wait()
    assert writer.poll() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("then", ["poll", "save", "wait"])
def test_an_error_of_the_writer_comes_up_in_training(tmp_path, then):
    writer = CheckpointWriter(opened(tmp_path, FaultyStorage("ENOSPC", 9)), background=True)
    writer.save(1, snapshot(1))
    writer._thread.join()
    with pytest.raises(CheckpointError, match="No space left on device"):
        {"poll": writer.poll, "save": lambda: writer.save(2, snapshot(2)), "wait": writer.wait}[then]()


def test_in_the_foreground_a_save_is_committed_when_it_returns(tmp_path):
    writer = CheckpointWriter(opened(tmp_path), background=False)
    writer.save(1, snapshot(1))
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step-000001"]


def test_gathering_keeps_bytes_and_order(monkeypatch):
    monkeypatch.setattr("mifo.train.checkpoint.SMALL", 10)
    draw = random.Random(0)
    for _ in range(200):
        chunks = [draw.randbytes(draw.randrange(16)) for _ in range(draw.randrange(12))]
        pieces = list(gathered(iter(chunks)))
        assert b"".join(pieces) == b"".join(chunks)
        assert all(pieces)
        assert all(len(a) >= 10 or len(b) >= 10 for a, b in itertools.pairwise(pieces))


def test_a_thread_that_cannot_be_had_is_said_and_nothing_is_in_flight(tmp_path, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    writer = CheckpointWriter(opened(tmp_path), background=True)
    with monkeypatch.context() as patched:
        patched.setattr("threading.Thread.start", refuse)
        with pytest.raises(CheckpointError, match="no thread could be started"):
            writer.save(1, snapshot(1))
    writer.wait()
    writer.save(2, snapshot(2))
    writer.wait()
    assert writer.poll() == [2]


def test_a_checkpoint_under_another_name_is_refused(tmp_path):
    """A copy under a higher number would outrank what came after it, and retention would drop that."""
    checkpoints = opened(tmp_path)
    checkpoints.save(7, snapshot(7))
    shutil.copytree(tmp_path / "checkpoints" / "step-000007", tmp_path / "checkpoints" / "step-000900")
    newest, refused = opened(tmp_path).newest_good(verify=True)
    assert newest.name == "step-000007"
    assert len(refused) == 1
    assert "step-000900: its manifest is of turn 7" in refused[0]
