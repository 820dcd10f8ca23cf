"""What a finished run says of itself: summary.json, the exported model, and the figures of the closing table."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer

from mifo.config.legacy import in_force
from mifo.config.schema import REJUVENATE
from mifo.errors import CheckpointError
from mifo.train.run import Run
from mifo.train.storage import replace_file, sync_files

log = logging.getLogger(__name__)


def summarise(run: Run) -> dict[str, Any]:
    """The figures of a run as plain data; shares are in [0, 1], lengths in tokens."""
    before, after = run.scores.get("before"), run.scores.get("after")
    ledger = run.ledger.summary()
    phases = [meter for meter in run.meters if "after" in meter]
    return {
        "method": run.config.method_name,
        "stages": _stages(run),
        "legacy": in_force(run.config.legacy),
        "accuracy_before": _get(before, "accuracy"),
        "accuracy_before_interval": _interval(before),
        "accuracy_after": _get(after, "accuracy"),
        "accuracy_after_interval": _interval(after),
        "by_source_before": _get(before, "by_source"),
        "by_source_after": _get(after, "by_source"),
        "problems": _get(after, "problems"),
        "response_length_before": _get(before, "response_length"),
        "response_length_after": _get(after, "response_length"),
        "truncated_after": _get(after, "truncated"),
        "steps": run.steps,
        "planned_steps": run.config.steps,
        "ended_by": _ended_by(run),
        "rl_steps": ledger["rl_steps"],
        "sft_steps": ledger["sft_steps"],
        "intervals": len(phases),
        "sft_phases": phases,
        "rejuvenations": run.rejuvenations,
        "frozen_fraction": phases[-1]["frozen_fraction"] if phases else 0.0,
        "demonstrations_used": ledger["demonstrations_used"],
        "unique_demonstrations": ledger["unique_demonstrations"],
        "unique_problems": ledger["unique_problems"],
        "generated_tokens": ledger["generated_tokens"],
        "rl_tokens": ledger["rl_tokens"],
        "sft_tokens": ledger["sft_tokens"],
        "parameters": ledger["parameters"],
        "tokens": run.ledger.tokens,
        "flops": run.ledger.flops,
        "data": run.parts.corpus.fingerprint,
        "seconds": run.elapsed,
        "seconds_by_part": ledger["seconds"],
        "verdicts": dict(run.grader_counts),
    }


def _ended_by(run: Run) -> str:
    """The setting of the [train] table that ended the run."""
    by_steps = run.steps >= run.config.steps
    return "steps" if by_steps else run.ledger.spent(run.config.train, run.elapsed / 60) or "steps"


def _stages(run: Run) -> list[dict[str, Any]]:
    """What each stage that was begun was and what accuracy it ended with; [] for a run of one method."""
    if not run.config.stages:
        return []
    present = run.config.stage_numbers[run.stage]
    stages = []
    for number, stage in enumerate(run.config.stages[:present], 1):
        end = run.scores.get(f"after stage {number}" if number < present else "after")
        steps = stage.steps if number < present else run.steps - run.stage_began
        rejuvenates = stage.rejuvenate is not None
        stages.append(
            {
                "stage": number,
                "method": REJUVENATE if rejuvenates else stage.method.name,
                "steps": 0 if rejuvenates else steps,
                "accuracy_after": _get(end, "accuracy"),
                "accuracy_after_interval": _interval(end),
            }
        )
    return stages


def _get(score: dict[str, Any] | None, name: str) -> Any:
    return None if score is None else score[name]


def _interval(score: dict[str, Any] | None) -> list[float] | None:
    return None if score is None else [score["accuracy_low"], score["accuracy_high"]]


def write_results(run: Run) -> dict[str, Any]:
    """Export the model, then write ledger.json and summary.json; returns the summary.

    Raises:
        CheckpointError: the system refused.
    """
    summary = summarise(run)
    try:
        if run.config.run.export:
            export_model(run)
        for name, value in (("ledger.json", run.ledger.summary()), ("summary.json", summary)):
            replace_file(run.parts.storage, run.parts.folder / name, json.dumps(value, indent=2).encode("utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{run.parts.folder}: the results could not be written ({error.strerror or error}). The run is finished and "
            "saved: mend that (free space, permissions, the disk), then write them with --resume."
        ) from error
    return summary


def export_model(run: Run) -> None:
    """A plain Hugging Face folder: weights in fp32, tokenizer with its chat template, nothing of this project in it.

    It gets its name when it is whole, and on the disk. Raises OSError.
    """
    folder = run.parts.folder / "export"
    staging = folder.with_name("writing-export")
    shutil.rmtree(staging, ignore_errors=True)
    if staging.is_symlink():  # nothing is written through one
        staging.unlink()
    try:
        run.learner.policy.model.save_pretrained(staging)
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(str(error)) from error
    run.parts.chat.tokenizer.save_pretrained(staging)
    for weights in staging.glob("*.safetensors"):  # the library's are for their owner alone
        weights.chmod((staging / "config.json").stat().st_mode)
    sync_files(staging)
    if folder.is_dir():
        shutil.rmtree(folder)
    staging.rename(folder)
    run.parts.storage.sync_folder(folder.parent)
    _check_tokenizer(run, folder)


def _check_tokenizer(run: Run, folder: Path) -> None:
    """Warn where transformers would read the exported tokenizer as another one than trained with.

    For some architectures AutoTokenizer puts a class of its own in the place of a plain tokenizer.json (seen with Qwen2).
    """
    theirs, ours = AutoTokenizer.from_pretrained(folder), run.parts.chat.tokenizer
    text = "".join(run.parts.chat.render(problem) for problem in run.parts.corpus.train[:8])
    if theirs.encode(text, add_special_tokens=False) != ours.encode(text, add_special_tokens=False):
        log.warning(
            "AutoTokenizer reads %s as a %s, which splits text differently; load it with PreTrainedTokenizerFast.from_pretrained",
            folder,
            type(theirs).__name__,
        )
