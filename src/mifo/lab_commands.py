"""What `mifo probe` and `mifo rejuvenate` do, once everything heavy may be imported: measure, write, show."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from mifo.cli import quiet_libraries
from mifo.data.labelled import COLA, LabelTask
from mifo.errors import ConfigError
from mifo.lab.coupling import Coupling, CouplingSettings, coupling
from mifo.lab.entropy import EntropyReport, entropy
from mifo.lab.magnitude import Magnitude, magnitude
from mifo.lab.overlap import Overlap, overlap
from mifo.lab.redundancy import Ratios, Redundancy, ratios, redundancy
from mifo.lab.rejuvenate import Rejuvenation, RejuvenationSettings, rejuvenate
from mifo.lab.samples import PairSettings
from mifo.lab.sparsify import Sparsification, SparsifySettings, sparsify
from mifo.report.figures import (
    draw_coupling,
    draw_entropy,
    draw_magnitude,
    draw_overlap,
    draw_redundancy,
    draw_rejuvenation,
    draw_sparsify,
)
from mifo.report.output import write_outputs
from mifo.train.console import Screen
from mifo.train.device import set_up_cpu
from mifo.training_probe_verbs import refuse_flags


def rejuvenate_command(known: argparse.Namespace) -> int:
    """`mifo rejuvenate`."""
    screen = _begin()
    settings = RejuvenationSettings(
        alpha=known.alpha,
        rho=known.rho,
        targets=known.targets,
        signed=known.signed,
        per_module_quota=known.per_module_quota,
        pairs=_pair_settings(known),
        compute=known.compute,
        device=known.device,
    )
    done = rejuvenate(known.base, known.over, known.out, settings)
    screen.print(done.note)
    screen.print(_rejuvenation_table(done))
    lines = write_outputs(
        Path(known.out).expanduser(),
        "rejuvenation",
        record=None,  # it was written with the model
        rows=done.rows(),
        draw=lambda figure: draw_rejuvenation(figure, done),
    )
    _end(screen, [f"{known.out} (a plain Hugging Face folder; what was reset: rejuvenation.json)", *lines])
    return 0


def magnitude_command(known: argparse.Namespace) -> int:
    """`mifo probe magnitude`."""
    screen = _begin()
    found = [magnitude(known.before, after, largest=known.largest) for after in known.after]
    screen.print(_magnitude_table(found))
    lines = write_outputs(
        Path(known.out).expanduser(),
        "magnitude",
        record={"comparisons": [one.record() for one in found]},
        rows=[row for one in found for row in one.rows()],
        draw=lambda figure: draw_magnitude(figure, found),
    )
    _end(screen, lines)
    return 0


def overlap_command(known: argparse.Namespace) -> int:
    """`mifo probe overlap`."""
    screen = _begin()
    found = overlap(known.checkpoints, top=known.top, names=known.names)
    screen.print(_overlap_table(found))
    if found.masks:
        screen.print(_mask_table(found))
    lines = write_outputs(
        Path(known.out).expanduser(),
        "overlap",
        record=found.record(),
        rows=found.rows(),
        draw=lambda figure: draw_overlap(figure, found),
    )
    _end(screen, lines)
    return 0


def entropy_command(known: argparse.Namespace) -> int:
    """`mifo probe entropy`."""
    screen = _begin()
    found = entropy(
        known.models,
        pairs=_pair_settings(known),
        fraction=known.token_fraction,
        compute=known.compute,
        device=known.device,
    )
    screen.print(found.note)
    screen.print(_entropy_table(found))
    lines = write_outputs(
        Path(known.out).expanduser(),
        "entropy",
        record=found.record(),
        rows=found.rows(),
        draw=lambda figure: draw_entropy(figure, found),
    )
    _end(screen, lines)
    return 0


def sparsify_command(known: argparse.Namespace) -> int:
    """`mifo probe sparsify`."""
    if known.start is None or not known.models:
        raise ConfigError(
            "sparsify needs START and at least one MODEL trained from it, or --online: mifo probe sparsify --help."
        )
    online = dict.fromkeys(("recipe", "steps", "seeds", "jobs", "batch_size", "start_model", "warmup"))
    refuse_flags(known, "without --online", online)
    screen = _begin()
    settings = SparsifySettings(
        rates=SparsifySettings().rates if known.rates is None else tuple(known.rates),
        masks=known.masks,
        seed=known.seed,
        data=known.data,
        split=known.split,
        limit=known.limit,
        samples=known.samples,
        temperature=known.temperature,
        max_tokens=known.max_tokens,
        template=known.template,
        system_prompt=known.system_prompt,
        device=known.device,
    )
    done = sparsify(known.start, known.models, settings)
    screen.print(done.note)
    screen.print(_sparsify_table(done))
    lines = write_outputs(
        Path(known.out).expanduser(),
        "sparsify",
        record=done.record(),
        rows=done.rows(),
        draw=lambda figure: draw_sparsify(figure, done),
    )
    _end(screen, lines)
    return 0


def redundancy_command(known: argparse.Namespace) -> int:
    """`mifo probe redundancy`."""
    screen = _begin()
    found = redundancy(
        known.start,
        known.models,
        pairs=_pair_settings(known),
        tokens=known.tokens,
        reward=known.reward,
        seed=known.seed,
        device=known.device,
    )
    compared = [ratios(found[0], other) for other in found[1:]]
    screen.print(found[0].note)
    screen.print(_redundancy_table(found))
    if compared:
        screen.print(_ratios_table(compared))
    lines = write_outputs(
        Path(known.out).expanduser(),
        "redundancy",
        record={"models": [one.record() for one in found], "ratios": [one.record() for one in compared]},
        rows=[row for one in found for row in one.rows()],
        draw=lambda figure: draw_redundancy(figure, found, compared),
    )
    _end(screen, lines)
    return 0


def coupling_command(known: argparse.Namespace) -> int:
    """`mifo probe coupling`."""
    screen = _begin()
    task = LabelTask(
        labels=tuple(known.labels) if known.labels else COLA.labels,
        instruction=known.instruction if known.instruction is not None else COLA.instruction,
    )
    if (known.labels is None) != (known.instruction is None):
        raise ConfigError(
            "--labels and --instruction belong together: the question of CoLA asks for CoLA's labels. Give both."
        )
    settings = CouplingSettings(
        data=known.data,
        order=known.order,
        task=task,
        limit=known.limit,
        samples=known.samples,
        beta=known.beta,
        temperature=known.temperature,
        top_p=known.top_p,
        max_tokens=known.max_tokens,
        seed=known.seed,
        template=known.template,
        system_prompt=known.system_prompt,
        device=known.device,
    )
    found = coupling(known.models, settings)
    screen.print(_coupling_table(found))
    screen.print(_bounds_table(found))
    _end(screen, _notes(found))
    lines = write_outputs(
        Path(known.out).expanduser(),
        "coupling",
        record=found.record(),
        rows=found.rows(),
        draw=lambda figure: draw_coupling(figure, found),
    )
    _end(screen, lines)
    return 0


def _pair_settings(known: argparse.Namespace) -> PairSettings:
    return PairSettings(
        data=known.data,
        split=known.split,
        count=known.samples,
        max_tokens=known.max_tokens,
        template=known.template,
        system_prompt=known.system_prompt,
    )


def _begin() -> Screen:
    quiet_libraries()
    set_up_cpu(None)
    return Screen()


def _end(screen: Screen, lines: list[str]) -> None:
    for line in lines:
        screen.print(line)


def _rejuvenation_table(done: Rejuvenation) -> Table:
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


def _magnitude_table(found: list[Magnitude]) -> Table:
    table = Table("model", "‖Δ‖", "‖Δ‖/‖θ_0‖", "elements that moved", title=f"Change from {found[0].before}")
    for one in found:
        total = one.total()
        table.add_row(one.label, f"{total.norm:.4g}", f"{total.relative:.3g}", f"{100 * (1 - total.unchanged):.2f} %")
    return table


def _overlap_table(found: Overlap) -> Table:
    names = ("cosine", "sign_agreement", "churn", "touched", "overwritten", "undone")
    table = Table(
        "phases", *(name.replace("_", " ") for name in names), title=f"Top {100 * found.top:g} % of each phase"
    )
    for pair in found.pairs:
        values = [getattr(pair, name) for name in names]
        table.add_row(f"{pair.earlier} → {pair.later}", *("-" if v is None else f"{v:.3f}" for v in values))
    return table


def _mask_table(found: Overlap) -> Table:
    table = Table("masks", "frozen", "then", "stayed frozen", "churn", title="MIFO's own masks, with their history")
    for pair in found.masks:
        shares = (pair.frozen_earlier, pair.frozen_later, pair.kept, pair.churn)
        cells = ("-" if share is None else f"{100 * share:.1f} %" for share in shares)
        table.add_row(f"{pair.earlier} → {pair.later}", *cells)
    return table


def _entropy_table(found: EntropyReport) -> Table:
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


def _sparsify_table(done: Sparsification) -> Table:
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


def _redundancy_table(found: list[Redundancy]) -> Table:
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


def _ratios_table(compared: list[Ratios]) -> Table:
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


def _coupling_table(found: Coupling) -> Table:
    names = ("L_SFT", "KL", "J", "reward strict", "reward robust", "accuracy", "MCC", "balanced")
    table = Table(
        "model", *names, title=f"{found.settings.order} on {found.examples} texts (accuracy, MCC, balanced: robust)"
    )
    for p in found.points:
        figures = [p.sft_loss.value, p.kl.value, p.objective.value, p.strict.reward, p.robust.reward]
        figures += [p.robust.accuracy, p.robust.mcc, p.robust.balanced_accuracy]
        table.add_row(p.label, *(f"{value:.3f}" for value in figures))
    return table


def _bounds_table(found: Coupling) -> Table:
    columns = ("statement", "model", "predicted", "measured", "measured − predicted", "verdict")
    table = Table(*columns, title="Statements of the theorems")
    for bound in found.bounds:
        figures = (f"{bound.predicted:.4g}", f"{bound.measured:.4g}", str(bound.difference))
        table.add_row(bound.statement, bound.label, *figures, bound.verdict)
    return table


def _notes(found: Coupling) -> list[str]:
    """What to hold against the statements, each once, and how C_1 was come by."""
    c1, of = found.c1, []
    if found.settings.order == "sft-rl":
        of.append(
            f"C_1 = {c1.value}, with the right label's measured probability in Z; by the samples alone it would be "
            f"{c1.by_samples:.3g}, for {c1.without_right_sample} of {found.examples} texts had no right one."
        )
    return of + list(dict.fromkeys(f"{b.statement.split(':')[0]}: {b.caveat}" for b in found.bounds if b.caveat))
