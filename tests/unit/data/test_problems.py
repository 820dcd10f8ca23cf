"""Loading files: formats give the same problems, and every row that is not used is accounted for."""

import gzip
import json

import pytest

from mifo.data import problems as module
from mifo.data.problems import Limits, load_problems, summary
from mifo.data.readers import is_hub_id
from mifo.data.rows import last_boxed
from mifo.errors import ConfigError, DataError
from mifo.types import Verdict

ROWS = [
    {"id": "a", "problem": "What is 1+1?", "answer": "2", "demonstration": "\\boxed{2}"},
    {"id": "b", "problem": "What is 2+2?", "answer": "4", "demonstration": "\\boxed{5}"},
    {"id": "c", "problem": "What is 3+3?", "answer": "6", "demonstration": None},
]


def verify(rows):
    return [judged(response, answer) for _, response, answer in rows]


def judged(response, answer):
    if "crash" in response:
        return Verdict.ERROR
    return Verdict.CORRECT if last_boxed(response) == answer else Verdict.WRONG


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_wrong_demonstration_costs_the_demonstration_and_not_the_problem(tmp_path):
    report = load_problems(jsonl(tmp_path / "mine.jsonl", ROWS), verify=verify)
    assert [p.id for p in report.problems] == ["a", "b", "c"]
    assert [p.demonstration for p in report.problems] == ["\\boxed{2}", None, None]
    assert report.counts == {"demonstration verified as wrong": 1}
    assert (report.rows, report.schema) == (3, "mifo")
    assert report.problems[0].source == "mine"


def test_an_error_of_the_verifier_is_not_counted_as_a_wrong_answer(tmp_path):
    rows = [{**ROWS[0], "demonstration": "crash"}, ROWS[1]]
    report = load_problems(jsonl(tmp_path / "f.jsonl", rows), verify=verify)
    assert report.counts == {"demonstration verified as error": 1, "demonstration verified as wrong": 1}


def test_without_a_verifier_no_demonstration_is_trusted(tmp_path):
    report = load_problems(jsonl(tmp_path / "f.jsonl", ROWS))
    assert all(p.demonstration is None for p in report.problems)
    assert report.counts == {"demonstration unverified (no verifier)": 2}


def test_the_verifier_sees_all_demonstrations_of_a_file_at_once(tmp_path):
    calls = []

    def spy(rows):
        calls.append(rows)
        return [Verdict.CORRECT] * len(rows)

    load_problems(jsonl(tmp_path / "f.jsonl", [{**ROWS[1], "grader": "exact"}, ROWS[2], ROWS[0]]), verify=spy)
    assert calls == [[("exact", "\\boxed{5}", "4"), ("math", "\\boxed{2}", "2")]]


def test_every_fault_of_a_file_is_counted(tmp_path):
    lines = [
        json.dumps(ROWS[0]).encode(),
        b'{"problem": "caf\xe9", "answer": "1"}',
        b'{"problem": "half a pair \\ud800", "answer": "1"}',
        b'{"problem": ',
        b"[1]",
        b'{"id": "a", "problem": "again", "answer": "1"}',
        b'{"problem": "", "answer": "1"}',
        b'{"problem": "P"}',
        b'{"problem": "' + b"x" * 60 + b'", "answer": "1"}',
        b"  ",
    ]
    (tmp_path / "f.jsonl").write_bytes(b"\n".join(lines))
    report = load_problems(str(tmp_path / "f.jsonl"), verify=verify, limits=Limits(prompt_chars=50))
    assert [p.id for p in report.problems] == ["a"]
    assert report.counts == {
        "bad UTF-8": 2,
        "bad JSON": 1,
        "not an object": 1,
        "duplicate id": 1,
        "empty prompt": 1,
        "no answer": 1,
        "prompt too long": 1,
    }
    assert sum(report.counts.values()) + len(report.problems) == report.rows == 9


def test_limits_in_tokens_use_the_callable_and_a_long_demonstration_is_put_aside(tmp_path):
    rows = [
        {"id": "a", "problem": "one two", "answer": "1", "demonstration": "a b c d \\boxed{1}"},
        {"id": "b", "problem": "one two three", "answer": "1"},
    ]
    limits = Limits(prompt_tokens=2, demonstration_tokens=4, token_length=lambda text: len(text.split()))
    report = load_problems(jsonl(tmp_path / "f.jsonl", rows), verify=verify, limits=limits)
    assert [(p.id, p.demonstration) for p in report.problems] == [("a", None)]
    assert report.counts == {"demonstration too long": 1, "prompt too long": 1}


def test_limits_are_checked_when_they_are_made():
    with pytest.raises(ConfigError, match="token_length"):
        Limits(prompt_tokens=5)
    with pytest.raises(ConfigError, match="prompt_chars = 0"):
        Limits(prompt_chars=0)


