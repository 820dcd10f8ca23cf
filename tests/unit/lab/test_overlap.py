"""Overlap of phases against whole vectors and a sort."""

import math

import pytest
import torch
from lab_models import family_model, moved, save

from mifo.errors import ConfigError, NumericsError
from mifo.lab import source as source_module
from mifo.lab.overlap import overlap
from mifo.lab.source import natural


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Checkpoints of a run of two phases, and their parameters as vectors."""
    folder = tmp_path_factory.mktemp("three")
    models = [family_model("qwen2")]
    for seed, share in ((1, 0.4), (2, 0.9)):
        models.append(moved(models[-1], seed, share=share))
    paths = [save(model, folder / f"m{i}") for i, model in enumerate(models)]
    return paths, [vector(model) for model in models]


def vector(model):
    parts = dict(model.named_parameters())
    return torch.cat([parts[name].detach().double().view(-1) for name in sorted(parts, key=natural)])


def slow_top(change, share):
    """Places of the largest |Δ|, ties to the earlier, never one that did not move."""
    wanted = math.ceil(round(share * len(change), 9))
    order = torch.argsort(change.float().abs(), descending=True, stable=True)[:wanted].tolist()
    return {i for i in order if change[i] != 0}


@pytest.mark.parametrize("top", [0.01, 0.3, 0.7, 1.0])
def test_against_whole_vectors(three, top):
    paths, points = three
    found = overlap(paths, top=top, names=["rl", "sft"])
    rl, sft = points[1] - points[0], points[2] - points[1]
    [pair] = found.pairs
    assert (pair.earlier, pair.later) == ("rl", "sft")
    assert found.elements == len(rl)
    assert pair.cosine == pytest.approx(float(torch.dot(rl, sft) / rl.norm() / sft.norm()), abs=1e-6)
    both = (rl != 0) & (sft != 0)
    assert pair.moved_both == pytest.approx(float(both.float().mean()), abs=1e-6)
    assert pair.sign_agreement == pytest.approx(float((rl.sign() == sft.sign())[both].double().mean()), abs=1e-9)
    first, second = slow_top(rl, top), slow_top(sft, top)
    assert found.phases[0].top == len(first)
    assert pair.kept == pytest.approx(len(first & second) / len(first), abs=1e-12)
    assert pair.churn == pytest.approx(1 - pair.kept)
    places = torch.tensor(sorted(first))
    rl_top, sft_top = rl[places], sft[places]
    assert pair.touched == pytest.approx(float((sft_top != 0).double().mean()), abs=1e-9)
    opposed = (rl_top.sign() != sft_top.sign()) & (sft_top.abs() >= rl_top.abs())
    assert pair.overwritten == pytest.approx(float(opposed.float().mean()), abs=1e-4)
    assert pair.undone == pytest.approx(-float((rl_top * sft_top).sum() / rl_top.square().sum()), abs=1e-6)


def test_blocks_do_not_matter(three, monkeypatch):
    whole = overlap(three[0], top=0.2)
    monkeypatch.setattr(source_module, "BLOCK_ELEMENTS", 100)
    pieces = overlap(three[0], top=0.2)
    assert whole.pairs[0].kept == pieces.pairs[0].kept
    assert whole.pairs[0].overwritten == pieces.pairs[0].overwritten
    assert whole.pairs[0].cosine == pytest.approx(pieces.pairs[0].cosine)


def phases_of(tmp_path, *changes):
    """Checkpoints of a model whose embedding moves by the given vectors on its first elements."""
    model, paths = family_model("llama"), []
    for number in range(len(changes) + 1):
        paths.append(save(model, tmp_path / f"c{number}"))
        if number < len(changes):
            row = model.model.embed_tokens.weight.data.view(-1)
            row[: len(changes[number])] += torch.tensor(changes[number])
    return paths


def test_by_hand(tmp_path):
    """RL moves four elements; SFT takes one back, goes on with one, nudges one back, leaves one."""
    with torch.no_grad():
        paths = phases_of(tmp_path, [4.0, 3.0, 2.0, 1.0], [-4.0, 3.0, -1.0, 0.0])
    [pair] = overlap(paths, top=1.0).pairs
    assert pair.touched == pytest.approx(3 / 4)
    assert pair.overwritten == pytest.approx(1 / 4)
    assert pair.undone == pytest.approx(-(-16 + 9 - 2) / 30, abs=1e-5)
    assert pair.sign_agreement == pytest.approx(1 / 3)
    assert pair.kept == pytest.approx(3 / 4)


def test_a_phase_that_moved_nothing(three):
    found = overlap([three[0][0], three[0][0], three[0][1]])
    [pair] = found.pairs
    assert (pair.cosine, pair.kept, pair.overwritten) == (None, None, None)
    assert found.phases[0].top == 0


def test_every_pair_of_more_phases(three):
    found = overlap([*three[0], three[0][0]])
    assert len(found.pairs) == 3
    last = found.pairs[-1]
    assert last.undone is not None  # back to the start


def test_mistakes(three):
    with pytest.raises(ConfigError, match="two phases need three"):
        overlap(three[0][:2])
    with pytest.raises(ConfigError, match="--top = 0 must be more than 0"):
        overlap(three[0], top=0.0)
    with pytest.raises(ConfigError, match="--names gives 1 names for 2 phases"):
        overlap(three[0], names=["rl"])


def test_weights_that_are_not_finite_are_named(three, tmp_path):
    broken = moved(family_model("qwen2"), 9)
    broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    path = save(broken, tmp_path / "broken")
    with pytest.raises(
        NumericsError, match=r"up_proj\.weight changes by numbers that are not finite from .* to '.*broken'"
    ):
        overlap([three[0][0], path, three[0][2]])


def test_phases_need_names_of_their_own(three):
    with pytest.raises(ConfigError, match="give every phase a name of its own"):
        overlap(three[0], names=["SFT", "SFT"])
