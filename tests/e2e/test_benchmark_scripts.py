"""The benchmark that drives a run's own parts still measures work that is done; no figure of it is judged here."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "freeze_overhead.py"


def test_the_freeze_benchmark_measures_an_interval(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--recipe", "tiny", "--repeats", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == result
    assert 0 < result["ratio"] < 1
    assert result["frozen_fraction"] > 0
    parts = result["seconds"]["cpu"]["64"]
    assert parts["interval"] > parts["rl_step"] + parts["sft_64"] + parts["meter"] > 0
