"""Stand-ins for what recipes load: a model folder and data files, of the same formats and a few kilobytes."""

import json

import pytest

from mifo.data.chartok import char_tokenizer
from mifo.train.model import tiny_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A Hugging Face folder with a random two-layer model, a character tokenizer and a long context."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model()
    model.config.max_position_embeddings = 16_384
    model.save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def gsm8k_files(tmp_path_factory):
    """Training and test JSONL as GSM8K has them."""
    folder = tmp_path_factory.mktemp("gsm8k")
    for split, offset in (("train", 0), ("test", 100)):
        rows = [
            {
                "question": f"Ann has {i} pens and buys 2. How many?",
                "answer": f"{i}+2=<<{i}+2={i + 2}>>{i + 2}\n#### {i + 2}",
            }
            for i in range(offset, offset + 70)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(folder / "train.jsonl"), str(folder / "test.jsonl")


@pytest.fixture(scope="session")
def cola_files(tmp_path_factory):
    """Training and held-out JSONL as CoLA's are passed on."""
    folder = tmp_path_factory.mktemp("cola")
    for split, offset in (("train", 0), ("dev", 100)):
        rows = [{"sentence": f"It is {i} o'clock.", "label": i % 2} for i in range(offset, offset + 70)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(folder / "train.jsonl"), str(folder / "dev.jsonl")


@pytest.fixture(scope="session")
def verl_file(tmp_path_factory):
    """A parquet file with the columns of the 46k data set."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {
            "data_source": "",
            "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": f"What is {i}+1?"}],
            "target": [{"role": "assistant", "content": f"<think>\nAdd one.\n</think>\nIt is $\\boxed{{{i + 1}}}$."}],
            "ability": "math",
            "reward_model": {"ground_truth": str(i + 1), "style": "rule"},
            "extra_info": {"index": i, "split": "default"},
        }
        for i in range(70)
    ]
    path = tmp_path_factory.mktemp("verl") / "openr1.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def no_model_is_loaded(monkeypatch):
    """Fails a test in which weights are loaded: a user's mistake has to be found before."""

    def refuse(*_, **__):
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr("mifo.train.build.load_model", refuse)
    monkeypatch.setattr("mifo.commands.load_model", refuse)
