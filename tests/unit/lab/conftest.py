"""Pairs of checkpoints, and a file of demonstrations."""

import json

import pytest
from lab_models import family_model, moved, save


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory):
    """A JSONL file with twelve short demonstrations."""
    rows = [
        {
            "id": f"p{i}",
            "problem": f"{i}+{i + 1}?",
            "answer": str(2 * i + 1),
            "demonstration": f"{i}+{i + 1}={2 * i + 1}.",
        }
        for i in range(12)
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """(base, over): folders of a random model and of the same after some training, the second in several shards."""
    folder = tmp_path_factory.mktemp("checkpoints")
    base = family_model("qwen2")
    return save(base, folder / "base"), save(moved(base, 1), folder / "over", max_shard_size="40KB")
