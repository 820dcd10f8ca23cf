"""Random problem files and random answers, bounded: every file is loaded or refused by name, every answer gets a verdict.

`MIFO_FUZZ_EXAMPLES` sets how many of each (200 in CI).
"""

import gzip
import json
import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mifo.data.extract import gold_answer, last_boxed, response_answer
from mifo.data.problems import load_problems, summary
from mifo.data.readers import read_rows
from mifo.errors import DataError
from mifo.printable import printable
from mifo.rewards import Answer, Grader
from mifo.types import Problem, Verdict

EXAMPLES = int(os.environ.get("MIFO_FUZZ_EXAMPLES", "200"))
bounded = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

COLUMNS = st.sampled_from(
    ["problem", "question", "answer", "solution", "demonstration", "prompt", "target", "reward_model", "messages", "completion",
     "options", "choices", "answer_index", "answerKey", "id", "source", "data_source", "grader", "entry_point", "test",
     "test_list", "code", "text", "ground_truth"]
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12),
    st.sampled_from(["2", "\\boxed{2}", "#### 7", "A", "math", "code", "\ud800", "\x00", "check", "assert f(1) == 2"]),
)  # fmt: skip
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": SCALARS})
VALUES = st.recursive(
    st.one_of(SCALARS, st.lists(TURN, max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["ground_truth", "text", "label", "a"]), inner, max_size=2),
    ),
    max_leaves=5,
)
ROWS = st.lists(st.dictionaries(COLUMNS, VALUES, max_size=6), min_size=1, max_size=6)


def check_load(path):
    """A file is loaded with every row accounted for, or refused with a DataError that names it."""
    try:
        report = load_problems(str(path), verify=lambda rows: [Verdict.CORRECT] * len(rows))
    except DataError as error:
        if path.name not in str(error):
            raise
        return None
    lost = sum(n for reason, n in report.counts.items() if not reason.startswith("demonstration "))
    assert len(report.problems) + lost == report.rows
    assert len({p.id for p in report.problems}) == len(report.problems) > 0
    for problem in report.problems:
        assert isinstance(problem, Problem)
        assert problem.answer
        json.dumps([problem.id, problem.answer, problem.source, problem.messages[-1].content]).encode()
        "".join([problem.id, problem.answer, problem.source, problem.demonstration or ""]).encode()
    assert printable(printable(summary(report))) == printable(summary(report))
    return report


@bounded
@given(ROWS)
def test_random_rows(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = check_load(path)
    as_list = tmp_path / "rows.json"
    as_list.write_text(json.dumps(rows))
    listed = check_load(as_list)
    assert (lines is None) == (listed is None)
    if lines is not None:
        assert lines.counts == listed.counts  # sources differ by nothing: both files are called rows
        assert lines.fingerprint == listed.fingerprint


@bounded
@given(st.binary(max_size=300), st.sampled_from([".jsonl", ".json", ".jsonl.gz", ".json.gz"]), st.booleans())
def test_random_bytes(tmp_path, content, suffix, packed):
    path = tmp_path / f"bytes{suffix}"
    path.write_bytes(gzip.compress(content) if packed else content)
    check_load(path)


GOOD = b"".join(
    json.dumps(
        {"id": str(i), "problem": f"{i}+1?", "answer": str(i + 1), "demonstration": f"\\boxed{{{i + 1}}}"}
    ).encode()
    + b"\n"
    for i in range(4)
)


@bounded
@given(st.integers(0, 2**32), st.integers(1, 8), st.sampled_from(["flip", "cut", "repeat", "insert"]), st.booleans())
def test_damaged_files(tmp_path, seed, times, kind, packed):
    draw, content = random.Random(seed), bytearray(gzip.compress(GOOD) if packed else GOOD)
    for _ in range(times):
        place = draw.randrange(max(1, len(content)))
        if kind == "flip" and content:
            content[place % len(content)] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del content[place:]
        elif kind == "repeat":
            content[place:place] = content[place : place + 20]
        elif kind == "insert":
            content[place:place] = draw.randbytes(3)
    path = tmp_path / ("f.jsonl.gz" if packed else "f.jsonl")
    path.write_bytes(content)
    check_load(path)


@bounded
@given(st.binary(max_size=200))
def test_random_bytes_as_parquet(tmp_path, content):
    pytest.importorskip("pyarrow")
    path = tmp_path / "f.parquet"
    path.write_bytes(b"PAR1" + content + b"PAR1")
    with pytest.raises(DataError, match=r"f\.parquet"):
        list(read_rows(str(path), None))


PIECES = st.sampled_from(
    ["\\boxed{", "\\boxed", "}", "{", "\\frac", "\\sqrt", "^", "_", "(", ")", "[", "]", "1", "2.5", "-", "+", "x", "=", ",",
     "\\text{",
     "</think>", "<think>", "####", "%", "\\%", "\\$", "$", " ", "\n", "10^{9}", "9!", "!", "\\pi", "\\infty", "\\cup",
     "\\{", "\\}",
     "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "\u202e", "\x1b[31m", "\x00", "\u0665", "e5", "1e400", "0x1f", "::", "A",
     "B"]
)  # fmt: skip
ANSWERS = st.one_of(st.lists(PIECES, max_size=14).map("".join), st.text(max_size=40))


@bounded
@given(ANSWERS)
def test_extraction_takes_any_text(text):
    for found in (last_boxed(text), response_answer(text)):
        assert found is None or found in text
    assert isinstance(gold_answer(text), str)
    if text.count("{") == text.count("}") == 0 and "\\boxed" not in text:
        assert last_boxed(f"so \\boxed{{{text}}}") == text.strip() or "\\fbox" in text or text.endswith("\\")


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2, seconds_per_answer=1.0) as made:
        yield made


def test_every_answer_gets_a_verdict(grader):
    """In one batch, so that the deadline of one is not another's; the right answer among them stays right."""
    pairs = []

    @settings(max_examples=EXAMPLES, deadline=None, database=None)
    @given(ANSWERS, ANSWERS, st.sampled_from(["math", "exact", "choice"]))
    def collect(gold, text, kind):
        # An empty answer, or a choice that is no letter, is an error of the data and named as one.
        gold = "B" if kind == "choice" else gold if gold.strip() else "1"
        pairs.append(Answer(grader=kind, gold=gold, text=f"\\boxed{{{text}}}"))
        pairs.append(Answer(grader="math", gold="48271", text=f"{text.replace('boxed', 'box')} \\boxed{{48271}}"))

    collect()
    verdicts = grader.grade(pairs)
    assert len(verdicts) == len(pairs)
    assert all(isinstance(verdict, Verdict) for verdict in verdicts)
    right = [v for v, a in zip(verdicts, pairs, strict=True) if a.gold == "48271" and "{48271}" in a.text]
    assert set(right) == {Verdict.CORRECT}
