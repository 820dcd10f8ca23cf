"""`mifo probe` and `mifo rejuvenate` from the command line: files, figures, notes and mistakes."""

import builtins
import csv
import importlib.util
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from mifo.cli import main
from mifo.data.chartok import char_tokenizer
from mifo.report.output import NO_FIGURE
from mifo.train.model import tiny_model

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(autouse=True)
def _keep_one_thread(monkeypatch):
    monkeypatch.setattr("mifo.lab_commands.set_up_cpu", lambda threads: None)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Folders of a model at the start, after RL and after SFT."""
    folder = tmp_path_factory.mktemp("three")
    paths = []
    model = tiny_model()
    for number, name in enumerate(("start", "rl", "sft")):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * number * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / name)
        char_tokenizer().save_pretrained(folder / name)
        paths.append(str(folder / name))
    return paths


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"problem": f"{i}+1?", "answer": str(i + 1), "demonstration": f"{i}+1={i + 1}$"} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def files(folder, name, *, figure=HAS_MATPLOTLIB):
    """The record and the table of a probe; its figure must be there where matplotlib is."""
    assert (folder / f"{name}.png").is_file() == figure
    if figure:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return record, list(csv.DictReader(file))


def test_magnitude(three, tmp_path, capsys):
    assert main(["probe", "magnitude", *three, "--out", str(tmp_path)]) == 0
    record, rows = files(tmp_path, "magnitude")
    assert [one["label"] for one in record["comparisons"]] == ["rl", "sft"]
    assert {row["model"] for row in rows} == {"rl", "sft"}
    assert "‖Δ‖" in capsys.readouterr().out


def test_overlap(three, tmp_path, capsys):
    arguments = ["probe", "overlap", *three, "--top", "0.1", "--names", "RL", "SFT", "--out", str(tmp_path)]
    assert main(arguments) == 0
    record, rows = files(tmp_path, "overlap")
    assert record["pairs"][0]["earlier"] == rows[0]["earlier"] == "RL"
    assert "RL → SFT" in capsys.readouterr().out


def test_entropy(three, pairs, tmp_path, capsys):
    assert main(["probe", "entropy", *three[:2], "--data", pairs, "--out", str(tmp_path)]) == 0
    record, rows = files(tmp_path, "entropy")
    assert [model["label"] for model in record["models"]] == ["start", "rl"]
    assert rows[0]["model"] == "start"
    assert "Measured on 4 pairs" in capsys.readouterr().out


def test_sparsify(three, tmp_path, capsys):
    data = tmp_path / "test.jsonl"
    data.write_text("\n".join(json.dumps({"problem": f"{i}+1?", "answer": str(i + 1)}) for i in range(3)))
    arguments = ["--rates", "0.5", "--masks", "1", "--data", str(data), "--max-tokens", "3", "--out", str(tmp_path)]
    assert main(["probe", "sparsify", *three[:2], *arguments]) == 0
    record, rows = files(tmp_path, "sparsify")
    assert len(rows) == len(record["scores"]) == 3
    assert "lowest to highest" in capsys.readouterr().out


def test_redundancy(three, pairs, tmp_path, capsys):
    assert main(["probe", "redundancy", *three, "--data", pairs, "--tokens", "5", "--out", str(tmp_path)]) == 0
    record, rows = files(tmp_path, "redundancy")
    assert [one["label"] for one in record["models"]] == ["rl", "sft"]
    assert len(rows) == 10
    assert "median PR" in capsys.readouterr().out


def test_coupling(three, tmp_path, capsys, caplog):
    caplog.set_level("INFO", logger="mifo")  # `mifo paper` in the same process leaves it higher
    data = tmp_path / "labels.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"{i}", "label": i % 2}) for i in range(4)))
    asked = ["--labels", "n", "y", "--instruction", "{text}?"]
    sizes = ["--max-tokens", "2", "--samples", "2", "--out", str(tmp_path)]
    arguments = ["probe", "coupling", *three[:2], "--order", "rl-sft", "--data", str(data)]
    assert main([*arguments, *asked, *sizes]) == 0
    record, rows = files(tmp_path, "coupling")
    assert [row["model"] for row in rows] == ["start", "rl"]
    assert len(record["bounds"]) == 2
    assert "Statements of the theorems" in capsys.readouterr().out
    assert sum(": SFT loss " in message for message in caplog.messages) == 2  # as each was measured
    assert main([*arguments, *asked[:3], *sizes]) == 0  # with the general question
    assert "Which label fits the text: n or y?" in files(tmp_path, "coupling")[0]["task"]["instruction"]
    assert main([*arguments, "--instruction", "{text}?"]) == 2
    assert "--instruction asks for labels" in capsys.readouterr().err


def test_a_rejuvenation_that_is_terminated_leaves_nothing(three, pairs, tmp_path, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("mifo.lab.rejuvenate._write", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    arguments = ["--base", three[0], "--over", three[2], "--data", pairs, "--out", str(tmp_path / "out")]
    assert main(["rejuvenate", *arguments]) == 130
    assert "mifo: interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_rejuvenate(three, pairs, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--base", three[0], "--over", three[2], "--data", pairs, "--out", str(out), "--targets", "2"]
    assert main(["rejuvenate", *arguments, "--rho", "0.02"]) == 0
    record, rows = files(out, "rejuvenation")
    assert record["settings"]["targets"] == 2
    assert len(rows) == 14
    shown = capsys.readouterr().out
    assert "neurons reset" in shown
    assert "mean entropy, rejuvenated" in shown
    assert load_file(out / "model.safetensors").keys() == load_file(f"{three[0]}/model.safetensors").keys()
    assert main(["rejuvenate", *arguments]) == 2
    assert "is there already and not empty" in capsys.readouterr().err


def test_without_matplotlib_everything_else_is_written(three, tmp_path, capsys, monkeypatch):
    importing = builtins.__import__

    def refuse(name, *rest, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return importing(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert main(["probe", "magnitude", *three[:2], "--out", str(tmp_path)]) == 0
    files(tmp_path, "magnitude", figure=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert NO_FIGURE in shown
    assert "pip install matplotlib" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["probe", "magnitude", "./nowhere", "./nowhere"], ["BEFORE = './nowhere' does not exist"]),
        (["probe", "overlap", "a", "b"], ["two phases need three"]),
        (["probe", "entropy", "./nowhere", "--data", "x.jsonl"], ["MODEL = './nowhere' does not exist"]),
        (["probe", "sparsify", "./nowhere", "./nowhere"], ["START = './nowhere' does not exist"]),
    ],
)
def test_mistakes(arguments, words, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("mifo: ")
    for word in words:
        assert word in message


def test_a_probe_is_needed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["probe"])
    assert caught.value.code == 2
    assert "PROBE" in capsys.readouterr().err
