"""`mifo eval` on a model folder and on a run folder."""

import json

import pytest

from mifo.cli import main
from mifo.config.decode import encode
from mifo.config.load import load_config
from mifo.data.chartok import char_tokenizer
from mifo.data.tasks import INSTRUCTION
from mifo.train.model import tiny_model


@pytest.fixture
def run_folder(tmp_path):
    """A finished run: its configuration and its exported model."""
    _, config = load_config("tiny", ["--train.threads", "1"])
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(encode(config)))
    tiny_model().save_pretrained(folder / "export")
    char_tokenizer().save_pretrained(folder / "export")
    return folder


def test_a_run_brings_its_data_settings_and_length(run_folder, tmp_path, capsys, monkeypatch):
    prompts = []
    render = "mifo.data.chat.Chat.render"
    from mifo.data.chat import Chat

    original = Chat.render
    monkeypatch.setattr(render, lambda chat, problem: prompts.append(original(chat, problem)) or prompts[-1])
    figures = tmp_path / "figures.json"
    assert main(["eval", str(run_folder), "--limit", "5", "--json", str(figures)]) == 0
    shown = capsys.readouterr().out
    assert "split validation (tiny)" in shown
    assert "95 % interval" in shown
    assert "for 5 problems" in shown
    record = json.loads(figures.read_text())
    assert record["problems"] == 5
    assert record["data"] == "embedded:validation"  # what the run was measured on
    assert record["model"] == str(run_folder)
    assert record["response_length"] <= 12  # the run's longest response, not the default of 512
    assert prompts[-1].startswith("<bos><user>")  # no system turn: the run had none


def test_a_model_folder_is_told_to_box_answers_on_embedded_data(run_folder, tmp_path, capsys, monkeypatch):
    seen = []
    import mifo.train.build

    original = mifo.train.build.Chat

    def spy(tokenizer, template, system_prompt, generation_eos, **more):
        seen.append((template, system_prompt))
        return original(tokenizer, template, system_prompt, generation_eos, **more)

    monkeypatch.setattr(mifo.train.build, "Chat", spy)
    model = str(run_folder / "export")
    assert main(["eval", model, "--limit", "9", "--max-tokens", "4"]) == 0
    assert "system prompt: " + INSTRUCTION in capsys.readouterr().out
    own = tmp_path / "own.jsonl"
    own.write_text('{"problem": "1+1?", "answer": "2"}')
    assert main(["eval", model, "--data", str(own), "--max-tokens", "4"]) == 0
    assert "system prompt" not in capsys.readouterr().out
    assert main(["eval", model, "--limit", "9", "--max-tokens", "4", "--system-prompt", "Hm."]) == 0
    assert seen == [("tokenizer", INSTRUCTION), ("tokenizer", None), ("tokenizer", "Hm.")]


def test_other_data_than_the_run_had(run_folder, tmp_path, capsys):
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(json.dumps({"problem": f"{i}+1?", "answer": str(i + 1)}) for i in range(20)))
    assert main(["eval", str(run_folder), "--data", str(own)]) == 0
    assert "for 20 problems" in capsys.readouterr().out  # all of a file, not the 13 of the run
    assert main(["eval", str(run_folder), "--data", "embedded", "--limit", "7"]) == 0
    assert "split test (tiny)" in capsys.readouterr().out


def test_a_run_without_held_out_problems_needs_data(run_folder, capsys):
    stored = json.loads((run_folder / "config.json").read_text())
    stored["data"]["evaluation"] = "none"
    (run_folder / "config.json").write_text(json.dumps(stored))
    assert main(["eval", str(run_folder)]) == 2
    assert "was trained without held-out problems. Name some with --data." in capsys.readouterr().err


def test_a_context_that_is_too_short(run_folder, capsys):
    assert main(["eval", str(run_folder / "export"), "--limit", "9"]) == 2
    message = capsys.readouterr().err
    assert "--max-tokens = 512 do not fit the 256 positions" in message
    assert "Lower --max-tokens to" in message


def test_a_prompt_that_fills_the_context_is_not_helped_by_fewer_tokens(run_folder, tmp_path, capsys):
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"id": "long-one", "problem": "7" * 300, "answer": "7"}))
    assert main(["eval", str(run_folder / "export"), "--data", str(own), "--max-tokens", "4"]) == 2
    message = capsys.readouterr().err
    assert "the prompt of problem 'long-one' has" in message
    assert "Leave such problems out" in message
    assert "Lower --max-tokens" not in message


def test_figures_that_cannot_be_written_are_an_error_that_names_the_file(run_folder, tmp_path, capsys):
    assert main(["eval", str(run_folder), "--limit", "2", "--json", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert f"--json {tmp_path}: cannot be written (Is a directory)" in shown.err
    assert "accuracy" in shown.out
