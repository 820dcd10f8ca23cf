"""Labelled texts as problems: the question asks for the label, which is the answer, the demonstration, and nothing else."""

import json

import pytest

from mifo.config.check import check_config
from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.data.labelled import COLA, LabelTask, make_task
from mifo.data.problems import load_problems
from mifo.errors import ConfigError, DataError
from mifo.rewards import Answer, Grader
from mifo.types import Verdict

ROWS = [
    {"sentence": "He left.", "label": 1},
    {"sentence": "Left he he.", "label": "unacceptable"},
    {"text": "Who?", "label": "1"},
    {"sentence": "  ", "label": 1},
    {"sentence": "A third label.", "label": 2},
]


def written(tmp_path, rows=ROWS):
    path = tmp_path / "cola.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_become_questions_for_their_labels_and_others_are_counted(tmp_path):
    report = load_problems(written(tmp_path), task=COLA)
    assert report.schema == "labels"
    assert [p.answer for p in report.problems] == ["acceptable", "unacceptable", "acceptable"]
    assert all(p.grader == "label" for p in report.problems)
    assert report.problems[0].messages[0].content == COLA.instruction.replace("{text}", "He left.")
    assert {k: n for k, n in report.counts.items() if "demonstration" not in k} == {
        "no text": 1,
        "a label that is none of data.labels": 1,
    }


def test_demonstrations_are_the_labels_and_are_verified_like_any(tmp_path):
    with Grader() as grader:

        def verify(asked):
            return grader.grade([Answer(grader=kind, gold=gold, text=text) for kind, text, gold in asked])

        report = load_problems(written(tmp_path), task=COLA, verify=verify, box_answer=True)
    assert [p.demonstration for p in report.problems] == ["acceptable", "unacceptable", "acceptable"]  # no box is added


def test_colas_own_files_have_no_header_and_keep_their_quotes(tmp_path):
    path = tmp_path / "in_domain_train.tsv"
    path.write_text('gj04\t1\t\tHe left.\ngj04\t0\t*\tLeft "he he.\nshort line\n')
    report = load_problems(str(path), task=COLA)
    assert [p.answer for p in report.problems] == ["acceptable", "unacceptable"]
    assert report.problems[1].messages[0].content.endswith('Left "he he.')
    assert report.counts["not CoLA's four columns"] == 1


def test_a_file_without_labels_is_refused_where_labels_are_configured(tmp_path):
    with pytest.raises(DataError, match="a file of labelled texts has label and sentence or text"):
        load_problems(written(tmp_path, [{"problem": "1+1", "answer": "2"}]), task=COLA)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("acceptable", Verdict.CORRECT),
        ("  acceptable\n", Verdict.CORRECT),
        ("<think>unacceptable?</think>\nacceptable", Verdict.CORRECT),
        ("unacceptable", Verdict.WRONG),  # it contains the right label
        ("Acceptable", Verdict.WRONG),
        ("acceptable.", Verdict.WRONG),
        ("It is acceptable", Verdict.WRONG),
        ("\\boxed{acceptable}", Verdict.WRONG),
        ("", Verdict.WRONG),
    ],
)
def test_a_response_is_the_label_and_nothing_else(text, verdict):
    with Grader() as grader:
        assert grader.grade([Answer(grader="label", gold="acceptable", text=text)]) == [verdict]


def test_questions_without_an_instruction():
    assert make_task(COLA.labels, None) == COLA
    task = make_task(("good", "bad", "neither"), None)
    assert task.question("Fine.").startswith("Which label fits the text: good, bad or neither?")
    assert task.question("Fine.").endswith("Text: Fine.")
    assert make_task(("y", "n"), "{text}?") == LabelTask(labels=("y", "n"), instruction="{text}?")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"instruction": "{text}?"}, "data.instruction without data.labels"),
        ({"labels": ["a", "b"], "train": "embedded"}, "embedded problems have no labels"),
        ({"labels": ["a", "b"], "evaluation": "embedded:ood"}, "embedded problems have no labels"),
        ({"labels": ["a", "A"]}, "two or more different labels"),
        ({"labels": ["a", "b"], "instruction": "Well?"}, "no place for the text"),
        ({"labels": ["a", "b"], "box_answers": True}, "a label stands alone"),
    ],
)
def test_settings_that_make_no_sense_are_refused(data, words):
    tables = {"data": {"train": "a.jsonl", "evaluation": "b.jsonl", **data}}
    with pytest.raises(ConfigError, match=words):
        check_config(decode(Config, tables))


def test_labels_and_lines_of_any_length_are_read(tmp_path):
    (tmp_path / "data.jsonl").write_text(
        json.dumps({"sentence": "Long.", "label": "1" * 5000}) + "\n" + json.dumps(ROWS[0])
    )
    assert len(load_problems(str(tmp_path / "data.jsonl"), task=COLA).problems) == 1
    (tmp_path / "data.tsv").write_text(f"s\t1\t\t{'word ' * 40_000}\ns\t0\t\tShort\n")
    assert len(load_problems(str(tmp_path / "data.tsv"), task=COLA).problems) >= 1
