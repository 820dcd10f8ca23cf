"""Secrets of the environment are in no file of a run, in no log, and in no message: a whole run in a process of its own."""

import os
import subprocess
import sys

import pytest

NAMES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "OPENAI_API_KEY",
    "GITHUB_TOKEN", "DATABASE_URL", "SSH_AUTH_SOCK", "MY_PASSWORD",
)  # fmt: skip
SECRETS = {name: f"canary-{i}-0f9c2b7e" for i, name in enumerate(NAMES)}


def run(folder, *arguments):
    environment = {k: v for k, v in os.environ.items() if k not in NAMES} | SECRETS
    command = [sys.executable, "-m", "mifo.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=300, check=False)


def holding_a_secret(folder):
    values = [value.encode() for value in SECRETS.values()]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    return [path for path in files if any(value in path.read_bytes() for value in values)]


@pytest.mark.slow
def test_no_secret_in_any_artefact(tmp_path):
    steps = ["--train.steps", "2", "--run.checkpoint-steps", "1", "--run.samples-per-step", "20", "--run.name", "r"]
    trained = run(tmp_path, "train", "tiny", *steps)
    assert trained.returncode == 0, trained.stderr
    measured = run(tmp_path, "eval", "runs/r", "--json", "figures.json")
    assert measured.returncode == 0, measured.stderr
    shown = b"".join(done.stdout + done.stderr for done in (trained, measured))
    assert not any(value.encode() in shown for value in SECRETS.values())
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert {".safetensors", ".json", ".jsonl"} <= kinds  # checkpoints, exports and logs were there to be searched
    assert holding_a_secret(tmp_path) == []
    (tmp_path / "leak.safetensors").write_bytes(b"\x00" + SECRETS["HF_TOKEN"].encode())
    assert holding_a_secret(tmp_path) == [tmp_path / "leak.safetensors"]  # the search finds one that is there
