"""Nothing in a model's text is compiled or run: by the source, by an audit of the interpreter, and by canary files."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mifo
from mifo.rewards import Answer, Grader
from mifo.types import Verdict

SOURCE = Path(mifo.__file__).parent
PARSING = {"parse_expr", "sympify", "parse_latex", "lambdify"}
EVALUATING = {"eval", "exec", "compile"} | PARSING
INSIDE = "inside.py"  # runs in the sandbox and is never imported: it is what executes programs there

SHELL = "__import__('os').system('touch {canary}')"
HOSTILE = [
    SHELL,
    rf"\text{{{SHELL}}}",
    rf"\mathrm{{{SHELL}}}",
    rf"x_{{{SHELL}}}",
    rf"\operatorname{{eval}}({SHELL})",
    rf"\sqrt{{{SHELL}}}",
    rf"\frac{{{SHELL}}}{{2}}",
    rf"1,{SHELL},2",
    rf"\{{{SHELL}\}}",
    rf"x={SHELL}",
    rf"3.{SHELL}",
    "open('{canary}','w')",
    "().__class__.__base__.__subclasses__()",
    "lambda: open('{canary}','w')",
    "exec(\"open('{canary}','w')\")",
    "1 if open('{canary}','w') else 2",
    "f'{{open(\"{canary}\",\"w\")}}'",
    "{{ open('{canary}','w') }}",
    "$(touch {canary})",
    "`touch {canary}`",
    "; touch {canary}",
    "\\input{{{canary}}}",
    "\\write18{{touch {canary}}}",
    "\x1b]0;title\x07 5",
    "=cmd|'/c touch {canary}'!A1",
    "../../{canary}",
    "1_000", "0x10", "1e5", "10**5", "1j", "nan", "inf", "Infinity", "١٢", "²", "1.2.3", "3.5", "1,234.5", "007", "1.5e3",
]  # fmt: skip
ORDINARY = [
    r"(x+1)^2", r"\frac{n(n+1)}{2}", r"x<3", r"[1,2]\cup[3,4]", r"\begin{pmatrix}1&2\\3&4.5\end{pmatrix}", r"\sin(2.5x)",
    r"\log_{10} 100", r"\binom{10}{3}", r"50\%", r"5\text{ cm}", r"3\frac{1}{2}", r"\int_0^1 x dx", r"\lim_{x\to 0} x",
    r"\sum_{k=1}^{10} k", r"5 \mod 3", r"|x|", r"\lfloor 2.5 \rfloor", r"x^2+2.5x=0", r"2i+1", r"1{,}234",
]  # fmt: skip


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in EVALUATING:
            yield node.func.id
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PARSING:
            yield node.func.attr


def test_no_source_file_evaluates_text():
    found = {path.name: list(calls(path)) for path in SOURCE.rglob("*.py")}
    assert {name: names for name, names in found.items() if names and name != INSIDE} == {}
    assert found[INSIDE]  # the search can find something


AUDIT = """
import json, sys
from mifo.rewards.compare import GENERATORS, UnreadableGoldError, equal
from mifo.rewards.confine import refuse_code_from_text
texts = json.load(sys.stdin)
refusals, reached = refuse_code_from_text(GENERATORS), []
for gold in ("5", "x+1.5", "(1,2)"):
    for text in texts:
        try:
            equal(gold, [text])
            equal(text, [gold])
        except Exception as error:
            pass
        if refusals:
            reached.append([gold, text, refusals[-1]])
        refusals.clear()
try:
    eval("1+1")
except PermissionError:
    print(json.dumps(reached))
"""


def test_the_libraries_compile_nothing_from_text(tmp_path):
    texts = [text.replace("{canary}", str(tmp_path / "canary")) for text in HOSTILE + ORDINARY]
    done = subprocess.run(
        [sys.executable, "-c", AUDIT], input=json.dumps(texts), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("grader_name", ["math", "exact", "choice"])
def test_hostile_answers_are_graded_and_inert(tmp_path, monkeypatch, grader_name):
    monkeypatch.chdir(tmp_path)
    texts = [text.replace("{canary}", "canary") for text in HOSTILE]
    with Grader(seconds_per_answer=20.0) as grader:
        items = [Answer(grader=grader_name, gold="C", text=f"\\boxed{{{text}}}") for text in texts]
        items += [Answer(grader=grader_name, gold="C", text=text) for text in texts]
        verdicts = grader.grade(items)
    assert Verdict.CORRECT not in verdicts
    assert list(tmp_path.iterdir()) == []
