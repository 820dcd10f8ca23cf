"""Figures of a small MIFO run, update by update. A change that should not change numbers leaves them; one that should
writes them anew (`python tests/golden/test_golden.py`) and says why."""

import json
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from conftest_e2e import journal, run_small, small_config

GOLDEN = Path(__file__).parent / "small_mifo.json"


def figures(folder):
    run_small(small_config(run={"checkpoint_steps": "none"}), folder)
    return [
        {
            "phase": record["phase"],
            "buffer": record["buffer"],
            "accuracy": record.get("accuracy"),
            "updates": [
                {name: update[name] for name in ("loss", "grad_norm", "entropy", "tokens", "learning_rate")}
                for update in record["updates"]
            ],
        }
        for record in journal(folder, "metrics")
    ]


def test_figures_are_those_recorded(tmp_path):
    stored, found = json.loads(GOLDEN.read_text()), figures(tmp_path / "run")
    assert [r["phase"] for r in found] == [r["phase"] for r in stored]
    for mine, theirs in zip(found, stored, strict=True):
        assert (mine["buffer"], mine["accuracy"]) == (theirs["buffer"], theirs["accuracy"])
        for a, b in zip(mine["updates"], theirs["updates"], strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        GOLDEN.write_text(json.dumps(figures(Path(name) / "run"), indent=1) + "\n")
