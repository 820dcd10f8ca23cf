"""What the verbs do, once everything heavy may be imported."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mifo.config.decode import decode
from mifo.config.load import Recipe
from mifo.config.schema import Config, DataConfig, EvaluationConfig, MifoMethod, ModelConfig, RolloutConfig
from mifo.data.tasks import INSTRUCTION
from mifo.errors import ConfigError, ModelError
from mifo.eval.score import check_evaluation_fits, evaluate, evaluation_sampling, make_evaluate
from mifo.signals import EXIT_STOPPED, stopping_on_signals
from mifo.train.build import (
    Prepared,
    build_engine,
    build_run,
    check_suitable,
    make_chat,
    make_grader,
    prepare,
    verifier,
)
from mifo.train.checkpoint import STATE, read_json
from mifo.train.console import RunDisplay, Screen, clock, closing_table
from mifo.train.corpus import EMBEDDED_SPLITS, read_evaluation
from mifo.train.device import pick_device, pick_dtype, set_up_cpu
from mifo.train.estimate import GIB, Estimate, estimate
from mifo.train.folder import check_folder, check_never_saved, open_checkpoints
from mifo.train.lock import FolderLock
from mifo.train.loop import train
from mifo.train.metrics import score_record
from mifo.train.model import TINY, load_model, load_tokenizer
from mifo.train.storage import Storage
from mifo.train.summary import write_results
from mifo.types import Score

EVAL_TOKENS = 512
SHOWN_CHARACTERS = 1500


def run_folder(recipe: Recipe, config: Config) -> Path:
    """Where a run of this recipe lives."""
    return Path(config.run.folder) / (config.run.name or recipe.name)


def train_command(recipe: Recipe, config: Config, *, flags: Sequence[str] = (), resume: bool) -> int:
    """`mifo train`: prepare, train, export, and say how it went; returns the exit status.

    Args:
        recipe: as `load_config` gave it.
        config: with the flags on top.
        flags: what the user wrote after the recipe, for the commands that are suggested.
        resume: continue the run in the folder.
    """
    console = Screen()
    folder = run_folder(recipe, config)
    check_folder(folder, config, resume=resume)
    with FolderLock(folder, enabled=config.run.lock), make_grader(config) as grader:
        prepared = prepare(config, grader)
        for note in prepared.corpus.notes:
            console.print(note, highlight=False, markup=False)
        display = RunDisplay(console, steps=config.steps, minutes=config.train.minutes)
        run = build_run(prepared, grader, folder, make_evaluate=make_evaluate, listener=display, resume=resume)
        console.print(
            f"{'resuming' if resume else 'training'} {config.model.path} with {config.method_name} on "
            f"{run.learner.policy.device} ({run.learner.policy.compute_dtype}, {run.learner.policy.layout}) in {folder}",
            highlight=False,
        )
        with display, stopping_on_signals(run.stop):
            train(run)
        if run.stop.signal is not None:
            again = command_line(recipe, flags, "--resume")
            console.print(f"stopped and saved; continue with: {again}", highlight=False, markup=False)
            return EXIT_STOPPED[run.stop.signal]
        summary = write_results(run)
    console.print(closing_table(summary))
    _next_steps(console, folder, recipe, config, flags)
    return 0


def command_line(recipe: Recipe, flags: Sequence[str], *more: str) -> str:
    """`mifo train` as the user wrote it, and more; ready for a shell."""
    return shlex.join([program(), "train", recipe.source, *flags, *more])


def program() -> str:
    """What to type for this command: its name where the shell finds it, else the file that was started."""
    started = Path(sys.argv[0])
    if shutil.which("mifo") is not None or started.name != "mifo":
        return "mifo"
    return os.path.relpath(started)


def without(flags: Sequence[str], *names: str) -> list[str]:
    """Flags without some settings, written as `--name value` or `--name=value`, with _ or -."""
    kept: list[str] = []
    words = iter(flags)
    for word in words:
        name, equals, _ = word.replace("_", "-").partition("=")
        if name not in names:
            kept.append(word)
        elif not equals:
            next(words, None)
    return kept


def _next_steps(console: Console, folder: Path, recipe: Recipe, config: Config, flags: Sequence[str]) -> None:
    lines = [f"run folder: {folder} (summary.json, metrics.jsonl, samples.jsonl, events.jsonl, ledger.json)"]
    if config.run.export:
        lines.append(f"model:      {folder / 'export'} (a plain Hugging Face folder)")
    run, name = shlex.quote(str(folder)), shlex.quote(program())
    steps = [(f"{name} eval {run} --data FILE.jsonl", "your own problems")]
    if config.data.train.startswith("embedded") and config.model.path != TINY:
        steps.insert(0, (f"{name} eval {run} --data embedded:ood", "families that were not trained on"))
    if not config.stages and isinstance(config.method, MifoMethod) and config.method.freeze_top > 0:
        same = without(flags, "--method.freeze-top", "--run.name")
        command = command_line(recipe, same, "--method.freeze-top", "0", "--run.name", f"{folder.name}-no-freezing")
        steps.append((command, "what freezing is worth"))
    steps.append((f"{name} recipes", "the other recipes"))
    width = max(len(command) for command, _ in steps)
    lines += ["next:", *(f"  {command:<{width}}  {purpose}" for command, purpose in steps)]
    console.print("\n".join(lines), highlight=False, markup=False)


def dry_run(recipe: Recipe, config: Config, *, resume: bool = False) -> int:
    """`mifo train --dry-run`: everything short of loading weights and training; with --resume, from where it would go on."""
    console = Screen()
    folder = run_folder(recipe, config)
    if resume:
        check_folder(folder, config, resume=True)
        console.print(_where_it_resumes(folder, config), highlight=False, markup=False)
    with make_grader(config) as grader:
        prepared = prepare(config, grader)
    corpus = prepared.corpus
    for note in corpus.notes:
        console.print(note, highlight=False, markup=False)
    console.print(
        f"{len(corpus.train)} training problems, {corpus.with_demonstration} with a demonstration; {len(corpus.evaluation)} "
        f"held out; longest prompt {corpus.longest_prompt} tokens",
        highlight=False,
    )
    _show_problem(console, prepared)
    expected = estimate(config, prepared.methods, corpus)
    check_suitable(expected.model, config, corpus)
    table = Table(
        title=f"Expected for {config.model.path} ({expected.parameters / 1e6:,.0f} M parameters)", show_header=False
    )
    for name, size in expected.memory.items():
        table.add_row(name, f"{size / GIB:.2f} GiB")
    table.add_row("memory in all, at most", f"{expected.total_bytes / GIB:.2f} GiB", style="bold")
    table.add_row("time", f"{clock(expected.seconds_per_step)} a step, {_time_in_all(config, expected)}")
    table.add_row("", "without evaluation, and without what a step costs however small it is")
    console.print(table)
    if not resume:
        check_folder(folder, config, resume=False)
    console.print(
        f"dry run: nothing was trained; without --dry-run the run goes {'on in' if resume else 'to'} {folder}"
    )
    return 0


def _time_in_all(config: Config, expected: Estimate) -> str:
    """By the bound that is reached first; a bound on tokens is left out of the estimate."""
    train, seconds = config.train, expected.seconds
    by_steps, bound = f"{config.steps} steps would take {clock(seconds)}", ""
    if train.max_flops is not None and seconds > (
        most := train.max_flops / expected.flops_per_step * expected.seconds_per_step
    ):
        seconds, bound = most, f"train.max_flops = {train.max_flops:g}"
    if train.minutes is not None and seconds > 60 * train.minutes:
        seconds, bound = 60 * train.minutes, f"train.minutes = {train.minutes:g}"
    return f"{clock(seconds)} in all by {bound} ({by_steps})" if bound else f"{clock(seconds)} for {config.steps} steps"


def _where_it_resumes(folder: Path, config: Config) -> str:
    """What --resume would find: the newest whole checkpoint, what is wrong with newer ones, and what is left to do."""
    path, refused = open_checkpoints(folder, config, Storage()).newest_good(verify=config.run.verify_checkpoints)
    if path is None:
        check_never_saved(folder)
        return f"{folder} has no checkpoint yet: resuming begins again from the start"
    state = read_json(path / STATE)
    done = "it is finished" if state["finished_at"] == state["iterations"] else "it is not finished"
    lines = [f"refused a checkpoint: {reason}" for reason in refused]
    lines.append(
        f"resumes from {path}: {state['steps']} of {config.steps} steps and {clock(state['elapsed'])} of training are "
        f"behind it; {done}"
    )
    return "\n".join(lines)


def _show_problem(console: Console, prepared: Prepared) -> None:
    problem = prepared.corpus.train[0]
    console.rule("a prompt as the model sees it")
    console.print(prepared.chat.render(problem), markup=False, highlight=False)
    console.rule("its demonstration")
    console.print(_shortened(problem.demonstration or "(none)"), markup=False, highlight=False)
    console.rule()


def _shortened(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[:SHOWN_CHARACTERS]} ... ({len(text) - SHOWN_CHARACTERS:,} more characters)"


def eval_command(known: argparse.Namespace) -> int:
    """`mifo eval`: accuracy of a model or run on held-out problems."""
    console = Screen()
    config = _eval_config(known)
    if known.json is not None and not Path(known.json).expanduser().resolve().parent.is_dir():
        raise ConfigError(
            f"--json {known.json}: there is no folder {Path(known.json).parent}. Make it, or write elsewhere."
        )
    device = pick_device(config.model.device)
    with make_grader(config) as grader:
        tokenizer = load_tokenizer(config.model)
        chat = make_chat(config, tokenizer)
        problems, note = read_evaluation(config.data, verifier(grader))
        grader.require({problem.grader for problem in problems})
        console.print(note, highlight=False, markup=False)
        if config.data.system_prompt is not None:
            console.print(f"system prompt: {config.data.system_prompt}", highlight=False, markup=False)
        set_up_cpu(config.train.threads)
        model = load_model(config.model).to(device)
        check_evaluation_fits(model.config.max_position_embeddings, chat, problems, config)
        engine = build_engine(model, config, device, pick_dtype(config.model.compute, device))
        start = time.perf_counter()
        score = evaluate(
            engine,
            problems,
            chat=chat,
            grader=grader,
            sampling=evaluation_sampling(config, chat),
            samples=config.evaluation.samples,
        )
    console.print(_score_table(known.model, score))
    console.print(f"{clock(time.perf_counter() - start)} for {len(problems)} problems", highlight=False)
    if known.json is not None:
        record = {"model": known.model, "data": config.data.evaluation, **score_record(score)}
        try:
            Path(known.json).expanduser().write_text(json.dumps(record, indent=2), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--json {known.json}: cannot be written ({error.strerror or error}). The figures stand above; write elsewhere."
            ) from error
    return 0


def _eval_config(known: argparse.Namespace) -> Config:
    """The configuration of a run where one is measured, with the command's choices on top; checked like any other."""
    from mifo.config.check import check_config

    folder = Path(known.model)
    if (folder / "config.json").is_file() and (folder / "export").is_dir():
        config = _run_config(folder)
    elif (folder / "metrics.jsonl").is_file():
        raise ModelError(
            f"{folder} is a run without an exported model. Finish it with --resume, or train with --run.export."
        )
    else:
        config = Config(
            model=ModelConfig(path=known.model),
            data=DataConfig(system_prompt=INSTRUCTION if _needs_instruction(known) else None),
            rollout=RolloutConfig(max_response_tokens=EVAL_TOKENS),
        )
    if known.data is None and config.data.evaluation == "none":
        raise ConfigError(f"{folder} was trained without held-out problems. Name some with --data.")
    data_changed = known.data not in (None, config.data.evaluation)
    choices: Mapping[str, Any] = {
        "evaluation": known.data,
        "evaluation_split": known.split,
        "evaluation_problems": known.limit,
        "template": known.template,
        "system_prompt": known.system_prompt,
    }
    data = config.data
    if data_changed and known.data not in EMBEDDED_SPLITS:
        data = replace(data, evaluation_problems=None)  # all of a file; embedded problems are made to order
    data = replace(data, **{name: value for name, value in choices.items() if value is not None})
    evaluation = EvaluationConfig(
        samples=known.samples,
        temperature=known.temperature,
        max_response_tokens=config.evaluation_tokens if known.max_tokens is None else known.max_tokens,
    )
    reward = replace(config.reward, unsafe_code_execution=known.unsafe_code_execution)  # said anew each time
    model = config.model if known.device is None else replace(config.model, device=known.device)
    config = replace(config, model=model, data=data, reward=reward, evaluation=evaluation)
    check_config(config)
    return config


