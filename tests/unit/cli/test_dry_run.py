"""`--dry-run` of every recipe, on stand-ins of the formats it names."""

import pytest

from mifo.cli import main
from mifo.config.load import load_config, read_recipe, recipe_names

PAPER = ("qwen2.5-math-1.5b", "qwen2.5-math-7b", "llama-3.1-8b")
WHOLE = "smollm2-arithmetic"  # most have its [data]; a tenth of the problems is enough for them


@pytest.mark.parametrize("name", recipe_names())
def test_dry_run(
    name, model_folder, gsm8k_files, cola_files, verl_file, tmp_path, capsys, monkeypatch, no_model_is_loaded
):
    monkeypatch.chdir(tmp_path)
    flags = [] if name == "tiny" else ["--model.path", model_folder]
    data = load_config(name)[1].data
    if data.train == "gsm8k/train.jsonl":
        flags += ["--data.train", gsm8k_files[0], "--data.evaluation", gsm8k_files[1]]
    if data.labels:
        flags += ["--data.train", cola_files[0], "--data.evaluation", cola_files[1]]
    published = data.train not in ("embedded", "gsm8k/train.jsonl", "cola/train.jsonl")
    if name != WHOLE and read_recipe(name).tables["data"] == read_recipe(WHOLE).tables["data"]:
        flags += ["--data.train-problems", "250", "--data.evaluation-problems", "50"]
    if published:
        flags += ["--data.train", verl_file]
    if name == "dapo-qwen2.5-32b":  # longer than the stand-in's context
        flags += ["--rollout.max-response-tokens", "8192", "--evaluation.max-response-tokens", "8192"]
    if name.startswith("relift-") and "qwen" in name:
        flags += ["--method.buffer-size", "64"]  # of the 70 problems that there are
    assert main(["train", name, *flags, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "a prompt as the model sees it" in shown
    assert "its demonstration" in shown
    assert "memory in all" in shown
    assert f"the run goes to runs/{name}" in shown
    assert not list(tmp_path.iterdir())  # nothing is written
    if published:
        assert "70 training problems, 70 with a demonstration; 0 held out" in shown
    if published and data.template == "luffy":
        assert "User: This is the problem:\nWhat is" in shown
        assert "Assistant: <think>" in shown
    own = {"oat-zero-qwen2.5-math-7b": "<|im_start|>user\nWhat is", "orz-qwen2.5-7b": "</answer>. User: What is"}
    assert own.get(name, "") in shown
    if name in PAPER:
        assert "1078 steps" in shown
    if "lora" in name:
        assert "adapters, gradients, moments" in shown
    if name == "mifo-after-sft-smollm2":
        assert "for 64 steps" in shown or "64 steps would take" in shown
    if name == "gsm8k-smollm2":
        assert "70 training problems, 70 with a demonstration; 70 held out" in shown
        assert "\\boxed{" in shown
        assert "<<" not in shown
    if data.labels:
        assert "70 training problems, 70 with a demonstration; 70 held out" in shown
        assert "Sentence: It is 0 o'clock." in shown


def test_a_long_demonstration_is_shortened(model_folder, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    path.write_text('{"problem": "1+1?", "answer": "2", "demonstration": "' + "so " * 2000 + '\\\\boxed{2}"}')
    flags = ["--model.path", model_folder, "--data.train", str(path), "--data.evaluation", "none"]
    flags += ["--method.buffer-size", "1", "--method.sft-batch-size", "none"]
    assert main(["train", "smollm2-arithmetic", *flags, "--dry-run"]) == 0
    assert "more characters)" in capsys.readouterr().out


def test_a_context_that_is_too_short_is_found_without_weights(model_folder, capsys, no_model_is_loaded):
    flags = ["--model.path", model_folder, "--rollout.max-response-tokens", "16384"]
    assert main(["train", "smollm2-arithmetic", *flags, "--dry-run"]) == 2
    message = capsys.readouterr().err
    assert "rollout.max_response_tokens = 16384" in message
    assert "has 16384. Lower max_response_tokens or data.max_prompt_tokens, or raise model.context" in message
