"""What a run shows while it runs: a line a step, a live bar below, and a table at the end.

It listens to the records that are also written to the run folder, so the screen never says what the files do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from mifo.printable import printable

PHASE_STYLE = {"rl": "cyan", "sft": "magenta", "mixed": "yellow"}


class Screen(Console):
    """The terminal as text from outside may meet it: no markup, no emoji codes, no control characters in any string.

    Strings reach rich through `render_str`, whether printed or in a table; what is styled here is a `Text` or has a `style`.
    `file` and `width` are for text that goes elsewhere.
    """

    def __init__(self, *, file: TextIO | None = None, width: int | None = None) -> None:
        super().__init__(soft_wrap=True, markup=False, emoji=False, highlight=False, file=file, width=width)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as it is, made printable; `options` are rich's, of which those that read the text are put off."""
        return super().render_str(printable(text), **options | {"markup": False, "emoji": False, "highlight": False})


class RunDisplay:
    """Shows records; use as a context manager around a run.

    Args:
        console: where to.
        steps: those of all stages, the length of the bar.
        minutes: `train.minutes`, which may end a run before its steps do.
    """

    def __init__(self, console: Console, *, steps: int, minutes: float | None = None) -> None:
        self.console = console
        self.steps = steps
        self.minutes = minutes
        self.progress = Progress(
            TextColumn("{task.fields[phase]}"),
            BarColumn(bar_width=30),
            TextColumn("step {task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
        )
        self.task = self.progress.add_task("", total=steps, phase="start", figures="")
        self.first: tuple[float, int] | None = None

    def __enter__(self) -> RunDisplay:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, stream: str, record: Mapping[str, Any]) -> None:
        """Show one record of a run's journal."""
        if stream == "metrics":
            self._step(record)
        elif stream == "events":
            self._event(record)

    def _step(self, record: Mapping[str, Any]) -> None:
        phase, updates = record["phase"], record["updates"]
        line = Text.assemble((f"{phase.upper():3}", PHASE_STYLE[phase]), f" {record['step']:>4}/{self.steps}")
        if "accuracy" in record:
            line.append(f"  accuracy {100 * record['accuracy']:5.1f} %  length {record['response_length']:.0f}")
        if phase == "sft" and updates:
            demonstrations = sum(update["sequences"] for update in updates)
            line.append(f"  {demonstrations} demonstrations  loss {updates[-1]['loss']:.3f}")
        if "buffer_size" in record:
            line.append(f"  buffer {record['buffer']:.0f}/{record['buffer_size']:.0f}")
        if record["tokens_per_second"]:
            line.append(f"  {record['tokens_per_second']:.0f} tok/s")
        left = self._time_left(record)
        line.append(f"  left {left}")
        self.console.print(line, highlight=False, soft_wrap=True)
        figures = f"buffer {record['buffer']:.0f}/{record['buffer_size']:.0f}" if "buffer_size" in record else ""
        self.progress.update(
            self.task, completed=record["step"], phase=phase.upper(), figures=f"{figures}  left {left}"
        )

    def _time_left(self, record: Mapping[str, Any]) -> str:
        now, step = record["elapsed"], record["step"]
        if self.first is None:
            self.first = (now, step)
        start, first_step = self.first
        if step == first_step:
            return "?"
        seconds = (now - start) / (step - first_step) * (self.steps - step)
        if self.minutes is not None:
            seconds = min(seconds, max(0.0, 60 * self.minutes - now))
        return clock(seconds)

    def _event(self, record: Mapping[str, Any]) -> None:
        event = record["event"]
        if event == "evaluation":
            share, low, high = (100 * record[key] for key in ("accuracy", "accuracy_low", "accuracy_high"))
            figures = (
                f": {share:.1f} % (95 %: {low:.1f} to {high:.1f}) of {record['problems']}, "
                f"{record['response_length']:.0f} tokens each"
            )
            line = Text.assemble((f"held out, {record['label']}", "bold"), figures)
            self.console.print(line, highlight=False, soft_wrap=True)
        elif event == "sft_phase" and record["before"] is not None:
            self.console.print(
                f"SFT phase {record['interval']}: {100 * record['before']:.1f} → {100 * record['after']:.1f} % "
                f"({_change(record)}), {record['demonstrations']} demonstrations, {100 * record['frozen_fraction']:.0f} % frozen",
                style="magenta",
                highlight=False,
                soft_wrap=True,
            )
        elif event == "rejuvenation":
            self._rejuvenation(record)
        elif event == "stage":
            self.console.print(
                f"stage {record['stage']}: {record['method']}, from step {record['step']}",
                style="bold",
                highlight=False,
            )
        elif event == "resumed":
            for reason in record["refused"]:
                self.console.print(f"refused a checkpoint: {reason}", style="bold red", highlight=False, markup=False)
            if record["other_code"] is not None:
                versions = ", ".join(f"{name} {version}" for name, version in record["other_code"].items())
                self.console.print(
                    f"written by {versions}: bits may differ from here on", style="yellow", highlight=False
                )
            place = record["checkpoint"] or "the beginning: there was no checkpoint yet"
            self.console.print(f"resumed from {place}, step {record['step']}", highlight=False, markup=False)
        elif event == "not_removed":
            self._alarm(
                f"{record['folder']} is no longer needed and could not be removed ({record['reason']}); going on"
            )
        elif event == "log_lost":
            self.console.print(
                f"{record['log']}.jsonl lacks {record['bytes']:,} bytes that it had; going on without them",
                style="bold red",
                highlight=False,
            )
        elif event == "alarm":
            self._alarm(
                f"alarm: {record['alarm']} = {record['value']:.3g}, limit {record['limit']:.3g}: {record['advice']}"
            )
        elif event == "fault":
            done = {"skip": "step skipped", "rollback": "step skipped, the one before undone", "warn": "step taken"}
            self._alarm(f"{record['phase']}: {record['reason']} ({done[record['action']]}; samples in events.jsonl)")
        elif event == "memory":
            self._alarm(
                f"out of memory: train.micro_batch_tokens is now {record['micro_batch_tokens']}, for the rest of the run"
            )

    def _rejuvenation(self, record: Mapping[str, Any]) -> None:
        means = {entry["model"]: entry["tokens"]["mean"] for entry in record["entropies"]}
        self.console.print(
            f"rejuvenated: {100 * record['neuron_share']:.1f} % of neurons reset, token entropy {means['over']:.3f} → "
            f"{means['rejuvenated']:.3f} (base {means['base']:.3f})",
            style="magenta",
            highlight=False,
            soft_wrap=True,
        )

    def _alarm(self, text: str) -> None:
        self.console.print(text, style="bold red", highlight=False, markup=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def closing_table(summary: Mapping[str, Any]) -> Table:
    """The short table at the end of a run."""
    table = Table(title="Result", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()

    def row(name: str, value: str | None) -> None:
        if value is not None:
            table.add_row(name, value)

    row("accuracy before", _accuracy(summary, "before"))
    row("accuracy after", _accuracy(summary, "after"))
    if summary["response_length_before"] is not None:
        row(
            "response length",
            f"{summary['response_length_before']:.0f} → {summary['response_length_after']:.0f} tokens",
        )
    for stage in summary["stages"]:
        share = stage["accuracy_after"]
        reached = "" if share is None else f", {100 * share:.1f} % at its end"
        row(f"stage {stage['stage']}", f"{stage['method']}, {stage['steps']} steps{reached}")
    ended = "" if summary["ended_by"] == "steps" else f", when train.{summary['ended_by']} was up"
    row("steps", f"{summary['steps']} of {summary['planned_steps']}{ended}")
    row(
        "RL, SFT", f"{summary['rl_steps']} RL steps, {summary['sft_steps']} SFT steps, {summary['intervals']} intervals"
    )
    row("SFT examples used", f"{summary['demonstrations_used']} ({summary['unique_demonstrations']} different)")
    if summary["sft_phases"]:
        row("parameters frozen", f"{100 * summary['frozen_fraction']:.1f} % in the last SFT phase")
    for phase in summary["sft_phases"]:
        if phase["before"] is not None:
            row(
                f"SFT phase {phase['interval']}",
                f"{100 * phase['before']:.1f} % before, {100 * phase['after']:.1f} % after ({_change(phase)})",
            )
    row("time", clock(summary["seconds"]))
    return table


def _change(phase: Mapping[str, Any]) -> str:
    """Points won in an SFT phase, with the interval over problems where the record has one."""
    points = f"{100 * (phase['after'] - phase['before']):+.1f}"
    interval = phase.get("change_interval")
    return points if interval is None else f"{points}, 95 %: {100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"


def _accuracy(summary: Mapping[str, Any], when: str) -> str | None:
    value = summary[f"accuracy_{when}"]
    if value is None:
        return None
    low, high = summary[f"accuracy_{when}_interval"]
    return f"{100 * value:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f}) of {summary['problems']} problems"
