"""A tiny MIFO run, configured in one place and run in process."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from mifo.config.check import check_config
from mifo.config.decode import decode, encode
from mifo.config.schema import Config
from mifo.data.chartok import char_tokenizer
from mifo.eval.score import make_evaluate
from mifo.train.build import build_run, make_grader, prepare
from mifo.train.loop import train

SMALL = {
    "model": {"path": "tiny", "compute": "float32"},
    "data": {"families": ["tiny"], "train_problems": 30, "evaluation_problems": 10},
    "rollout": {"max_response_tokens": 12},
    "method": {
        "name": "mifo",
        "buffer_size": 6,
        "sft_batch_size": 4,
        "token_fraction": 0.5,
        "rl": {"prompts_per_step": 4, "rollouts_per_prompt": 4, "updates_per_step": 2, "entropy_coefficient": 0.01},
    },
    "rl_optimizer": {"learning_rate": 1e-3, "warmup_updates": 3, "schedule": "cosine", "decay_updates": 30},
    "sft_optimizer": {"learning_rate": 3e-3},
    "train": {"steps": 6, "threads": 1, "micro_batch_tokens": 64},
    "run": {"checkpoint_steps": 1, "keep_checkpoints": 100, "export": False},
}


def small_config(**tables) -> Config:
    """The small run with some tables changed, key by key."""
    plain = encode(decode(Config, SMALL))
    for table, changes in tables.items():
        for key, value in changes.items():
            plain[table][key] = plain[table][key] | value if isinstance(value, dict) else value
    config = decode(Config, plain)
    check_config(config)
    return config


def run_small(config, folder, *, resume=False, listener=lambda stream, record: None, before=None):
    """Train in `folder`; returns the finished run. `before(run)` may change it first."""
    with make_grader(config) as grader:
        run = build_run(
            prepare(config, grader), grader, folder, make_evaluate=make_evaluate, listener=listener, resume=resume
        )
        if before is not None:
            before(run)
        train(run)
    return run


ABLE_DATA = {"families": ["tiny"], "levels": 1, "train_problems": 16, "evaluation": "none"}


def able_model(folder, steps=50):
    """The path of a folder with the tiny model after some SFT: it solves some of the problems of `ABLE_DATA`, not most."""
    config = decode(
        Config,
        {
            "model": {"path": "tiny", "compute": "float32"},
            "data": ABLE_DATA,
            "rollout": {"max_response_tokens": 12},
            "method": {"name": "sft", "batch_size": 16},
            "sft_optimizer": {"learning_rate": 3e-3, "beta2": 0.95, "weight_decay": 0.0},
            "train": {"steps": steps, "threads": 1},
            "run": {"checkpoint_steps": "none", "export": False},
        },
    )
    run = run_small(config, folder / "sft")
    run.learner.policy.model.save_pretrained(folder / "model")
    char_tokenizer().save_pretrained(folder / "model")
    return str(folder / "model")


def without_times(value):
    """A record without what differs between two runs of the same bits: wall times."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("elapsed", "seconds", "tokens_per_second")}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def journal(folder, stream):
    """Records of a JSONL file of a run folder, without times."""
    return [without_times(json.loads(line)) for line in (folder / f"{stream}.jsonl").read_text().splitlines()]


def cut_back(source, target, iteration):
    """A copy of a run folder as a crash after checkpoint `iteration` would leave it, with all later log lines."""
    target.mkdir()
    for name in ("config.json", "metrics.jsonl", "samples.jsonl", "events.jsonl", "evaluations.jsonl"):
        if (source / name).exists():  # a run that measures nothing writes no evaluations
            shutil.copy(source / name, target / name)
    kept = f"step-{iteration:06d}"
    shutil.copytree(source / "checkpoints" / kept, target / "checkpoints" / kept)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """One uninterrupted small run: (folder, run)."""
    folder = tmp_path_factory.mktemp("small") / "run"
    return folder, run_small(small_config(), folder)


def replaced(config, table, **changes):
    """`dataclasses.replace` one level down."""
    return dataclasses.replace(config, **{table: dataclasses.replace(getattr(config, table), **changes)})
