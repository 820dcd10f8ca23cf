"""One GRPO step, side by side with TRL's GRPOTrainer: rollouts, policy gradient, AdamW, weights back to the sampler.

Both take SmolLM2-135M-Instruct in fp32 with bfloat16 autocast, 8 prompts × 8 rollouts × 64 new tokens, rewards of seeded
noise (so no group is all-equal and none is skipped), responses of full length, AdamW (fused), one update a step. TRL runs
in an interpreter of its own with the same threads, malloc and OpenMP settings; steps alternate between the two, the
first ones are not counted. TRL generates with transformers, its default.

`--settings` names per-device batch x accumulation for TRL; when there are several, each takes a trial step and the fastest
is measured. The first use makes a virtual environment with pinned versions under the user's cache.

    python benchmarks/rl_step.py
    OMP_NUM_THREADS=2 python benchmarks/rl_step.py --settings 8x8,16x4,64x1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import (
    DEFAULT_MODEL,
    MALLOC_ENVIRONMENT,
    SYSTEM_PROMPT,
    Seconds,
    chat_prompts,
    median_seconds,
    model_label,
    plain,
    publish,
    questions,
    resolve_model,
    set_up,
    timed,
)

import torch  # isort: skip  # after _common, which sets the environment that torch reads

from mifo.config.schema import ModelConfig, OptimizerConfig, PolicyGradientConfig
from mifo.methods.grpo import policy_gradient_updates
from mifo.rollout.engine import make_engine
from mifo.train.learner import Learner
from mifo.train.model import load_model, load_tokenizer
from mifo.train.optim import ScheduledAdamW
from mifo.train.policy import Policy
from mifo.types import Group, Problem, Sampling, Verdict

PROMPTS, ROLLOUTS, NEW_TOKENS = 8, 8, 64
TOKENS = PROMPTS * ROLLOUTS * NEW_TOKENS
LEARNING_RATE = 1e-6
MICRO_BATCH_TOKENS = 8192
WARM_UP = 2
PINNED = ("trl==1.16.0", "torch==2.13.0", "transformers==5.23.0", "datasets", "accelerate")


class OwnStep:
    """mifo's side: the components of a run, without its bookkeeping."""

    def __init__(self, path: str, device: torch.device) -> None:
        config = ModelConfig(path=path)
        self.prompts = chat_prompts(load_tokenizer(config), PROMPTS)
        self.model = load_model(config).to(device)
        self.learner = Learner(Policy(self.model, compute_dtype=torch.bfloat16), micro_batch_tokens=MICRO_BATCH_TOKENS)
        self.engine = make_engine(self.model, kind="local", dtype=torch.bfloat16, device=device)
        self.optimizer = ScheduledAdamW(
            self.learner.parameters, OptimizerConfig(learning_rate=LEARNING_RATE, weight_decay=0.0)
        )
        self.rl = PolicyGradientConfig(
            prompts_per_step=PROMPTS,
            rollouts_per_prompt=ROLLOUTS,
            updates_per_step=1,
            advantage_std=True,
            entropy_coefficient=0.0,
        )
        self.noise = random.Random(0)
        self.steps = 0
        self.parts: list[dict[str, Seconds]] = []

    def __call__(self, device: torch.device) -> int:
        """One step; returns the response tokens that were trained on."""
        self.steps += 1
        sampling = Sampling(max_tokens=NEW_TOKENS)
        rollout, found = timed(lambda: self.engine.generate(self.prompts, ROLLOUTS, sampling, self.steps), device)
        groups = [
            Group(
                problem=Problem(id=str(index), messages=(), answer=""),
                prompt_ids=prompt,
                rollouts=rollouts,
                verdicts=(Verdict.WRONG,) * ROLLOUTS,
                rewards=tuple(self.noise.random() for _ in rollouts),
            )
            for index, (prompt, rollouts) in enumerate(zip(self.prompts, found, strict=True))
        ]
        (update,) = policy_gradient_updates(self.rl, groups, NEW_TOKENS)
        train, report = timed(lambda: self.learner.apply(update, self.optimizer), device)
        sync, _ = timed(lambda: self.engine.update(self.model, self.steps), device)
        self.parts.append({"rollout": rollout, "train": train, "sync": sync})
        assert report.trained_sequences == PROMPTS * ROLLOUTS
        return report.tokens


@dataclass(frozen=True, slots=True)
class Setting:
    """How TRL splits the 64 sequences of a step."""

    batch: int
    accumulation: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.accumulation}"


