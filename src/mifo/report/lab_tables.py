"""Results of the lab's probes as tables for the terminal."""

from __future__ import annotations

from rich.table import Table

from mifo.lab.arena_statistics import Estimate
from mifo.lab.coupling import Coupling
from mifo.lab.entropy import EntropyReport
from mifo.lab.magnitude import Magnitude, largest_changes
from mifo.lab.overlap import Overlap
from mifo.lab.redundancy import Ratios, Redundancy
from mifo.lab.rejuvenate import Rejuvenation
from mifo.lab.sparsify import Sparsification

LARGEST_SHOWN = 5  # elements a model


def rejuvenation_table(done: Rejuvenation) -> Table:
    """What was reset, and what that did to the targets."""
    table = Table(title="Rejuvenation", show_header=False)
    table.add_row("neurons reset", f"{done.reset_neurons:,} of {done.all_neurons:,} ({100 * done.neuron_share:.2f} %)")
    table.add_row(
        "elements reset", f"{done.reset_elements:,} of {done.all_elements:,} ({100 * done.element_share:.2f} %)"
    )
    table.add_row("targets", f"{done.selection.targets:,}")
    if done.selection.reconstruction_error:
        error = done.selection.reconstruction_error
        table.add_row("|reconstructed − logit|", f"mean {error['mean']:.2g}, largest {error['max']:.2g}")
    for entropies in done.entropies:
        at_targets = f", at targets {entropies.targets['mean']:.3f}" if entropies.targets else ""
        table.add_row(f"mean entropy, {entropies.model}", f"{entropies.tokens['mean']:.3f}{at_targets} nats")
    return table


def magnitude_table(found: list[Magnitude]) -> Table:
    """How far each model is from the start."""
    table = Table("model", "‖Δ‖", "‖Δ‖/‖θ_0‖", "elements that moved", title=f"Change from {found[0].before}")
    for one in found:
        total = one.total()
        table.add_row(one.label, f"{total.norm:.4g}", f"{total.relative:.3g}", f"{100 * (1 - total.unchanged):.2f} %")
    return table


def largest_table(found: list[Magnitude]) -> Table:
    """The elements that changed most in each model."""
    table = Table("model", "tensor", "element", "before", "change", title="Largest changes of single elements")
    for one in found:
        for tensor, element in largest_changes(one.tensors, LARGEST_SHOWN):
            place = ", ".join(map(str, element.index))
            table.add_row(one.label, tensor, f"[{place}]", f"{element.before:.4g}", f"{element.change:+.4g}")
    return table


def overlap_table(found: Overlap) -> Table:
    """What each phase did to what each earlier one had moved."""
    names = ("cosine", "sign_agreement", "churn", "touched", "overwritten", "undone")
    table = Table(
        "phases", *(name.replace("_", " ") for name in names), title=f"Top {100 * found.top:g} % of each phase"
    )
    for pair in found.pairs:
        values = [getattr(pair, name) for name in names]
        table.add_row(f"{pair.earlier} → {pair.later}", *("-" if v is None else f"{v:.3f}" for v in values))
    return table


def mask_table(found: Overlap) -> Table:
    """How much of each of MIFO's masks the next one holds."""
    table = Table("masks", "frozen", "then", "stayed frozen", "churn", title="MIFO's own masks, with their history")
    for pair in found.masks:
        shares = (pair.frozen_earlier, pair.frozen_later, pair.kept, pair.churn)
        cells = ("-" if share is None else f"{100 * share:.1f} %" for share in shares)
        table.add_row(f"{pair.earlier} → {pair.later}", *cells)
    return table


def entropy_table(found: EntropyReport) -> Table:
    """Entropies of each model, and what the selections of two share."""
    table = Table(
        "model", "mean", "median", "p90", "gap to the first", "fell at", title=f"Entropy of {found.tokens:,} tokens"
    )
    for model in found.models:
        gap = f"{model.gap['mean']:+.3f}" if model.gap else "-"
        figures = (model.entropy[name] for name in ("mean", "median", "p90"))
        table.add_row(model.label, *(f"{figure:.3f}" for figure in figures), gap, f"{100 * model.fell:.0f} %")
    for pair in found.overlaps:
        table.add_row(f"{pair.first} ∩ {pair.second}", "", "", "", f"{100 * pair.share:.1f} % of the selection", "")
    return table


def sparsify_table(done: Sparsification) -> Table:
    """Accuracy at each rate."""
    names = list(dict.fromkeys(score.model for score in done.scores))
    table = Table("dropped", *names, title="Accuracy (mean over masks; lowest to highest)")
    curves = {name: {rate: rest for rate, *rest in done.curve(name)} for name in names}
    for rate in sorted({score.rate for score in done.scores}):
        cells = [
            f"{100 * mean:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
            for mean, low, high in (curves[n][rate] for n in names)
        ]
        table.add_row(f"{100 * rate:g} %", *cells)
    return table


