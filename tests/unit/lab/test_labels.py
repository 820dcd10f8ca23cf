"""Labels in responses and scores of predictions, by hand."""

import json
import math

import pytest

from mifo.data.labelled import COLA, LabelTask
from mifo.errors import ConfigError, DataError
from mifo.lab.labels import Example, described, label_scores, read_examples, robust_label, strict_label
from mifo.rewards.label import decide
from mifo.types import Verdict


@pytest.mark.parametrize(
    ("response", "strict", "robust"),
    [
        ("acceptable", 1, 1),
        (" unacceptable\n", 0, 0),
        ("Acceptable", None, 1),
        ("acceptable.", None, 1),
        ("It is unacceptable", None, 0),  # a search for "acceptable" would find one here
        ("Acceptable? No: unacceptable.", None, 0),
        ("unacceptable, or rather ACCEPTABLE!", None, 1),
        ("unacceptably bad", None, None),
        ("not_acceptable", None, None),
        ("", None, None),
        ("<think>\n\n</think>\n\nacceptable", 1, 1),  # as the reward of RL on labels has it
        ("<think>acceptable?</think>\nunacceptable", 0, 0),
        ("<think>acceptable</think>It is not.", None, 1),
    ],
)
def test_labels_of_responses(response, strict, robust):
    assert strict_label(response, COLA) == strict
    for number, label in enumerate(COLA.labels):
        assert (decide(label, response) is Verdict.CORRECT) == (strict == number)
    assert robust_label(response, COLA) == robust


def test_scores_by_hand():
    # 3 true positives, 1 false negative, 2 true negatives, 2 false positives
    gold, predicted = [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 1, 1]
    scores = label_scores(gold, predicted)
    assert scores.accuracy == 5 / 8
    assert scores.reward == 2 / 8
    assert scores.mcc == pytest.approx((3 * 2 - 2 * 1) / math.sqrt(5 * 4 * 4 * 3))
    assert scores.balanced_accuracy == (3 / 4 + 2 / 4) / 2
    assert scores.majority == 0.5


def test_a_majority_guess_flatters_accuracy_alone():
    scores = label_scores([1] * 7 + [0] * 3, [1] * 10)
    assert scores.accuracy == scores.majority == 0.7
    assert scores.reward == pytest.approx(0.4)  # a mean reward of 0.4 is no skill here
    assert scores.mcc == 0.0
    assert scores.balanced_accuracy == 0.5


def test_undecided_counts_as_wrong():
    scores = label_scores([1, 0, 1, 0], [1, 0, None, None])
    assert (scores.accuracy, scores.reward, scores.undecided) == (0.5, 0.0, 0.5)
    assert 0 < scores.mcc < 1


def test_three_classes():
    assert label_scores([0, 1, 2, 0], [0, 1, 2, 0]).mcc == pytest.approx(1.0)
    assert label_scores([0, 1, 2], [1, 2, 0]).mcc == pytest.approx(-0.5)


def test_files(tmp_path):
    lines = tmp_path / "cola.jsonl"
    rows = [
        {"source": "gj04", "label": 1, "star": "", "sentence": "He left."},
        {"label": "unacceptable", "text": "Left he he."},
    ]
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    tsv = tmp_path / "cola.tsv"
    tsv.write_text('gj04\t1\t\tHe left.\ngj04\t0\t*\tLeft "he he.\n')
    assert [(e.text, e.label) for e in read_examples(str(lines), COLA)] == [("He left.", 1), ("Left he he.", 0)]
    assert [(e.text, e.label) for e in read_examples(str(tsv), COLA)] == [("He left.", 1), ('Left "he he.', 0)]
    [example] = read_examples(str(lines), COLA, limit=1)
    problem = example.problem(COLA, 0)
    assert problem.answer == "acceptable"
    assert problem.messages[0].content.endswith("Sentence: He left.")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '{"label": 2, "sentence": "a"}',
            "row 1: label = 2 is neither one of unacceptable, acceptable nor a number below 2",
        ),
        ('{"label": true, "sentence": "a"}', "row 1: label = True"),
        ('{"label": 1}', "row 1: it has no text in sentence or text"),
        ("nonsense", "row 1: it is no labelled text"),
        ("\n", "holds no examples"),
    ],
)
def test_rows_that_are_no_examples(tmp_path, text, words):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(DataError) as caught:
        read_examples(str(tmp_path / "x.jsonl"), COLA)
    assert words in str(caught.value)


def test_tasks_that_make_no_sense():
    with pytest.raises(ConfigError, match="two or more different labels"):
        LabelTask(labels=("yes", "Yes"), instruction="{text}")
    with pytest.raises(ConfigError, match="no place for the text"):
        LabelTask(labels=("yes", "no"), instruction="Well?")


def test_lines_end_where_json_lines_end(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes("\ufeff".encode() + '{"text": "a\u2028b", "label": 1}\r\n{"text": "c", "label": 0}\n'.encode())
    assert [(e.text, e.label) for e in read_examples(str(path), COLA)] == [("a\u2028b", 1), ("c", 0)]


def test_labels_that_are_numbers_are_labels_and_no_places(tmp_path):
    stars = LabelTask(labels=("1", "2", "3", "4", "5"), instruction="{text}")
    path = tmp_path / "stars.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": "5"}\n')
    assert [e.label for e in read_examples(str(path), stars)] == [0, 4]
    path.write_text('{"text": "a", "label": 0}\n')
    with pytest.raises(DataError, match=r"label = 0 is none of 1, 2, 3, 4, 5"):
        read_examples(str(path), stars)


@pytest.mark.parametrize(
    ("response", "labels", "found"), [("iyi", ("İyi", "Kötü"), 0), ("POSİTİVE", ("negative", "positive"), 1)]
)
def test_letter_case_of_other_alphabets(response, labels, found):
    assert robust_label(response, LabelTask(labels=labels, instruction="{text}")) == found


def test_what_was_read_is_described():
    examples = [Example("a", 1), Example("b", 1), Example("c", 0)]
    assert described(examples, COLA) == "The first 3 texts of the file: 1 unacceptable, 2 acceptable."
    assert "All have one label" in described(examples[:2], COLA)
