"""Runs on data of one's own load the grading libraries beside the model; embedded problems hardly ever need them."""

import json

import pytest
from conftest_e2e import replaced, run_small, small_config

from mifo.rewards.grade import Grader


@pytest.mark.parametrize("own", [True, False])
def test_workers_start_ahead_where_answers_may_need_them(tmp_path, monkeypatch, own):
    warmed = []
    monkeypatch.setattr(Grader, "warm_up", lambda grader: warmed.append(grader))
    config = replaced(small_config(), "train", steps=1)
    if own:
        rows = [{"problem": f"copy {n}", "answer": str(n), "demonstration": f"\\boxed{{{n}}}"} for n in range(10, 22)]
        file = tmp_path / "problems.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = replaced(config, "data", train=str(file), evaluation="none", families=(), train_problems=None)
    run_small(config, tmp_path / "run")
    assert len(warmed) == own
