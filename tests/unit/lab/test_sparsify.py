"""Post-hoc pruning of a change, scored: ends are the two checkpoints, masks are shared, scores have intervals."""

import json

import pytest
import torch
from lab_models import family_model, moved, save

from mifo.core.surgery import keep_mask
from mifo.errors import ConfigError
from mifo.lab import sparsify as sparsify_module
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


def test_what_is_scored_is_the_pruned_model(folders, problems, monkeypatch):
    models, paths = folders
    seen = []

    def measure(engine, problems, **_):
        seen.append({name: p.detach().clone() for name, p in engine.named_parameters()})
        half = Interval(value=0.5, low=0.2, high=0.8, count=len(problems))
        return Score(accuracy=half, response_length=3, truncated=0, verdicts={}, by_source={}, by_problem={}, seconds=0)

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
