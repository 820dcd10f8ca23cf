"""A probe that trains, from the command line with its real runs: begun from an export, and not repeated."""

import csv
import json

from mifo.cli import main
from mifo.lab.trials import read_trial


def test_forgetting_trains_from_an_export_and_is_not_repeated(tmp_path, capsys):
    command = ["probe", "forgetting", "--recipe", "tiny", "--objectives", "mifo", "--seeds", "1", "--rl-steps", "1"]
    command += ["--steps", "2", "--batch-size", "4", "--out", str(tmp_path)]
    assert main(command) == 0
    runs = tmp_path / "forgetting-runs" / "runs"
    first, after = read_trial(runs / "rl-first-seed0"), read_trial(runs / "mifo-seed0")
    assert after.config.model.path == str(runs / "rl-first-seed0" / "export")
    assert after.before.by_problem == first.after.by_problem  # the same weights
    assert len(after.updates) == 2
    assert not (runs / "rl-first-seed0" / "export").exists()  # nothing needs it any more
    record = json.loads((tmp_path / "forgetting.json").read_text())
    assert record["rl"][0]["mixed_groups"] == 0.0  # a random model
    assert "RL had no signal" in record["notes"][0]
    with (tmp_path / "forgetting.csv").open(newline="") as file:
        assert [row["objective"] for row in csv.DictReader(file)] == ["mifo"]
    written = (runs / "mifo-seed0" / "summary.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main(command) == 0
    assert "2 of 2 runs are finished already" in capsys.readouterr().out
    assert (runs / "mifo-seed0" / "summary.json").stat().st_mtime_ns == written