def test_formats_give_the_same_problems_and_fingerprint(tmp_path):
    reference = load_problems(jsonl(tmp_path / "d.jsonl", ROWS), verify=verify)
    text = (tmp_path / "d.jsonl").read_bytes()
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(text))
    (folder / "d.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (tmp_path / "bom").mkdir()
    (tmp_path / "bom" / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + text)
    for path in (folder / "d.jsonl.gz", folder / "d.json", tmp_path / "bom" / "d.jsonl"):
        report = load_problems(str(path), verify=verify)
        assert report.problems == reference.problems
        assert report.fingerprint == reference.fingerprint
    changed = load_problems(jsonl(tmp_path / "d.jsonl", [{**ROWS[0], "answer": "3"}, *ROWS[1:]]), verify=verify)
    assert changed.fingerprint != reference.fingerprint


def test_parquet_and_saved_folders_give_the_same_problems(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    reference = load_problems(jsonl(tmp_path / "d.jsonl", ROWS), verify=verify)
    (tmp_path / "p").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p" / "d.parquet")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "d"))
    datasets.DatasetDict({"train": one, "test": one.select([2])}).save_to_disk(str(tmp_path / "both"))
    for path, split in (("p/d.parquet", None), ("d", None), ("both", "train")):
        report = load_problems(str(tmp_path / path), verify=verify, split=split)
        assert [(p.id, p.demonstration) for p in report.problems] == [
            (p.id, p.demonstration) for p in reference.problems
        ]
    assert len(load_problems(str(tmp_path / "both"), split="test").problems) == 1
    with pytest.raises(DataError, match="name one of its splits: train, test"):
        load_problems(str(tmp_path / "both"))


def test_verl_parquet_with_nested_turns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    row = {
        "data_source": "",
        "prompt": [{"content": "Think.", "role": "system"}, {"content": "What is 1+1?", "role": "user"}],
        "target": [{"content": "<think>\nWell.</think>\n\\boxed{2}", "role": "assistant"}],
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "extra_info": {"index": 0, "split": "default"},
    }
    pq.write_table(pa.Table.from_pylist([row, {**row, "target": None}]), tmp_path / "openr1.parquet")
    report = load_problems(str(tmp_path / "openr1.parquet"), verify=verify)
    assert report.schema == "verl"
    assert report.counts == {"duplicate id": 1}  # the same problem, whether or not a target comes with it
    assert report.problems[0].demonstration == "Well.</think>\n\\boxed{2}"
    assert [m.role for m in report.problems[0].messages] == ["system", "user"]


def test_bad_utf8_in_parquet_costs_its_row_only(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = pa.array([b"fine", b"caf\xe9"], pa.binary())
    problems = pa.StringArray.from_buffers(2, texts.buffers()[1], texts.buffers()[2])
    pq.write_table(pa.table({"problem": problems, "answer": ["1", "2"]}), tmp_path / "f.parquet")
    report = load_problems(str(tmp_path / "f.parquet"))
    assert [p.answer for p in report.problems] == ["1"]
    assert report.counts == {"bad UTF-8": 1}


def test_a_folder_of_files_needs_a_split_when_there_are_several(tmp_path):
    jsonl(tmp_path / "train-00000-of-00002.jsonl", ROWS[:1])
    jsonl(tmp_path / "train-00001-of-00002.jsonl", ROWS[1:2])
    jsonl(tmp_path / "test.jsonl", ROWS[2:])
    jsonl(tmp_path / "training_notes.jsonl", ROWS)
    assert [p.id for p in load_problems(str(tmp_path), split="train").problems] == ["a", "b"]
    assert [p.id for p in load_problems(str(tmp_path), split="test").problems] == ["c"]
    with pytest.raises(DataError, match="name a split"):
        load_problems(str(tmp_path))
    with pytest.raises(DataError, match=r"no file of that split; the folder has test\.jsonl"):
        load_problems(str(tmp_path), split="dev")


def test_a_generic_file_name_reports_under_its_folder(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    report = load_problems(jsonl(tmp_path / "gsm8k" / "test.jsonl", ROWS))
    assert {p.source for p in report.problems} == {"gsm8k"}


def test_nothing_usable_says_why_with_counts_and_columns(tmp_path):
    path = jsonl(tmp_path / "f.jsonl", [{"problem": "P", "answer": ""}, {"problem": "", "answer": "1", "level": 3}])
    with pytest.raises(DataError, match="none of 2 rows is usable as mifo") as caught:
        load_problems(path)
    for part in ("no answer 1", "empty prompt 1", "problem, answer, level"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("f.jsonl", b"", "holds no rows"),
        ("f.jsonl", b"{\n[1]\n", "bad JSON 1, not an object 1"),
        ("f.jsonl", b'{"sentence": "x", "label": 1}', "columns label, sentence: no known schema"),
        ("f.json", b'[{"problem": "P"', "not a JSON list"),
        ("f.jsonl.gz", b"not gzip", "cannot be read"),
        ("f.parquet", b"not parquet", "cannot be read as parquet"),
        ("f.csv", b"a,b", "unknown kind of file"),
    ],
)
def test_unreadable_files_say_why(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_problems(str(tmp_path / name))
    assert said in str(caught.value)
    assert name in str(caught.value)


def test_a_missing_path_is_not_taken_for_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert is_hub_id("openai/gsm8k")
    for path in ("data/train", "org/file.jsonl", "name", "a/b/c", "/abs/path", "./a"):
        assert not is_hub_id(path), path
    with pytest.raises(DataError, match="no such file or folder"):
        load_problems("data/train")


def test_a_hub_name_goes_to_the_datasets_library(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def fake(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    report = load_problems("org-of-nobody/set", split="train")
    assert asked == [("org-of-nobody/set", "train")]
    assert {p.source for p in report.problems} == {"org-of-nobody/set"}


def test_the_summary_is_one_readable_paragraph(tmp_path):
    rows = [*ROWS, {"problem": "", "answer": "1"}]
    report = load_problems(jsonl(tmp_path / "mine.jsonl", rows), verify=verify)
    said = summary(report)
    assert "\n" not in said
    for part in ("3 problems from 4 rows", "schema mifo", "math 3", "1 with a demonstration"):
        assert part in said
    assert "Dropped 1 rows: empty prompt 1." in said
    assert "Put aside 1 demonstrations: demonstration verified as wrong 1." in said


def test_public_names():
    assert set(module.__all__) <= set(dir(module))
