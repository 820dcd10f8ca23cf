"""Sets of runs in a folder: order, exports, what is repeated. The trainer here is a script that only writes files."""

import json
import os
import sys
from dataclasses import replace

import pytest

from mifo.config.load import load_config
from mifo.errors import CheckpointError, ConfigError
from mifo.lab.arena_statistics import paired_difference
from mifo.lab.trials import Trial, read_trial, run_trials, scores
from mifo.train.stop import Stop

# Leaves what a finished run leaves, notes how it was called, and fails where a file says so.
TRAINER = """
import json, os, sys, time
from pathlib import Path
from mifo.config.decode import decode, encode
from mifo.config.load import read_toml
from mifo.config.schema import Config
place, file = Path(sys.argv[1]), sys.argv[2]
tables = read_toml(Path(file))
tables.pop("description")
config = decode(Config, tables)
folder = Path(config.run.folder) / config.run.name
folder.mkdir(parents=True, exist_ok=True)
with (place / "calls").open("a") as calls:
    note = {"name": folder.name, "resume": "--resume" in sys.argv, "model": config.model.path, "export": config.run.export,
            "found": Path(config.model.path).is_dir(), "threads": os.environ["OMP_NUM_THREADS"], "begun": time.monotonic()}
    calls.write(json.dumps(note) + "\\n")
(folder / "config.json").write_text(json.dumps(encode(config)))
(folder / "checkpoints").mkdir(exist_ok=True)
if (place / f"fail-{folder.name}").exists():
    sys.exit("mifo: it went wrong")
share = config.train.seed / 4
lines = [{"label": label, "step": step, "flops": 1.0 * step, "problems": {"p": value, "q": share}}
         for label, step, value in (("before", 0, 0.0), ("step 2", 2, 0.5), ("after", 3, 1.0))]
(folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
turns = [{"updates": [{"loss": 2.0}, {"loss": 1.0}], "accuracy": 0.5}, {"updates": []}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(turn) + "\\n" for turn in turns))
(folder / "ledger.json").write_text(json.dumps({"rl_tokens": 7}))
if config.run.export:
    (folder / "export").mkdir(exist_ok=True)
(folder / "summary.json").write_text(json.dumps({"accuracy_after": (1 + share) / 2}))
"""


