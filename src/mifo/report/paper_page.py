"""The page of `mifo paper`: for each finding what the paper claims, what was measured here, and the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mifo.lab.claims import Claim, Verdict, expected, figure
from mifo.lab.paper.finding import Judged
from mifo.lab.paper.tier import Tier
from mifo.printable import printable
from mifo.report.output import table_text
from mifo.train.console import clock

VERDICTS: tuple[Verdict, ...] = ("reproduces", "does not", "cannot be told")
STYLES = {"reproduces": "green", "does not": "red", "cannot be told": "dim"}
RULE = (
    "A claim says on which side of a bound a figure lies. It reproduces where the 95 % interval lies on that side, does not "
    "where it lies on the other, and cannot be told at this scale otherwise. A finding reproduces where all its claims do "
    "and does not where one of them does not. Intervals are over seeds and, for accuracies, over problems; of this many "
    "claims about one in twenty is decided by chance."
)


def page(tier: Tier, judged: Sequence[Judged]) -> str:
    """The page as Markdown.

    Args:
        tier: that was run.
        judged: the findings.
    """
    lines = [
        "# Findings of the papers, put to the test",
        "",
        f"Tier {tier.name}: {tier.description}. {_sizes(tier)}",
        "",
    ]
    lines += [
        f"{len(judged)} findings: {_counted(judged)}.",
        "",
        RULE,
        "",
        "| finding | of | verdict | claims that reproduce / do not / cannot be told |",
        "| --- | --- | --- | --- |",
    ]
    for j in judged:
        own = Counter(claim.verdict for claim in j.claims)
        numbers = " / ".join(str(own[verdict]) for verdict in VERDICTS)
        said = f"{_said(j.verdict)}{_failed(j)}"
        lines.append(f"| [{j.finding.name}](#{j.finding.name}) | {j.finding.source} | {said} | {numbers} |")
    for j in judged:
        lines += ["", *_section(j)]
    return "\n".join(lines) + "\n"


def _sizes(tier: Tier) -> str:
    return (
        f"Recipe `{tier.recipe}`; a start of {tier.start_updates} SFT updates of {tier.batch} demonstrations; RL phases of "
        f"{tier.rl_steps} steps of {tier.prompts} questions; MIFO's buffer {tier.buffer}; methods are compared at "
        f"{tier.flops:.2g} FLOPs each, from the model as it ships at {tier.shipped_flops:.2g}; {tier.problems} held-out problems."
    )


def _section(judged: Judged) -> Iterator[str]:
    finding = judged.finding
    yield f"## {finding.name}"
    yield ""
    yield f"{finding.source}: {finding.claim}"
    yield ""
    runs = f"{judged.runs} runs{_failed(judged)}, {judged.flops:.2g} FLOPs, {clock(judged.seconds)} of training in all."
    yield f"Here: {judged.setting} {runs}{' ' * bool(judged.machine)}{judged.machine}"
    yield ""
    yield "| claim | paper | here | seeds | reproduces where | verdict |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for claim in judged.claims:
        seeds = "" if claim.measured is None else claim.measured.seeds
        yield f"| {claim.text} | {claim.paper} | {_shown(claim)} | {seeds} | {expected(claim)} | {_said(claim.verdict)} |"
    if judged.notes:
        yield ""
    for note in judged.notes:
        yield f"- {printable(note)}"


def _shown(claim: Claim) -> str:
    """The figure; accuracies of older records may have an interval over seeds alone."""
    alone = claim.unit == "points" and claim.measured is not None and claim.measured.problems == 1
    return f"{figure(claim)}{', over seeds alone' if alone else ''}"


def _failed(judged: Judged) -> str:
    return f" ({judged.failed} runs failed)" if judged.failed else ""


def _counted(judged: Sequence[Judged]) -> str:
    counts = Counter(j.verdict for j in judged)
    words = {"reproduces": ("reproduces", "reproduce"), "does not": ("does not", "do not")}
    parts = [(counts[verdict], words.get(verdict, (_said(verdict),) * 2)) for verdict in VERDICTS]
    return ", ".join(f"{count} {one if count == 1 else several}" for count, (one, several) in parts)


def _said(verdict: Verdict) -> str:
    return {"does not": "does not reproduce", "cannot be told": "cannot be told at this scale"}.get(verdict, verdict)


def claims_csv(judged: Sequence[Judged]) -> str:
    """One row a claim."""
    return table_text([_row(j, claim) for j in judged for claim in j.claims])


def _row(judged: Judged, claim: Claim) -> dict[str, Any]:
    found = claim.measured
    return {
        "finding": judged.finding.name,
        "source": judged.finding.source,
        "claim": claim.text,
        "paper": claim.paper,
        "unit": claim.unit,
        "side": claim.side,
        "bound": claim.bound,
        "margin": claim.margin,
        "value": None if found is None else found.value,
        "low": None if found is None else found.low,
        "high": None if found is None else found.high,
        "seeds": None if found is None else found.seeds,
        "verdict": claim.verdict,
    }


def print_findings(console: Console, judged: Sequence[Judged]) -> None:
    """A row a claim in the terminal."""
    table = Table(title="Findings", title_justify="left", show_lines=False)
    for column in ("finding", "claim", "here", "reproduces where", "verdict"):
        table.add_column(column, overflow="fold", no_wrap=column == "finding")
    for j in judged:
        for place, claim in enumerate(j.claims):
            table.add_row(
                j.finding.name if place == 0 else "",
                claim.text,
                figure(claim),
                expected(claim),
                _said(claim.verdict),
                style=STYLES[claim.verdict],
                end_section=place == len(j.claims) - 1,
            )
    console.print(table)
    console.print(_counted(judged))
    for j in judged:
        if j.failed:
            console.print(f"{j.finding.name}: {j.failed} runs failed; the page says why", style="red")
