"""Post-hoc pruning of a change, scored: ends are the two checkpoints, masks are shared, scores have intervals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lab_models import family_model, moved, save

from mifo.config.schema import Config, DataConfig
from mifo.core.surgery import keep_mask
from mifo.data import tasks
from mifo.errors import ConfigError
from mifo.lab import sparsify as sparsify_module
from mifo.lab.arena_statistics import interval
from mifo.lab.samples import PairSettings, _data_config
from mifo.lab.source import Source
from mifo.lab.sparsify import SparsifySettings, sparsify
from mifo.types import Interval, Score


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparsify")
    base = family_model("qwen2")
    models = [base, moved(base, 1), moved(base, 2)]
    return models, [save(model, folder / name) for model, name in zip(models, ("start", "sft", "rl"), strict=True)]


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "test.jsonl"
    path.write_text("\n".join(json.dumps({"problem": f"{i}+1?", "answer": str(i + 1)}) for i in range(6)))
    return str(path)


def scored(shares):
    half = Interval(value=sum(shares) / len(shares), low=0.2, high=0.8, count=len(shares))
    solved = {f"p{i}": share for i, share in enumerate(shares)}
    return Score(accuracy=half, response_length=3, truncated=0, verdicts={}, by_source={}, by_problem=solved, seconds=0)


def test_what_was_lost_is_paired_by_mask_and_problem(folders, problems, monkeypatch):
    """SFT solves all six and loses none, one and two of them under three masks; RL, of four, loses four each time."""
    sft = [[1] * 6, [1] * 6, [0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0] * 6]
    rl = [[1, 1, 1, 1, 0, 0], *([[0] * 6] * 4)]
    given = iter([*sft, *rl])
    monkeypatch.setattr(sparsify_module, "evaluate", lambda *_, **__: scored(next(given)))
    monkeypatch.setattr(sparsify_module, "build_engine", lambda model, *_: model)
    done = sparsify(folders[1][0], folders[1][1:], SparsifySettings(rates=(0.5,), masks=3, data=problems, max_tokens=4))
    of_sft, of_rl, more = done.drops
    assert [(drop.model, drop.than) for drop in done.drops] == [("sft", None), ("rl", None), ("rl", "sft")]
    assert of_sft.lost.value == pytest.approx((0 + 1 + 2) / 18)
    assert of_rl.lost.value == pytest.approx(4 / 6)
    assert more.lost.value == pytest.approx(4 / 6 - 3 / 18)
    assert (more.lost.seeds, more.lost.problems) == (3, 6)
    assert of_sft.lost.low < 0 < of_sft.lost.high  # three masks that differ so much say little
    table = [[0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
    expected = interval(np.array(table, dtype=float))
    assert (of_sft.lost.low, of_sft.lost.high) == pytest.approx((expected.low, expected.high))


def test_embedded_problems_are_as_many_as_the_run_s_families_have(folders):
    """The default of 200 is more than there are of some; what is measured on are the families that the run trained on."""
    run = Config(data=DataConfig(families=("tiny",)))
    source = Source(given="x", field="MODEL", folder=Path(folders[1][0]), run=run, checkpoint=False)
    data = sparsify_module._config(source, SparsifySettings()).data
    assert data.families == ("tiny",)
    assert data.evaluation_problems == tasks.available("test", families=("tiny",)) < 200
    assert _data_config(source, PairSettings(count=5000)).data.families == ("tiny",)
    assert _data_config(source, PairSettings(count=5000)).data.train_problems == tasks.available(
        "train", families=("tiny",)
    )


def test_what_is_scored_is_the_pruned_model(folders, problems, monkeypatch):
    models, paths = folders
    seen = []

    def measure(engine, problems, **_):
        seen.append({name: p.detach().clone() for name, p in engine.named_parameters()})
        return scored([0.5] * len(problems))

    monkeypatch.setattr(sparsify_module, "evaluate", measure)
    monkeypatch.setattr(sparsify_module, "build_engine", lambda model, *_: model)
    settings = SparsifySettings(rates=(0.5,), masks=2, seed=3, data=problems, max_tokens=4)
    done = sparsify(paths[0], paths[1:], settings)
    assert [(s.model, s.rate, s.mask) for s in done.scores] == [
        (name, rate, mask) for name in ("sft", "rl") for rate, mask in ((0.0, 0), (0.5, 0), (0.5, 1), (1.0, 0))
    ]
    start, *ends = (dict(model.named_parameters()) for model in models)
    for end, rows in zip(ends, (seen[:4], seen[4:]), strict=True):
        for name in start:
            assert torch.equal(rows[0][name], end[name])
            assert torch.equal(rows[3][name], start[name])
            for mask, row in enumerate(rows[1:3]):
                keep = keep_mask(start[name].shape, 0.5, seed=3, step=mask, name=f"0.5/{name}")
                assert torch.equal(row[name], torch.where(keep, end[name], start[name]))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(seen[1][name], seen[2][name])  # another mask


def test_scores_with_intervals(folders, problems):
    _, paths = folders
    done = sparsify(paths[0], paths[1:2], SparsifySettings(rates=(0.9, 0.1), masks=1, data=problems, max_tokens=4))
    assert [s.rate for s in done.scores] == [0.0, 0.1, 0.9, 1.0]
    for score in done.scores:
        assert score.problems == 6
        assert 0 <= score.low <= score.accuracy <= score.high <= 1
    assert [point[0] for point in done.curve("sft")] == [0.0, 0.1, 0.9, 1.0]


def test_mistakes(folders):
    _, paths = folders
    with pytest.raises(ConfigError, match="each must be more than 0 and less than 1"):
        sparsify(paths[0], paths[1:], SparsifySettings(rates=(0.5, 1.0)))
    with pytest.raises(ConfigError, match="--masks = 0"):
        sparsify(paths[0], paths[1:], SparsifySettings(masks=0))


def test_scores_that_never_differ_do_not_make_a_certainty(folders, problems, monkeypatch):
    monkeypatch.setattr(sparsify_module, "evaluate", lambda *_, **__: scored([1, 0, 1, 0, 1, 0]))
    monkeypatch.setattr(sparsify_module, "build_engine", lambda model, *_: model)
    done = sparsify(folders[1][0], folders[1][1:], SparsifySettings(rates=(0.5,), masks=2, data=problems, max_tokens=4))
    for drop in done.drops:
        assert drop.lost.value == 0.0
        assert drop.lost.low < -0.3 < 0.3 < drop.lost.high  # six problems
    assert done.drops[2].lost.high == pytest.approx(2 * done.drops[0].lost.high)  # a difference of two differences


def test_counts_below_one(folders):
    for limit in (0, -3):
        with pytest.raises(ConfigError, match=f"--limit = {limit} must be at least 1"):
            sparsify(folders[1][0], folders[1][1:], SparsifySettings(limit=limit))
