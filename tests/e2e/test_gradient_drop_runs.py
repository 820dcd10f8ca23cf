"""A run with online gradient drop repeats in the same bits, resumes in them, and differs from one without."""

from conftest_e2e import cut_back, run_small, small_config
from test_resume import assert_same, digest

DROP = {
    "train": {"gradient_drop": 0.5, "steps": 3},
    "data": {"evaluation": "none"},
    "evaluation": {"around_sft": False},
}


def test_same_bits_after_a_resume(tmp_path):
    config = small_config(**DROP)
    whole = run_small(config, tmp_path / "whole")
    for iteration in (1, 2):
        cut_back(tmp_path / "whole", tmp_path / f"cut{iteration}", iteration)
        assert_same(whole, run_small(config, tmp_path / f"cut{iteration}", resume=True))
    plain = run_small(small_config(**DROP | {"train": {"steps": 3}}), tmp_path / "plain")
    assert digest(plain)[0] != digest(whole)[0]
