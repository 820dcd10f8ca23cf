"""Figures of the lab's measurements. Each function fills an empty matplotlib figure from a result; nothing here measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mifo.lab.coupling import Coupling
from mifo.lab.entropy import EntropyReport
from mifo.lab.magnitude import Magnitude
from mifo.lab.overlap import Overlap
from mifo.lab.redundancy import Ratios, Redundancy
from mifo.lab.rejuvenate import Rejuvenation
from mifo.lab.sparsify import Sparsification
from mifo.train.attribution import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENTROPY_BINS = 30
MOST_PAIRS = 10  # of phases in one figure
FEW_TOKENS = 20  # are drawn one by one
LONGEST_LABEL = 28  # in a title
OVERLAPS = ("cosine", "sign_agreement", "kept", "touched", "overwritten", "undone")
COLOURS = (
    "#1b6ca8", "#d1495b", "#2e933c", "#8d5a97", "#e8a33d", "#555555", "#17a2b8", "#a0522d", "#e377c2", "#6b8e23", "#1f2a7a",
    "#c0a000",
)  # fmt: skip


def draw_rejuvenation(figure: Figure, done: Rejuvenation) -> None:
    """Reset share per layer and module (S3 Figure 10), and target entropies before and after (S3 Figure 9)."""
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1.0))
    _share_map(figure, left, done)
    _histograms(right, done.target_entropies)
    right.set_xlabel("token entropy at the targets (nats)")
    right.set_ylabel("targets")
    right.set_title("entropies of the targets")
    figure.suptitle(
        f"α = {done.settings.alpha:g}, ρ = {done.settings.rho:g}: {100 * done.neuron_share:.2f} % of neurons and "
        f"{100 * done.element_share:.2f} % of elements reset",
        fontsize=10,
    )


def _share_map(figure: Figure, axes: Axes, done: Rejuvenation) -> None:
    axes.set_title("share of neurons reset")
    if not done.selection.modules:
        axes.text(0.5, 0.5, "nothing was scored (ρ = 0)", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    layers = 1 + max(module.layer for module in done.selection.modules)
    shares = [[0.0] * layers for _ in KINDS]
    for module in done.selection.modules:
        shares[KINDS.index(module.kind)][module.layer] = len(module.reset) / module.neurons
    image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0.0)
    axes.set_yticks(range(len(KINDS)), KINDS)
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, format=lambda share, _: f"{100 * share:.3g} %")


def _histograms(axes: Axes, values: Mapping[str, Sequence[float]]) -> None:
    drawn = {name: row for name, row in values.items() if row}
    if not drawn:
        return
    highest = max(max(row) for row in drawn.values())
    edges = [highest * i / ENTROPY_BINS for i in range(ENTROPY_BINS + 1)] if highest > 0 else [0.0, 1.0]
    for colour, (name, row) in zip(COLOURS, drawn.items(), strict=False):
        mean = sum(row) / len(row)
        axes.hist(row, bins=edges, histtype="step", color=colour, label=f"{name} (mean {mean:.3f})", linewidth=1.5)
    axes.legend(fontsize=8)


def draw_magnitude(figure: Figure, found: Sequence[Magnitude]) -> None:
    """‖Δ‖ and ‖Δ‖/‖θ_0‖ of each layer, a line a model (S0 Figure 1)."""
    left, right = figure.subplots(1, 2)
    for colour, change in zip(_colours(len(found)), found, strict=True):
        layers = [group.layer for group in change.layers()]
        if not layers:
            left.text(0.5, 0.5, "no layers: see the table", ha="center", transform=left.transAxes)
        left.plot(layers, [g.norm for g in change.layers()], "o-", color=colour, label=change.label, markersize=3)
        right.plot(layers, [g.relative for g in change.layers()], "o-", color=colour, label=change.label, markersize=3)
    left.set_ylabel("‖θ_T − θ_0‖₂")
    right.set_ylabel("‖θ_T − θ_0‖₂ / ‖θ_0‖₂")
    for axes in (left, right):
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(0.0, 1.1 * axes.get_ylim()[1])
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.suptitle(f"change of each layer from {found[0].before}", fontsize=10)


def draw_entropy(figure: Figure, report: EntropyReport) -> None:
    """The distribution of token entropies of each model, and the tokens that the last one's selection holds most often."""
    left, right = figure.subplots(1, 2)
    for colour, model in zip(_colours(len(report.models)), report.models, strict=True):
        shares = [count / report.tokens for count in model.histogram]
        left.stairs(shares, report.edges, color=colour, label=f"{model.label} (mean {model.entropy['mean']:.3f})")
        left.axvline(model.threshold, color=colour, linestyle=":", linewidth=1)
    left.set_yscale("log")
    left.set_xlabel("token entropy (nats); dotted: lowest selected, mean over responses", fontsize=9)
    left.set_ylabel("share of response tokens")
    left.legend(fontsize=8)
    last = report.models[-1]
    tokens = last.selected[:20][::-1]
    right.barh(range(len(tokens)), [t.occurrences for t in tokens], color="#cccccc", label="occurs")
    right.barh(range(len(tokens)), [t.selected for t in tokens], color=COLOURS[0], label="selected")
    right.set_yticks(range(len(tokens)), [_shown(t.text) for t in tokens], fontsize=7)
    right.set_title(f"what top ρ = {report.fraction:g} of {_end(last.label)} holds", fontsize=10)
    right.legend(fontsize=8)