def _run_config(folder: Path) -> Config:
    """The configuration of a finished run, with its exported model in place of the one it started from."""
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{folder / 'config.json'} cannot be read ({error}). Name {folder / 'export'} instead."
        ) from error
    config = decode(Config, stored)
    return replace(
        config, model=replace(config.model, path=str(folder / "export"), revision=None, rope_theta=None, context=None)
    )


def _needs_instruction(known: argparse.Namespace) -> bool:
    """Embedded problems do not say that the answer belongs in a box; a model that was not trained on them must be told."""
    embedded = known.data is None or known.data in EMBEDDED_SPLITS
    return bool(embedded and known.template in (None, "tokenizer"))


def _score_table(model: str, score: Score) -> Table:
    table = Table(title=f"{model}", title_justify="left")
    for column in ("problems from", "accuracy", "95 % interval", "problems"):
        table.add_column(column, justify="left" if column == "problems from" else "right")
    parts: Sequence[tuple[str, Any]] = [*score.by_source.items(), ("all", score.accuracy)]
    for name, part in parts:
        table.add_row(
            name or "(unnamed)",
            f"{100 * part.value:.1f} %",
            f"{100 * part.low:.1f} to {100 * part.high:.1f}",
            str(part.count),
            style="bold" if name == "all" else None,
        )
    verdicts = ", ".join(f"{count} {name}" for name, count in score.verdicts.items() if count)
    table.caption = f"{verdicts}; {score.response_length:.0f} tokens a response, {100 * score.truncated:.1f} % cut off"
    return table
