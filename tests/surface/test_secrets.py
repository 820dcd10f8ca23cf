"""Secrets of the environment are in no file of a run, in no log, and in no message: a whole run in a process of its own.

Training and measuring share that process: what it imports, reads and writes is the same, and starting takes most of the time.
"""

import os
import subprocess
import sys

NAMES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "OPENAI_API_KEY",
    "GITHUB_TOKEN", "DATABASE_URL", "SSH_AUTH_SOCK", "MY_PASSWORD",
)  # fmt: skip
SECRETS = {name: f"canary-{i}-0f9c2b7e" for i, name in enumerate(NAMES)}
TRAIN = (
    "train tiny --train.steps 2 --run.checkpoint-steps 1 --run.samples-per-step 20 --run.name r --method.rl.prompts-per-step 8 "
    "--method.buffer-size 8 --data.evaluation-problems 4"
)
MEASURE = "eval runs/r --json figures.json"
BOTH = f"""
from mifo.cli import main
for words in ({TRAIN!r}, {MEASURE!r}):
    status = main(words.split())
    assert status == 0, (words, status)
"""


def holding_a_secret(folder):
    values = [value.encode() for value in SECRETS.values()]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    return [path for path in files if any(value in path.read_bytes() for value in values)]


def test_no_secret_in_any_artefact(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in NAMES} | SECRETS
    command = [sys.executable, "-c", BOTH]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr
    assert b"accuracy" in shown
    assert not any(value.encode() in shown for value in SECRETS.values())
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert {".safetensors", ".json", ".jsonl"} <= kinds  # checkpoints, exports and logs were there to be searched
    assert len(list((tmp_path / "runs" / "r" / "checkpoints").iterdir())) == 2
    assert (tmp_path / "figures.json").is_file()
    assert holding_a_secret(tmp_path) == []
    (tmp_path / "leak.safetensors").write_bytes(b"\x00" + SECRETS["HF_TOKEN"].encode())
    assert holding_a_secret(tmp_path) == [tmp_path / "leak.safetensors"]  # the search finds one that is there
