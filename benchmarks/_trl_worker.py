"""GRPO steps of TRL in an environment of its own, one at a time on request. Started by `rl_step.py`; knows nothing of mifo.

Protocol: one line on standard input starts one step; every step answers with one JSON line on standard output:
{"cpu": seconds of all threads, "wall": seconds, "tokens": response tokens}. The first line out is {"ready": versions}.
A step is timed from the trainer's `on_step_begin` to its `on_step_end`: generation, rewards, forward, backward, optimizer.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

UNUSED_TOKEN = "<jupyter_script>"  # stands in for the end of sequence, so that every response has its full length

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever the libraries print must not mix with the answers


def answer(message: dict[str, Any]) -> None:
    """One JSON line to the parent."""
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def noise_reward(completions: list[Any], **_: Any) -> list[float]:
    """Rewards that differ within a group, so that no sequence has an advantage of zero."""
    return [source.random() for _ in completions]


source = random.Random(0)


class StepOnRequest(TrainerCallback):
    """Waits for a line before each step and reports the step."""

    def __init__(self, sequences: int) -> None:
        self.sequences = sequences
        self.pending: dict[str, Any] | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Say that the model is loaded."""
        names = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        answer({"ready": {f"peer_{name}": version for name, version in names.items()}})

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Wait, then start the clocks."""
        if not sys.stdin.readline():
            os._exit(0)  # the parent has what it wanted
        self.start = time.process_time(), time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clocks."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.pending = {"cpu": time.process_time() - self.start[0], "wall": time.perf_counter() - self.start[1]}

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """The token count comes with the log of the step."""
        if self.pending is not None and logs and "completions/mean_length" in logs:
            tokens = round(logs["completions/mean_length"] * self.sequences)
            answer({**self.pending, "tokens": tokens})
            self.pending = None


def main() -> None:
    """Train until the parent hangs up."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    tokenizer.eos_token = UNUSED_TOKEN
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert model.generation_config.eos_token_id is not None
    rows = [
        {"prompt": [{"role": "system", "content": job["system"]}, {"role": "user", "content": question}]}
        for question in job["questions"]
    ]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=job["batch"],
        gradient_accumulation_steps=job["accumulation"],
        num_generations=job["rollouts"],
        max_completion_length=job["new_tokens"],
        max_steps=job["steps"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        temperature=1.0,
        beta=0.0,
        bf16=True,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows * job["steps"]),
        reward_funcs=noise_reward,
        processing_class=tokenizer,
        callbacks=[StepOnRequest(job["batch"] * job["accumulation"])],
    )
    trainer.train()


if __name__ == "__main__":
    main()
