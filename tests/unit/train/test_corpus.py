"""What a run makes of its data files."""

import json

import pytest

from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.errors import DataError
from mifo.train.build import make_grader, prepare

SMALL = {"method": {"name": "mifo", "buffer_size": 1}}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(data, **tables):
    plain = {"model": {"path": "tiny"}, "data": data, "reward": {"workers": 1}, **tables}
    config = decode(Config, plain)
    with make_grader(config) as grader:
        return prepare(config, grader)


def row(i, demonstration="so \\boxed{%d}", **extra):
    return {
        "problem": f"what is {i}?",
        "answer": str(i),
        "demonstration": demonstration % i if demonstration else None,
        **extra,
    }


def test_limits_drop_and_count(tmp_path):
    rows = [row(1), row(2, demonstration="x" * 300 + "\\boxed{%d}"), row(3, demonstration=None)]
    rows.append(row(4) | {"problem": "long " * 50})
    rows.append(row(5) | {"demonstration": "\\boxed{99}"})
    train = write(tmp_path / "train.jsonl", rows)
    test = write(tmp_path / "test.jsonl", [row(1), row(7)])
    corpus = prepared(
        {"train": train, "evaluation": test, "max_prompt_tokens": 40, "max_demonstration_tokens": 60}, **SMALL
    ).corpus
    assert len(corpus.train) == 4
    assert corpus.with_demonstration == 1
    text = " ".join(corpus.notes)
    assert "1 dropped with a prompt over 40 tokens" in text
    assert "1 without their demonstration of over 60 tokens" in text
    assert "wrong 1" in text
    assert [p.answer for p in corpus.evaluation] == ["7"]  # the other held-out problem is also trained on
    assert "left out 1 problems that are also trained on" in text


def test_no_demonstration_at_all_is_an_error_for_methods_that_need_some(tmp_path):
    train = write(tmp_path / "train.jsonl", [row(i, demonstration=None) for i in range(3)])
    with pytest.raises(DataError, match=r"no problem has a verified demonstration.*box_answers.*grpo"):
        prepared({"train": train, "evaluation": "none"})
    method = {"name": "grpo"}
    assert len(prepared({"train": train, "evaluation": "none"}, method=method).corpus.train) == 3


def test_box_answers_makes_demonstrations_of_plain_solutions(tmp_path):
    train = write(
        tmp_path / "train.jsonl", [{"problem": f"q{i}", "answer": str(i), "solution": f"it is {i}"} for i in range(3)]
    )
    with pytest.raises(DataError, match="no problem has a verified"):
        prepared({"train": train, "evaluation": "none"})
    corpus = prepared({"train": train, "evaluation": "none", "box_answers": True}, **SMALL).corpus
    assert corpus.with_demonstration == 3
    assert "\\boxed{1}" in corpus.train[1].demonstration


def test_unverified_demonstrations_are_taken_only_when_asked_for(tmp_path):
    train = write(tmp_path / "train.jsonl", [row(1), row(2) | {"demonstration": "\\boxed{5}"}])
    assert prepared({"train": train, "evaluation": "none"}, **SMALL).corpus.with_demonstration == 1
    trusting = {"train": train, "evaluation": "none", "verify_demonstrations": False}
    assert prepared(trusting, **SMALL).corpus.with_demonstration == 2


def test_nothing_left_says_why(tmp_path):
    train = write(tmp_path / "train.jsonl", [row(i) for i in range(3)])
    with pytest.raises(DataError, match=r"none of 3 problems is left \(3 dropped with a prompt over 2 tokens\)"):
        prepared({"train": train, "evaluation": "none", "max_prompt_tokens": 2}, **SMALL)


def test_embedded_splits_do_not_meet():
    data = {"train_problems": 90, "evaluation_problems": 45, "max_prompt_tokens": 200}
    corpus = prepared(data).corpus
    train = {p.messages[-1].content for p in corpus.train}
    assert len(train) == 90
    assert len(corpus.evaluation) == 45
    assert not train & {p.messages[-1].content for p in corpus.evaluation}
    ood = prepared(data | {"evaluation": "embedded:ood", "evaluation_problems": 8}).corpus.evaluation
    assert not {p.source for p in ood} & {p.source for p in corpus.train}


def test_fewer_demonstrations_than_the_buffer_holds_is_an_error(tmp_path):
    """Questions wait in the buffer once each, so it would never fill and the run would be RL alone without a word."""
    train = write(tmp_path / "train.jsonl", [row(i) for i in range(10)])
    with pytest.raises(DataError, match=r"10 problems have a verified demonstration.*buffer_size = 64.*at most 10"):
        prepared({"train": train, "evaluation": "none"})
    method = {"name": "mifo", "buffer_size": 10}
    assert len(prepared({"train": train, "evaluation": "none"}, method=method).corpus.train) == 10


def test_rows_that_cannot_be_rendered_are_counted(tmp_path):
    rows = [row(1), row(2) | {"demonstration": "so <eos> it is \\boxed{2}"}]
    corpus = prepared({"train": write(tmp_path / "train.jsonl", rows), "evaluation": "none"}, **SMALL).corpus
    assert len(corpus.train) == 2
    assert corpus.with_demonstration == 1
    assert "1 without their demonstration, which holds an end token" in " ".join(corpus.notes)


def test_held_out_prompts_obey_the_limit_too(tmp_path):
    train = write(tmp_path / "train.jsonl", [row(1)])
    test = write(tmp_path / "test.jsonl", [row(2), row(3) | {"problem": "long " * 50}])
    corpus = prepared({"train": train, "evaluation": test, "max_prompt_tokens": 60}, **SMALL).corpus
    assert [p.answer for p in corpus.evaluation] == ["2"]
    assert "data.evaluation: 1 dropped with a prompt over 60 tokens" in " ".join(corpus.notes)


def test_demonstrations_must_fit_the_context(tmp_path):
    from mifo.errors import ModelError
    from mifo.train.build import check_context

    config = decode(Config, {"rollout": {"max_response_tokens": 10}})
    train = write(tmp_path / "train.jsonl", [row(1, demonstration="x" * 300 + "\\boxed{%d}")])
    corpus = prepared({"train": train, "evaluation": "none"}, **SMALL).corpus
    with pytest.raises(ModelError, match=r"with its demonstration has \d+ tokens.*max_demonstration_tokens"):
        check_context(256, config, corpus)
    check_context(400, config, corpus)