def drops_table(done: Sparsification) -> Table:
    """What was lost at each rate, with the interval over masks and problems."""
    titles = [(drop.model, drop.than) for drop in done.drops if drop.rate == done.drops[0].rate]
    names = [model if than is None else f"{model} more than {than}" for model, than in titles]
    table = Table("dropped", *names, title="Points lost [95 % interval over masks and problems]")
    for rate in dict.fromkeys(drop.rate for drop in done.drops):
        found = {(drop.model, drop.than): drop.lost for drop in done.drops if drop.rate == rate}
        cells = [" ".join(_points(found[title])) for title in titles]
        table.add_row(f"{100 * rate:g} %", *cells)
    return table


def _points(lost: Estimate) -> tuple[str, str]:
    return f"{100 * lost.value:+.1f}", f"[{100 * lost.low:.1f}, {100 * lost.high:.1f}]"


def redundancy_table(found: list[Redundancy]) -> Table:
    """Medians over tokens, and how far the assumptions hold."""
    table = Table(
        "model",
        "‖Δθ‖",
        "median PR",
        "margin grew",
        "linear (training)",
        "linear (minimum)",
        "same rival",
        title="Redundancy",
    )
    for one in found:
        summary = one.summary()
        medians = [summary[name].get("median") for name in ("ratio", "linear_along_training", "linear_along_minimum")]
        ratio, training, minimum = ("-" if value is None else f"{value:.3g}" for value in medians)
        grew, same = (f"{100 * summary[name]:.0f} %" for name in ("margin_grew", "same_competitor"))
        table.add_row(one.label, f"{one.change_norm:.4g}", ratio, grew, training, minimum, same)
    return table


def ratios_table(compared: list[Ratios]) -> Table:
    """PR^SFT / PR^RL of the same tokens beside what Theorem 1 says it is."""
    names = ("pair", "tokens", "median PR ratio", "middle half", "at least 1", "median 1/(rπ)", "rank correlation")
    table = Table(*names, title="Ratio of redundancies, token by token, and Theorem 1's")
    for one in compared:
        summary = one.summary()
        measured, theorem, rank = summary["measured"], summary["theorem"], summary["rank_correlation"]
        figures = ["-"] * 4
        if one.tokens:
            spread = f"{measured['p25']:.3g} to {measured['p75']:.3g}"
            share = f"{100 * summary['at_least_one']:.0f} %"
            figures = [f"{measured['median']:.3g}", spread, share, f"{theorem['median']:.3g}"]
        counted = f"{len(one.tokens)} of {one.of}"
        table.add_row(f"{one.over} / {one.under}", counted, *figures, "-" if rank is None else f"{rank:.2f}")
    return table


def coupling_table(found: Coupling) -> Table:
    """Loss, divergence and rewards of each checkpoint."""
    names = ("L_SFT", "KL", "J", "reward strict", "reward robust", "accuracy", "MCC", "balanced")
    table = Table(
        "model", *names, title=f"{found.settings.order} on {found.examples} texts (accuracy, MCC, balanced: robust)"
    )
    for p in found.points:
        figures = [p.sft_loss.value, p.kl.value, p.objective.value, p.strict.reward, p.robust.reward]
        figures += [p.robust.accuracy, p.robust.mcc, p.robust.balanced_accuracy]
        table.add_row(p.label, *(f"{value:.3f}" for value in figures))
    return table


def bounds_table(found: Coupling) -> Table:
    """What the theorems say beside what was measured."""
    columns = ("statement", "model", "predicted", "measured", "measured − predicted", "verdict")
    table = Table(*columns, title="Statements of the theorems")
    for bound in found.bounds:
        figures = (f"{bound.predicted:.4g}", f"{bound.measured:.4g}", str(bound.difference))
        table.add_row(bound.statement, bound.label, *figures, bound.verdict)
    return table


def notes_on_bounds(found: Coupling) -> list[str]:
    """What to hold against the statements, each once, and how C_1 was come by."""
    c1, of = found.c1, []
    if found.settings.order == "sft-rl":
        of.append(
            f"C_1 = {c1.value}, with the right label's measured probability in Z; by the samples alone it would be "
            f"{c1.by_samples:.3g}, for {c1.without_right_sample} of {found.examples} texts had no right one."
        )
    return of + list(dict.fromkeys(f"{b.statement.split(':')[0]}: {b.caveat}" for b in found.bounds if b.caveat))
