"""The weights that a run keeps where its phases end, and what `overlap` makes of them."""

import shutil

import pytest
import torch
from conftest_e2e import cut_back, replaced, run_small
from safetensors.torch import load_file
from test_phase_runs import config_of

from mifo.errors import ConfigError
from mifo.lab.overlap import overlap
from mifo.train.checkpoint import read_json
from mifo.train.kept_phases import kept_phases
from mifo.train.model import tiny_model


def config(**run):
    return replaced(config_of("controlled"), "run", keep_phases=True, **run)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """(folder, what was there as each phase ended: its weights, and the masks that the next one begins with)."""
    folder, seen = tmp_path_factory.mktemp("kept") / "run", []

    def watch(run):
        inner = run.enter

        def enter(phase):
            changes = phase.name != run.phase
            inner(phase)
            if changes:
                masks = [run.importance.mask(i).clone() for i in range(len(run.importance.parameters))]
                weights = [p.detach().clone() for p in run.learner.parameters]
                seen.append((weights, masks if phase.name == "sft" else None))

        run.enter = enter

    run = run_small(config(), folder, before=watch)
    seen.append(([p.detach().clone() for p in run.learner.parameters], None))
    return folder, seen


def test_every_end_of_a_phase_is_there_with_its_mask(kept):
    folder, seen = kept
    paths = kept_phases(folder)
    phases = [read_json(path / "state.json")["phase"] for path in paths]
    assert phases[0] == "start"
    assert phases[1:3] == ["rl", "sft"]
    assert phases.count("sft") >= 2
    assert len(paths) == len(seen)
    names = [name for name, p in tiny_model(seed=0).named_parameters() if p.requires_grad]
    start = dict(tiny_model(seed=0).named_parameters())
    stored = [load_file(path / "model.safetensors") for path in paths]
    assert all(torch.equal(stored[0][name], start[name]) for name in names)
    for path, tensors, (weights, masks) in zip(paths, stored, seen, strict=True):
        assert all(torch.equal(tensors[name], weight) for name, weight in zip(names, weights, strict=True))
        assert (path / "mask.safetensors").is_file() == (masks is not None)
        if masks is not None:
            held = load_file(path / "mask.safetensors")
            assert all(torch.equal(held[name], mask) for name, mask in zip(names, masks, strict=True))
    assert not list(folder.glob("phases/*/*optimizer*"))


def test_overlap_of_a_run_is_that_of_its_phases(kept):
    folder, seen = kept
    paths = [str(path) for path in kept_phases(folder)]
    whole = overlap([str(folder)])
    assert whole.pairs[0].earlier == "rl 1"
    assert [phase.name for phase in whole.phases][:3] == ["rl 1", "sft 1", "rl 2"]
    assert whole.pairs == overlap(paths, names=[phase.name for phase in whole.phases]).pairs
    [first] = [pair for pair in whole.pairs if (pair.earlier, pair.later) == ("rl 1", "sft 1")]
    assert first.touched == 0.0  # MIFO froze the half that RL moved most, and nothing before it
    masks = [torch.cat([m.view(-1) for m in own]) for _, own in seen if own is not None]
    assert len(whole.masks) == len(masks) - 1 >= 1
    for churn, before, after in zip(whole.masks, masks, masks[1:], strict=False):
        assert churn.frozen_earlier == pytest.approx(float(before.double().mean()))
        assert churn.frozen_later == pytest.approx(float(after.double().mean()))
        assert churn.kept == pytest.approx(float((before & after).sum() / before.sum()))
        assert churn.churn == pytest.approx(1 - churn.kept)


def test_a_resumed_run_keeps_the_same(kept, tmp_path):
    folder, _ = kept
    cut_back(folder, tmp_path / "cut", 3)
    for path in kept_phases(folder)[:-1]:  # among them some of after the checkpoint: they are made again, and not twice
        shutil.copytree(path, tmp_path / "cut" / "phases" / path.name)
    run_small(config(), tmp_path / "cut", resume=True)
    paths = kept_phases(tmp_path / "cut")
    assert [path.name for path in paths] == [path.name for path in kept_phases(folder)]
    for mine, theirs in zip(paths, kept_phases(folder), strict=True):
        for file in ("model.safetensors", "mask.safetensors"):
            if (theirs / file).is_file():
                assert (mine / file).read_bytes() == (theirs / file).read_bytes()


def test_a_run_that_keeps_none_is_told_how(kept, tmp_path):
    run_small(replaced(config_of("controlled"), "run", checkpoint_steps=None), tmp_path / "run")
    assert not (tmp_path / "run" / "phases").exists()
    with pytest.raises(ConfigError, match=r"--run\.keep-phases"):
        overlap([str(tmp_path / "run")])
