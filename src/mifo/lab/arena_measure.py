"""What is measured of a finished run before its weights are thrown away: problems of other kinds, and how far it moved.

    python -m mifo.lab.arena_measure RUN_FOLDER [--ood embedded:ood --problems 200]

Writes measured.json into the run folder. Movement is ‖θ − θ_0‖₂ over all parameters (tied ones once), and the same relative to
‖θ_0‖₂; exported tensors are read one at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mifo.config.check import check_config
from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.errors import MifoError, ModelError
from mifo.eval.score import check_evaluation_fits, evaluate, evaluation_sampling
from mifo.lab.arena_results import MEASURED
from mifo.train.build import build_engine, make_chat, make_grader, verifier
from mifo.train.checkpoint import read_json
from mifo.train.corpus import read_evaluation
from mifo.train.device import pick_device, pick_dtype, set_up_cpu
from mifo.train.model import load_model, load_tokenizer
from mifo.train.storage import Storage, replace_file


def measure(folder: Path, *, ood: str | None, problems: int) -> dict[str, Any]:
    """The content of measured.json.

    Args:
        folder: a finished run with its exported model.
        ood: held-out problems as in data.evaluation; None for none.
        problems: how many of them.

    Raises:
        MifoError: there is no exported model, or the problems do not fit it.
    """
    config = decode(Config, read_json(folder / "config.json"))
    set_up_cpu(config.train.threads)
    place = {"place": "none", "problems": 0} if ood is None else {"place": ood, "problems": problems}
    found: dict[str, Any] = {"movement": _movement(config, folder / "export"), "ood_data": place}
    if ood is not None:
        found["ood"] = verdicts(for_problems(config, folder / "export", ood, problems))
    return found


def _movement(config: Config, export: Path) -> Mapping[str, float]:
    start = load_model(config.model, seed=config.train.seed)
    return movement({name: p.detach() for name, p in start.named_parameters()}, export)


def movement(start: Mapping[str, torch.Tensor], export: Path) -> Mapping[str, float]:
    """How far exported weights are from those of the start.

    Args:
        start: parameters by name, each tied one once.
        export: a Hugging Face folder.

    Returns:
        "l2" ‖θ − θ_0‖₂, and "relative" to ‖θ_0‖₂; sums in double precision.

    Raises:
        ModelError: the folder lacks a parameter.
    """
    left, moved, norm = set(start), 0.0, 0.0
    for file in sorted(export.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in sorted(left & set(weights.keys())):
                before, after = start[name].double(), weights.get_tensor(name).double()
                moved += float((after - before).square().sum())
                norm += float(before.square().sum())
                left.remove(name)
    if left:
        raise ModelError(
            f"{export} lacks {len(left)} parameters of the model, such as '{min(left)}'. Export the run again."
        )
    return {"l2": math.sqrt(moved), "relative": math.sqrt(moved / norm) if norm else 0.0}


def for_problems(config: Config, export: Path, data: str, problems: int) -> Config:
    """A run's configuration with its exported model and other held-out problems.

    Args:
        config: of the run.
        export: its Hugging Face folder.
        data: the problems, as in data.evaluation.
        problems: how many of them.

    Raises:
        ConfigError: the settings do not go together.
    """
    model = replace(config.model, path=str(export), revision=None, rope_theta=None, context=None)
    changed = replace(config, model=model, data=replace(config.data, evaluation=data, evaluation_problems=problems))
    changed = replace(
        changed, evaluation=replace(config.evaluation, every_steps=None, every_flops=None, meter_problems=None)
    )
    check_config(changed)
    return changed


def verdicts(config: Config) -> Mapping[str, float]:
    """Share of correct responses to each held-out problem, by the problem's id.

    Raises:
        MifoError: the model cannot be loaded, or the problems do not fit it.
    """
    device = pick_device(config.model.device)
    with make_grader(config) as grader:
        chat = make_chat(config, load_tokenizer(config.model))
        problems, _ = read_evaluation(config.data, verifier(grader))
        grader.require({problem.grader for problem in problems})
        model = load_model(config.model).to(device)
        check_evaluation_fits(model.config.max_position_embeddings, chat, problems, config)
        score = evaluate(
            build_engine(model, config, device, pick_dtype(config.model.compute, device)),
            problems,
            chat=chat,
            grader=grader,
            sampling=evaluation_sampling(config, chat),
            samples=config.evaluation.samples,
        )
    return dict(score.by_problem)


def main(arguments: list[str] | None = None) -> int:
    """Measure one run; returns 0, or 2 with a message where that is not possible."""
    parser = argparse.ArgumentParser(prog="python -m mifo.lab.arena_measure")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ood")
    parser.add_argument("--problems", type=int, default=200)
    known = parser.parse_args(arguments)
    try:
        found = measure(known.folder, ood=known.ood, problems=known.problems)
    except MifoError as error:
        print(f"mifo: {error}", file=sys.stderr)
        return 2
    replace_file(Storage(), known.folder / MEASURED, json.dumps(found).encode("utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
