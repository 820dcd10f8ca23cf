"""Same seed, same bits; and a run that was killed anywhere and resumed ends in the same bits."""

import dataclasses

import pytest
from conftest_e2e import cut_back, journal, replaced, run_small, small_config, without_times

from mifo.errors import CheckpointError
from mifo.train.checkpoint import list_checkpoints


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
    assert len(list_checkpoints(folder / "checkpoints")) == len(phases)


def test_same_seed_same_bits(finished, tmp_path):
    folder, run = finished
    again = run_small(small_config(), tmp_path / "again")
    assert_same(run, again)
    for stream in ("metrics", "samples", "events"):
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
        for stream in ("metrics", "samples"):
            assert journal(target, stream) == journal(folder, stream), iteration


def test_a_resumed_run_may_go_on_longer(finished, tmp_path):
    folder, _ = finished
    longer = run_small(small_config(train={"steps": 8}), tmp_path / "longer")
    cut_back(folder, tmp_path / "cut", 4)
    resumed = run_small(small_config(train={"steps": 8}), tmp_path / "cut", resume=True)
    assert_same(longer, resumed)


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
    with pytest.raises(CheckpointError, match="no checkpoint"):
        run_small(small_config(), tmp_path / "empty", resume=True)


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_incomplete_checkpoints_are_named(finished, tmp_path, damage):
    cut_back(finished[0], tmp_path / "cut", 2)
    file = tmp_path / "cut" / "checkpoints" / "step-000002" / "rl.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"rl\.safetensors"):
        run_small(small_config(), tmp_path / "cut", resume=True)


@pytest.mark.parametrize(
    "name", ["config.json", "checkpoints/step-000002/MANIFEST.json", "checkpoints/step-000002/state.json"]
)
def test_damaged_json_is_named(finished, tmp_path, name):
    cut_back(finished[0], tmp_path / "cut", 2)
    file = tmp_path / "cut" / name
    file.write_bytes(b"\x00" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged"):
        run_small(small_config(), tmp_path / "cut", resume=True)


def test_a_damaged_header_of_the_same_size_is_named(finished, tmp_path):
    cut_back(finished[0], tmp_path / "cut", 2)
    file = tmp_path / "cut" / "checkpoints" / "step-000002" / "rl.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = b"?" * 32
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rl\.safetensors is damaged"):
        run_small(small_config(), tmp_path / "cut", resume=True)


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
    """A stop that is asked for ends the turn under way, saves it, and loses nothing."""
    folder = tmp_path / "run"
    config = small_config(run={"checkpoint_steps": "none"})

    def interrupt(run):
        record = run.record

        def count(*arguments):
            record(*arguments)
            run.interrupted = run.iterations == 5

        run.record = count

    stopped = run_small(config, folder, before=interrupt)
    assert stopped.iterations == 5
    assert stopped.scores.keys() == {"before"}
    assert_same(finished[1], run_small(config, folder, resume=True))