class Bench:
    """Trials of the script in a folder of their own."""

    def __init__(self, place):
        self.place, self.folder, self.said = place, place / "trials", []

    def trial(self, name, *, after=None, seed=0, steps=4, keep=False):
        _, config = load_config("tiny", ["--train.seed", str(seed), "--train.steps", str(steps)])
        return Trial(name=name, config=config, after=after, keep_export=keep, command=("trainer_stub", str(self.place)))

    def run(self, *trials, jobs=2, stop=None):
        return run_trials(trials, self.folder, jobs=jobs, threads=3, stop=stop or Stop(), say=self.said.append)

    def calls(self):
        path = self.place / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def names(self):
        return [call["name"] for call in self.calls()]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    (tmp_path / "trainer_stub.py").write_text(TRAINER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    return Bench(tmp_path)


def test_a_trial_begins_with_the_export_of_another_and_is_read(bench):
    start = bench.trial("start")
    done = bench.run(bench.trial("ce", after=start, seed=2), bench.trial("dft", after=start))
    assert done.complete
    first, *others = bench.calls()
    assert (first["name"], first["model"], first["export"], first["threads"]) == ("start", "tiny", True, "3")
    for call in others:
        assert call["model"] == str(bench.folder / "runs" / "start" / "export")
        assert call["found"]
        assert not call["export"]
    assert list(done.results) == ["start", "ce", "dft"]
    result = done.results["ce"]
    assert (result.before.accuracy, result.after.accuracy, result.seed) == (0.25, 0.75, 2)
    assert [e.label for e in result.along] == ["before", "step 2", "after"]
    assert [u["loss"] for u in result.updates] == [2.0, 1.0]
    assert (result.rewarded, result.ledger["rl_tokens"], result.config.method.name) == (0.5, 7, "mifo")
    assert result.config.model.path == others[0]["model"]
    for name in ("start", "ce", "dft"):
        assert not (bench.folder / "runs" / name / "checkpoints").exists()
        assert done.results[name].export is None  # nothing needs it any more


def test_what_is_finished_is_not_repeated_and_what_was_killed_is_resumed(bench):
    start = bench.trial("start", keep=True)
    trials = [bench.trial(name, after=start) for name in ("a", "b")]
    bench.run(*trials)
    killed = bench.folder / "runs" / "b"
    (killed / "summary.json").unlink()
    done = bench.run(*trials)
    assert bench.names() == ["start", "a", "b", "b"] or bench.names() == ["start", "b", "a", "b"]
    assert bench.calls()[-1]["resume"]
    assert not bench.calls()[0]["resume"]
    assert done.results["start"].export is not None
    assert bench.run(*trials).complete
    assert len(bench.calls()) == 4


def test_a_failed_trial_takes_only_its_own_descendants_and_is_tried_again(bench):
    bad, good = bench.trial("bad"), bench.trial("good")
    child, grandchild = bench.trial("child", after=bad), bench.trial("other", after=good)
    below = bench.trial("below", after=child)
    (bench.place / "fail-bad").touch()
    done = bench.run(below, grandchild)
    assert set(done.results) == {"good", "other"}
    reasons = {failure.name: failure.reason for failure in done.failures}
    assert reasons["bad"] == "it went wrong (status 1)"
    assert reasons["child"] == "bad, which it starts from, failed"
    assert reasons["below"] == "child, which it starts from, failed"
    assert not done.complete
    (bench.place / "fail-bad").unlink()
    assert bench.run(below, grandchild).complete
    assert sorted(bench.names()) == sorted(["bad", "good", "other", "bad", "child", "below"])


def test_an_export_that_is_gone_is_made_again_with_those_before_it(bench):
    first = bench.trial("first")
    second = bench.trial("second", after=first)
    bench.run(bench.trial("third", after=second))
    assert bench.run(bench.trial("third", after=second), bench.trial("fourth", after=second)).complete
    assert bench.names() == ["first", "second", "third", "first", "second", "fourth"]
    assert not bench.calls()[4]["resume"]
    assert bench.calls()[4]["found"]
    assert any("trained again" in line for line in bench.said)


def test_a_stop_leaves_the_rest(bench):
    stop = Stop()
    stop.request()
    done = bench.run(bench.trial("a"), stop=stop)
    assert (done.stopped, done.complete, bench.calls()) == (True, False, [])


def test_a_folder_of_other_trials_is_refused(bench):
    bench.run(bench.trial("a"))
    with pytest.raises(ConfigError, match=r"was run with train\.steps = 4, not 5"):
        bench.run(bench.trial("a", steps=5))
    with pytest.raises(ConfigError, match="command or start"):
        bench.run(bench.trial("a", after=bench.trial("start")))
    with pytest.raises(ConfigError, match="two different trials are called 'a'"):
        bench.run(bench.trial("a"), bench.trial("a", steps=5))
    with pytest.raises(ConfigError, match="letters, digits"):
        bench.run(bench.trial("../a"))
    wrong = bench.trial("b")
    optimizer = replace(wrong.config.rl_optimizer, schedule="cosine")
    with pytest.raises(ConfigError, match=r"b: rl_optimizer\.schedule"):
        bench.run(bench.trial("c"), replace(wrong, config=replace(wrong.config, rl_optimizer=optimizer)))
    assert bench.names() == ["a"]  # checked before the first process


def test_a_run_that_is_not_finished_or_was_not_measured_is_said(bench):
    with pytest.raises(CheckpointError, match="no finished run"):
        read_trial(bench.folder)
    result = bench.run(bench.trial("a")).results["a"]
    with pytest.raises(CheckpointError, match="no measurement 'step 9'"):
        result.evaluation("step 9")


def test_scores_go_into_intervals(bench):
    done = bench.run(*(bench.trial(f"a{seed}", seed=seed) for seed in (0, 4)))
    runs = scores(done.results.values())
    assert runs == {0: {"p": 1.0, "q": 0.0}, 4: {"p": 1.0, "q": 1.0}}
    assert scores(done.results.values(), "before")[4] == {"p": 0.0, "q": 1.0}
    difference = paired_difference(runs, scores(done.results.values(), "before"))
    assert difference is not None
    assert difference.value == 0.5