def draw_overlap(figure: Figure, found: Overlap) -> None:
    """Cosine, mask churn and overwriting for each pair of phases; of many phases for neighbours alone, along the run."""
    axes, pairs = figure.subplots(), found.pairs
    title = f"what a phase does to the top {100 * found.top:g} % that an earlier one moved"
    if len(pairs) > MOST_PAIRS:
        _draw_neighbours(axes, found)
        axes.set_title(f"{title}; neighbours alone, all pairs are in the table", fontsize=10)
        return
    width = 0.8 / len(pairs)
    for place, (colour, pair) in enumerate(zip(_colours(len(pairs)), pairs, strict=True)):
        values = [getattr(pair, name) for name in OVERLAPS]
        at = [i + (place - (len(pairs) - 1) / 2) * width for i in range(len(OVERLAPS))]
        heights = [float("nan") if value is None else value for value in values]
        axes.bar(at, heights, width, color=colour, label=f"{pair.earlier} → {pair.later}")
        for x, value in zip(at, values, strict=True):
            if value is None:  # nothing was moved: undefined, which is not 0
                axes.text(x, 0.0, "?", ha="center", va="bottom", color=colour, fontsize=8)
    axes.set_xticks(range(len(OVERLAPS)), [name.replace("_", " ") for name in OVERLAPS])
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=10)


