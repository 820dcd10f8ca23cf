"""Payloads as model output, through a whole run: reward, samples, metrics, terminal, summary, checkpoint, export."""

import contextlib
import io
import json
import os
from types import SimpleNamespace

import pytest
from attack import (
    FORMS,
    GRADERS,
    NAMES,
    OPTIONS,
    PAYLOADS,
    RIGHT,
    ScriptedEngine,
    as_bytes,
    as_read,
    filled,
    payload_texts,
    watching,
)

from mifo.cli import main
from mifo.printable import printable

PER_STEP = 50  # rollouts of a problem in a step, the right one included
RECIPE = """
[model]
path = {model}
compute = "float32"
[data]
train = {train}
evaluation = {held_out}
max_prompt_tokens = 4096
[rollout]
max_response_tokens = 8000
[evaluation]
max_response_tokens = 8000
[method]
name = "grpo"
[method.rl]
prompts_per_step = 4
rollouts_per_prompt = {rollouts}
updates_per_step = 1
[rl_optimizer]
learning_rate = 1e-4
[reward]
workers = 2
seconds_per_answer = 2.0
max_failure_share = 1.0
[train]
steps = {steps}
threads = 1
micro_batch_tokens = 16384
[run]
samples_per_step = 1000
"""


def write_problems(path, offset):
    rows = [
        {
            "id": f"{grader}-{i + offset}",
            "problem": f"Number {i + offset}?{OPTIONS}",
            "answer": answer,
            "grader": grader,
        }
        for i, (grader, answer) in enumerate(GRADERS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def attacked(tmp_path_factory, byte_folder):
    """A run in which every payload is answered three ways to every grader; what it left, showed and did."""
    home = tmp_path_factory.mktemp("attacked")
    canary = home / "canary"
    texts = payload_texts(canary)
    answers = [filled(form, text) for text in texts for form in FORMS]
    steps = -(-len(answers) // (PER_STEP - 1))
    script = []  # the last of each step's rollouts is the right answer
    for start in range(0, len(answers), PER_STEP - 1):
        script += [*answers[start : start + PER_STEP - 1], ""]
    write_problems(home / "train.jsonl", 0)
    write_problems(home / "held_out.jsonl", 10)
    settings = {"model": byte_folder, "train": str(home / "train.jsonl"), "held_out": str(home / "held_out.jsonl")}
    recipe = RECIPE
    for name, value in {
        **{k: json.dumps(v) for k, v in settings.items()},
        "rollouts": PER_STEP,
        "steps": steps,
    }.items():
        recipe = recipe.replace(f"{{{name}}}", str(value))
    (home / "attack.toml").write_text(recipe)
    with pytest.MonkeyPatch.context() as patch, watching() as deeds:
        import mifo.train.build

        patch.chdir(home)
        patch.setattr(mifo.train.build, "build_engine", lambda *_: SplitEngine(script, answers))
        with captured() as shown:
            assert main(["train", str(home / "attack.toml")]) == 0, shown.err
    return SimpleNamespace(
        home=home, folder=home / "runs" / "attack", canary=canary, deeds=deeds, shown=shown, texts=texts
    )


class SplitEngine(ScriptedEngine):
    """Training gets the script from its beginning whatever was measured before; an evaluation gets payloads of its own."""

    def __init__(self, script, answers):
        super().__init__(script)
        self.measured = ScriptedEngine(answers)

    def generate(self, prompts, n, sampling, seed):
        return (super() if n > 1 else self.measured).generate(prompts, n, sampling, seed)


@contextlib.contextmanager
def captured():
    """Standard output and error of a block, also in a fixture of a whole module."""
    shown, streams = SimpleNamespace(out="", err=""), (io.StringIO(), io.StringIO())
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            yield shown
        finally:
            shown.out, shown.err = (stream.getvalue() for stream in streams)


@pytest.fixture(scope="module")
def samples(attacked):
    """Lines of samples.jsonl by response."""
    found = {}
    for line in (attacked.folder / "samples.jsonl").read_bytes().split(b"\n")[:-1]:
        record = json.loads(line)
        found.setdefault(record["response"], []).append(record)
    return found


@pytest.mark.parametrize("number", range(len(PAYLOADS)), ids=NAMES)
def test_a_payload_is_graded_wrong_and_kept_as_text(attacked, samples, number):
    text = attacked.texts[number]
    for form in FORMS:
        records = samples[as_read(filled(form, text))]  # in the file word for word, as one line
        assert {r["problem"].split("-")[0] for r in records} == {"math", "exact", "choice"}
        assert {r["verdict"] for r in records} <= {"wrong", "error", "timeout"}
        assert len(records) >= len(GRADERS)


LONG = [i for i, payload in enumerate(PAYLOADS) if len(as_bytes(payload["text"])) >= 8]  # others occur by chance


@pytest.mark.parametrize("number", LONG, ids=[NAMES[i] for i in LONG])
def test_a_payload_is_nowhere_but_in_the_samples(attacked, number):
    needle = as_bytes(attacked.texts[number])
    for path in files_of(attacked.folder):
        if path.name != "samples.jsonl":
            assert needle not in path.read_bytes(), path
    assert attacked.texts[number] not in attacked.shown.out + attacked.shown.err


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_right_answer_is_right(samples):
    """Else a run that grades nothing would pass."""
    verdicts = {r["problem"]: r["verdict"] for r in samples[f"\\boxed{{{RIGHT}}}"]}
    assert verdicts == {"math-0": "correct", "math-1": "wrong", "exact-2": "correct", "choice-3": "wrong"}


def test_lines_stay_lines(attacked):
    for path in attacked.folder.glob("*.jsonl"):
        raw = path.read_bytes()
        assert not set(raw) & (set(range(32)) - {10})  # no control byte but the line feed
        text = raw.decode("utf-8")
        assert printable(text) == text  # nor C1 controls, bidirectional marks, tags: all are escapes of JSON
        for line in raw.split(b"\n")[:-1]:
            assert isinstance(json.loads(line), dict)
    for path in attacked.folder.glob("*.json"):
        json.loads(path.read_bytes())


def test_the_terminal_gets_no_control_characters(attacked):
    shown = attacked.shown.out + attacked.shown.err
    assert "Result" in shown
    assert printable(shown) == shown


def test_nothing_is_left_outside_the_run_folder(attacked):
    assert not attacked.canary.exists()
    assert sorted(p.name for p in attacked.home.iterdir()) == ["attack.toml", "held_out.jsonl", "runs", "train.jsonl"]
    assert [p.name for p in (attacked.home / "runs").iterdir()] == ["attack"]
    names = {part for path in files_of(attacked.folder) for part in path.relative_to(attacked.folder).parts}
    assert all(name.isascii() and name.replace(".", "").replace("-", "").replace("_", "").isalnum() for name in names)


def test_no_connection_and_no_process_but_the_graders(attacked):
    assert attacked.deeds.connections == []
    others = [p for p in attacked.deeds.processes if "mifo.rewards" not in p[1]]
    assert others == []
    outside = [
        path
        for path in attacked.deeds.written
        if os.path.isabs(path)
        and not path.startswith((str(attacked.home), "/dev/null"))
        and not os.path.isdir(path)  # a temporary file without a name
    ]
    assert outside == []


def test_the_export_is_a_plain_model(attacked, byte_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = attacked.folder / "export"
    assert (
        AutoTokenizer.from_pretrained(export).chat_template == AutoTokenizer.from_pretrained(byte_folder).chat_template
    )
    AutoModelForCausalLM.from_pretrained(export)
    suffixes = {path.suffix for path in files_of(attacked.folder)}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".jinja", ".lock", ""}
