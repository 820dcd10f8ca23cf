"""`mifo paper` with real runs, as small as they get."""

import json
from dataclasses import replace

import pytest

from mifo.lab.paper.plan import Plan
from mifo.lab.paper.run_table import run_rows
from mifo.lab.paper.suite import Options, chosen, run_suite
from mifo.lab.paper.tier import SMOKE
from mifo.report.paper_page import page
from mifo.train.stop import Stop

LEAST = replace(
    SMOKE,
    seeds=1,
    start_updates=2,
    rl_steps=1,
    prompts=8,
    batch=4,
    problems=7,
    pairs=4,
    few_demonstrations=8,
    epochs=(1, 2, 3),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("paper")


def run(folder, names):
    said = []
    options = Options(folder=folder, jobs=2, threads=1)
    found = run_suite(LEAST, chosen(names), options, stop=Stop(), say=said.append)
    return found, said


def test_findings_are_run_measured_and_judged_once(folder):
    names = ["magnitude", "selection", "sft-then-rl"]
    found, said = run(folder, names)
    magnitude, selection, coupling = found
    assert [j.runs for j in found] == [3, 3, 2]  # a finding's runs and those they begin from
    assert not any(j.notes for j in found if "failed" in " ".join(j.notes))
    assert 0.0 < selection.claims[0].measured.value < 1.5
    assert all(claim.measured.value > 0 for claim in coupling.claims)
    assert "| SFT moves the weights further than RL |" in page(LEAST, found)
    rows = run_rows(Plan(tier=LEAST, folder=folder), chosen(names))
    assert [(row["run"], row["after"], row["seed"]) for row in rows[:3]] == [
        ("start", "", 0),
        ("rl", "start", 0),
        ("sft", "start", 0),
    ]
    for row in rows:
        summary = json.loads((folder / "runs" / f"{row['run']}-seed0" / "summary.json").read_text())
        assert (row["accuracy_after"], row["rl_steps"], row["flops"]) == (
            summary["accuracy_after"],
            summary["rl_steps"],
            summary["flops"],
        )
    assert {row["run"] for row in rows} == {path.name.rpartition("-")[0] for path in (folder / "runs").iterdir()}
    assert run_rows(Plan(tier=LEAST, folder=folder / "elsewhere"), chosen(names)) == []
    again, said_again = run(folder, names)
    assert again == found
    assert len(said) > len(said_again) == 2 * len(names)  # nothing but each finding and its verdict
    assert not list(folder.glob("runs/*/export"))
    assert json.loads((folder / "measures" / "norms-start-sft-seed0.json").read_text())["found"]["total"] > 0
    assert magnitude.claims[1].measured is None or magnitude.claims[1].measured.value > 0