class Peer:
    """TRL in a process of its own; a step runs when asked for."""

    def __init__(self, python: Path, model: str, setting: Setting, steps: int) -> None:
        job = {
            "model": model,
            "system": SYSTEM_PROMPT,
            "questions": questions(PROMPTS),
            "rollouts": ROLLOUTS,
            "new_tokens": NEW_TOKENS,
            "batch": setting.batch,
            "accumulation": setting.accumulation,
            "steps": steps,
            "learning_rate": LEARNING_RATE,
            "threads": torch.get_num_threads(),
        }
        self.process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("_trl_worker.py")), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **MALLOC_ENVIRONMENT, "HF_HUB_OFFLINE": "1"},
        )
        self.versions: dict[str, str] = self._read()["ready"]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"rl_step: the TRL process ended with status {self.process.wait()}; its messages are above.")
        return json.loads(line)

    def step(self) -> tuple[Seconds, int]:
        """One step: (seconds, response tokens)."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        found = self._read()
        return Seconds(found["cpu"], found["wall"]), found["tokens"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def trl_python(given: Path | None) -> Path:
    """The interpreter that has TRL; made on first use unless one is given."""
    cache = os.environ.get("MIFO_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "mifo")
    folder = Path(cache).expanduser() / "bench-trl"
    python = given or folder / "bin" / "python"
    if not python.exists() and given is None:
        print(f"making {folder} with {', '.join(PINNED)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        installed = subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PINNED], check=False)
        if installed.returncode:
            sys.exit(
                f"rl_step: installing {' '.join(PINNED)} failed. Name an interpreter that has them with --trl-python."
            )
    check = subprocess.run([str(python), "-c", "import trl, datasets, accelerate"], check=False)
    if check.returncode:
        sys.exit(f"rl_step: {python} cannot import trl, datasets and accelerate. Remove {folder} or give --trl-python.")
    return python


def try_settings(python: Path, model: str, settings: list[Setting]) -> dict[Setting, Seconds]:
    """The second step of each setting."""
    found = {}
    for setting in settings:
        peer = Peer(python, model, setting, steps=2)
        peer.step()
        found[setting], _ = peer.step()
        peer.close()
        print(f"TRL {setting}: {found[setting]}", file=sys.stderr)
    return found


def parse_settings(text: str) -> list[Setting]:
    """`8x8,16x4` as settings; each must make one step of all sequences."""
    settings = [Setting(*(int(n) for n in part.split("x"))) for part in text.split(",")]
    for setting in settings:
        if setting.batch * setting.accumulation != PROMPTS * ROLLOUTS:
            sys.exit(f"rl_step: --settings {setting} is not {PROMPTS * ROLLOUTS} sequences a step.")
    return settings


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="model folder or name")
    parser.add_argument(
        "--trl-python", type=Path, help="interpreter that has TRL; default: made under the user's cache"
    )
    parser.add_argument(
        "--settings",
        default="16x4",
        help="TRL's batch x accumulation; several are tried (default 16x4, its fastest here)",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the JSON object here instead")
    arguments = parser.parse_args()

    device = set_up()
    settings = parse_settings(arguments.settings)
    python, path = trl_python(arguments.trl_python), resolve_model(arguments.model)
    tried = try_settings(python, path, settings) if len(settings) > 1 else {}
    best = min(tried, key=lambda s: tried[s].wall if device.type == "cuda" else tried[s].cpu) if tried else settings[0]
    own, peer = OwnStep(path, device), Peer(python, path, best, steps=WARM_UP + arguments.repeats)
    runs: dict[str, list[Seconds]] = {"mifo": [], "trl": []}
    tokens = {}
    for step in range(WARM_UP + arguments.repeats):
        own_seconds, tokens["mifo"] = timed(lambda: own(device), device)
        peer_seconds, tokens["trl"] = peer.step()
        print(f"step {step}: mifo {own_seconds} {own.parts[-1]}, TRL {peer_seconds} {tokens}", file=sys.stderr)
        if step >= WARM_UP:
            runs["mifo"].append(own_seconds)
            runs["trl"].append(peer_seconds)
    peer.close()
    parts = {
        name: plain([median_seconds([part[name] for part in own.parts[WARM_UP:]])])
        for name in ("rollout", "train", "sync")
    }
    result = compare(runs, tokens, device) | {
        "mifo": {**plain(runs["mifo"]), "tokens": tokens["mifo"], "parts": parts},
        "trl": {
            **plain(runs["trl"]),
            "tokens": tokens["trl"],
            "setting": str(best),
            "tried": {str(setting): plain([seconds]) for setting, seconds in tried.items()},
        },
        "model": model_label(arguments.model),
        "versions": peer.versions,
    }
    name = "rl_step" if torch.get_num_threads() == 1 else f"rl_step_{torch.get_num_threads()}_threads"
    publish(name, result, device, arguments.out)


def compare(runs: dict[str, list[Seconds]], tokens: dict[str, int], device: torch.device) -> dict[str, Any]:
    """Ratios TRL / mifo per response token, which both should have the same number of."""
    own, peer = median_seconds(runs["mifo"]), median_seconds(runs["trl"])
    share = tokens["mifo"] / tokens["trl"]
    cpu, wall = share * peer.cpu / own.cpu, share * peer.wall / own.wall
    return {
        "ratio": round(wall if device.type == "cuda" else min(cpu, wall), 2),
        "ratio_cpu": round(cpu, 2),
        "ratio_wall": round(wall, 2),
        "workload": f"{PROMPTS} prompts x {ROLLOUTS} rollouts x {NEW_TOKENS} tokens, temperature 1, bfloat16 autocast, "
        "fp32 weights, AdamW, no group skipped",
    }


if __name__ == "__main__":
    main()