def _draw_neighbours(axes: Axes, found: Overlap) -> None:
    """A line for each figure, in the order of the phases; an undefined one is a gap."""
    places = {phase.name: place for place, phase in enumerate(found.phases)}
    pairs = [pair for pair in found.pairs if places[pair.later] == places[pair.earlier] + 1]
    for colour, name in zip(_colours(len(OVERLAPS)), OVERLAPS, strict=True):
        values = [getattr(pair, name) for pair in pairs]
        heights = [float("nan") if value is None else value for value in values]
        axes.plot(
            range(len(pairs)), heights, "o-", color=colour, linewidth=0.7, markersize=4, label=name.replace("_", " ")
        )
    labels = [f"{pair.earlier} → {pair.later}" for pair in pairs]
    axes.set_xticks(range(len(pairs)), labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw_sparsify(figure: Figure, done: Sparsification) -> None:
    """Accuracy against the share of the change that was dropped, a line a model (S0 Figure 3)."""
    axes = figure.subplots()
    names = list(dict.fromkeys(score.model for score in done.scores))
    for colour, name in zip(_colours(len(names)), names, strict=True):
        curve = done.curve(name)
        rates = [point[0] for point in curve]
        axes.plot(rates, [100 * point[1] for point in curve], "o-", color=colour, label=name, markersize=4)
        own = [score for score in done.scores if score.model == name]
        low = [100 * min(s.low for s in own if s.rate == rate) for rate in rates]
        high = [100 * max(s.high for s in own if s.rate == rate) for rate in rates]
        axes.fill_between(rates, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("p: share of the change dropped (0: trained model, 1: start)")
    axes.set_ylabel("accuracy (%)")
    axes.set_title("mean over masks; shaded: 95 % intervals of all masks together", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def draw_redundancy(figure: Figure, found: Sequence[Redundancy], compared: Sequence[Ratios] = ()) -> None:
    """The distribution of the redundancy ratio, and of the check of its linearity, over tokens; ratios against Theorem 1's."""
    left, right, *last = figure.subplots(1, 3 if compared else 2)
    if last:
        _draw_ratios(last[0], compared)
    for colour, one in zip(_colours(len(found)), found, strict=True):
        defined = [token for token in one.tokens if token.ratio is not None]
        shares = [(place + 1) / max(1, len(defined)) for place in range(len(defined))]
        for axes, values, style, label in (
            (left, [t.ratio for t in defined], "-", one.label),
            (right, [t.linear_along_minimum for t in defined], "-", f"{one.label}, along Δ*"),
            (right, [t.linear_along_training for t in defined], ":", f"{one.label}, along Δθ"),
        ):
            places = sorted(value for value in values if value is not None)
            mark = "o" if len(places) < FEW_TOKENS else None  # single tokens have no line
            axes.step(places, shares, where="post", color=colour, ls=style, marker=mark, markersize=3, label=label)
    left.set_xscale("log")
    left.tick_params(axis="x", which="minor", labelbottom=False)  # they would overlap within a decade
    left.set_xlabel("PR = ‖Δθ‖ / ‖Δ*‖")
    left.set_ylabel("share of tokens whose margin grew")
    right.axvline(1.0, color="black", linewidth=0.8)
    right.set_xscale("symlog")
    right.set_xlabel("margin against its linear prediction; 1 is linear")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def _draw_ratios(axes: Axes, compared: Sequence[Ratios]) -> None:
    for colour, one in zip(_colours(len(compared)), compared, strict=True):
        theorem, measured = [t.theorem for t in one.tokens], [t.measured for t in one.tokens]
        axes.scatter(theorem, measured, color=colour, s=12, alpha=0.7, label=f"{one.over} / {one.under}")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.axline((1.0, 1.0), (10.0, 10.0), color="black", linewidth=0.8, linestyle=":")  # what eq. 6 says
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("1/(r π), Theorem 1")
    axes.set_ylabel("measured ratio of PR")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def draw_coupling(figure: Figure, found: Coupling) -> None:
    """Loss of the right label with the KL to the end of the first phase, and rewards, along the second (S4 Figure 3)."""
    left, right = figure.subplots(1, 2)
    places = range(len(found.points))
    names = [point.label for point in found.points]
    for axes, rows in (
        (left, (("SFT loss", [p.sft_loss for p in found.points]), ("KL", [p.kl for p in found.points]))),
        (right, (("J (strict, T = 1)", [p.objective for p in found.points]),)),
    ):
        for colour, (name, estimates) in zip(COLOURS, rows, strict=False):
            axes.plot(places, [e.value for e in estimates], "o-", color=colour, label=name)
            low, high = [e.low for e in estimates], [e.high for e in estimates]
            axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    right.plot(places, [p.strict.reward for p in found.points], "s--", color=COLOURS[1], label="reward, strict")
    right.plot(places, [p.robust.reward for p in found.points], "^--", color=COLOURS[2], label="reward, robust")
    right.plot(places, [p.robust.mcc for p in found.points], "x:", color=COLOURS[3], label="MCC, robust")
    for axes in (left, right):
        axes.set_xticks(places, names, rotation=20, ha="right", fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    left.set_ylabel("nats a text")


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _end(label: str) -> str:
    """The end of a long label, which tells more than its beginning."""
    return label if len(label) <= LONGEST_LABEL else f"…{label[1 - LONGEST_LABEL :]}"


def _shown(text: str) -> str:
    """A token as a label: blanks visible, and none of matplotlib's mathematics."""
    visible = repr(text)[1:-1].replace(" ", "␣")
    return visible.replace("$", r"\$")
