"""The whole road: a random model learns, the run folder says so, and the exported model is plain Hugging Face."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mifo.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`mifo train tiny`, as a user would call it: (folder, summary)."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", "tiny", "--run.folder", str(folder), "--run.name", "first", "--train.threads", "1"]) == 0
    return folder / "first", json.loads((folder / "first" / "summary.json").read_text())


def test_accuracy_rises_clearly(run):
    _, summary = run
    assert summary["accuracy_before"] <= 0.1
    assert summary["accuracy_after"] >= 0.5
    assert summary["accuracy_after_interval"][0] > summary["accuracy_before_interval"][1]


def test_summary_holds_what_the_table_shows(run):
    _, summary = run
    names = {
        "accuracy_before", "accuracy_after", "problems", "seconds", "sft_phases", "frozen_fraction", "demonstrations_used",
        "response_length_before", "response_length_after",
    }  # fmt: skip
    assert names <= summary.keys()
    assert summary["intervals"] == len(summary["sft_phases"]) >= 2
    for phase in summary["sft_phases"]:
        low, high = phase["change_interval"]
        assert low <= phase["after"] - phase["before"] <= high
        assert "before_by_problem" not in phase
        assert 0 <= phase["before"] <= 1
        assert 0 <= phase["after"] <= 1
    assert sum(phase["demonstrations"] for phase in summary["sft_phases"]) == summary["demonstrations_used"]
    assert 0 < summary["frozen_fraction"] <= 0.5


def test_ledger_agrees_with_the_metrics(run):
    folder, summary = run
    ledger = json.loads((folder / "ledger.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rl = [m for m in metrics if m["phase"] == "rl"]
    assert ledger["rl_tokens"] == sum(u["tokens"] for m in rl for u in m["updates"])
    assert ledger["sft_tokens"] == sum(u["tokens"] for m in metrics if m["phase"] == "sft" for u in m["updates"])
    assert ledger["updates"] == sum(len(m["updates"]) for m in metrics)
    assert ledger["rl_steps"] == summary["steps"] == rl[-1]["step"]
    trained = ledger["rl_fed_tokens"] + ledger["sft_fed_tokens"]
    assert ledger["training_flops"] == 6 * ledger["parameters"] * trained
    assert ledger["generation_flops"] == 2 * ledger["parameters"] * (
        ledger["generated_tokens"] + ledger["prefilled_tokens"]
    )


def test_exported_model_is_plain_hugging_face(run):
    folder, _ = run
    model = AutoModelForCausalLM.from_pretrained(folder / "export")
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    assert "mifo" not in (folder / "export" / "config.json").read_text()
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1="}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[0] == 1
    stored = json.loads((folder / "summary.json").read_text())
    assert stored["steps"] > 0
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_eval_of_the_run_repeats_its_figure(run, tmp_path):
    folder, summary = run
    target = tmp_path / "score.json"
    assert main(["eval", str(folder), "--json", str(target)]) == 0
    score = json.loads(target.read_text())
    assert score["accuracy"] == pytest.approx(summary["accuracy_after"])
    assert score["problems"] == summary["problems"]


def test_switches_of_the_engine_run_together(tmp_path):
    """KL to a reference, std, constant normaliser, padded rows, the other engine, grad_zero, shared moments: all at once."""
    from conftest_e2e import journal, run_small, small_config

    rate = {"learning_rate": 1e-3, "warmup_updates": 0, "schedule": "constant", "decay_updates": "none"}
    config = small_config(
        model={"layout": "padded", "activation_checkpointing": True},
        rollout={"engine": "generate", "batch_rows": 7, "top_p": 0.95},
        method={
            "freeze": "grad_zero",
            "optimizers": "shared",
            "buffer_order": "lifo",
            "token_denominator": "kept",
            "freeze_scope": "tensor",
            "rl": {"kl_coefficient": 0.1, "advantage_std": True, "normalizer": "constant", "dual_clip": 3.0},
        },
        rl_optimizer=rate,
        sft_optimizer=rate,
        train={"steps": 4},
        evaluation={"every_steps": 2, "samples": 2, "temperature": 0.6, "top_p": 0.9, "meter_problems": 4},
    )
    run = run_small(config, tmp_path / "run")
    metrics = journal(tmp_path / "run", "metrics")
    kl = [update["losses"]["kl"] for record in metrics if record["phase"] == "rl" for update in record["updates"]]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert kl[-1] > 0
    assert run.learner.policy.layout == "padded"
    events = journal(tmp_path / "run", "events")
    labels = [event["label"] for event in events if event["event"] == "evaluation"]
    assert {"before", "after", "step 2", "step 4", "forgetting meter"} <= set(labels)
    assert {event["problems"] for event in events if event.get("label") == "forgetting meter"} == {4}


@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_other_methods_run_in_the_same_engine(tmp_path, method):
    from conftest_e2e import run_small

    from mifo.config.decode import decode
    from mifo.config.schema import Config

    table = {
        "grpo": {"rl": {"prompts_per_step": 4, "rollouts_per_prompt": 4, "updates_per_step": 1}},
        "sft": {"batch_size": 4},
    }
    config = decode(
        Config,
        {
            "model": {"path": "tiny"},
            "data": {"families": ["tiny"], "train_problems": 20, "evaluation": "none"},
            "rollout": {"max_response_tokens": 12},
            "method": {"name": method, **table[method]},
            "train": {"steps": 3, "threads": 1},
            "run": {"export": False},
        },
    )
    run = run_small(config, tmp_path / "run")
    assert run.steps == 3
    assert run.ledger.updates == 3
    assert run.scores == {"before": None, "after": None}
    assert (run.ledger.sft_tokens > 0) == (method == "sft")
    assert (run.ledger.generated_tokens > 0) == (method == "grpo")
