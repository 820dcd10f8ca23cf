"""The example of a plain PyTorch loop runs, freezes and learns."""

import re
import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_loop.py"


def test_the_example_runs(capsys):
    runpy.run_path(str(EXAMPLE))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    losses = [float(re.search(r"loss ([\d.]+)", line)[1]) for line in lines]
    assert all("50% frozen" in line for line in lines)
    assert min(losses[3:]) < losses[0]
