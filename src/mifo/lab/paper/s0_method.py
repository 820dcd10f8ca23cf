"""Findings of S0, the MIFO paper, about the method: its parts, its settings, templates, adapters, combinations."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from mifo.lab.arena_statistics import paired_difference
from mifo.lab.claims import Claim, Side, ratio
from mifo.lab.paper.finding import Evidence, Finding, accuracy_claim, per_seed, ratio_claim
from mifo.lab.paper.measure import solved_with_template
from mifo.lab.paper.plan import Plan, Tables
from mifo.lab.trials import Trial

INSENSITIVE = 0.05
"""What a score may change and still count as insensitive to a setting: five points."""

# --- parts: Figure 7 and Table 4 ---------------------------------------------------------------------------------------

PARTS = ("int", "es", "pf", "mifo")


def parts_trials(plan: Plan, seed: int) -> list[Trial]:
    """Interleaving, with each part, and with both (MIFO), from the start at an equal budget."""
    methods = {
        "int": plan.mifo(token_fraction=1.0, freeze_top=0.0),
        "es": plan.mifo(freeze_top=0.0),
        "pf": plan.mifo(token_fraction=1.0),
        "mifo": plan.mifo(),
    }
    return [_budgeted(plan, name, seed, method) for name, method in methods.items()]


def _budgeted(plan: Plan, name: str, seed: int, method: Tables) -> Trial:
    keep = name in TEMPLATE_METHODS
    return plan.trial(name, seed, method, after=plan.start(seed), flops=plan.tier.flops, keep=keep)


def _ablation(evidence: Evidence) -> Iterator[Claim]:
    for first, second, text, paper in (
        ("es", "int", "entropy selection improves on interleaving", "+5.2 points (1.5B), +0.9 (7B)"),
        ("pf", "int", "freezing improves on interleaving", "+4.4 points (1.5B), +2.7 (7B)"),
        ("mifo", "es", "both improve on entropy selection alone", "+0.8 points (1.5B), +2.9 (7B)"),
        ("mifo", "pf", "both improve on freezing alone", "+1.6 points (1.5B), +1.1 (7B)"),
    ):
        yield accuracy_claim(evidence, text, paper, first, second)


def _length(evidence: Evidence) -> Iterator[Claim]:
    lengths = {name: evidence.each(name, lambda run: run.summary["response_length_after"]) for name in PARTS}
    sides: tuple[tuple[str, str, Side, str], ...] = (
        ("es", "int", "above", "entropy selection lengthens responses"),
        ("pf", "int", "below", "freezing shortens responses"),
        ("mifo", "es", "below", "freezing beside entropy selection shortens responses"),
    )
    for first, second, side, text in sides:
        yield ratio_claim(text, "Figure 7", ratio(lengths[first], lengths[second]), side)


# --- the methods beside each other: Table 3 ----------------------------------------------------------------------------

OTHERS = {
    "sft-alone": ("SFT", "+7.4 points (1.5B), +5.4 (7B)"),
    "rl-alone": ("RL", "+7.0 points (1.5B), +8.8 (7B)"),
    "sft_rl": ("SFT→RL", "+6.5 points (1.5B), +5.0 (7B)"),
    "relift": ("relift", "+6.0 points (1.5B), +3.7 (7B)"),
    "luffy": ("luffy", "+1.6 points (1.5B), +4.6 (7B)"),
    "srft": ("srft", "+0.2 points (7B)"),
}


def _method_trials(plan: Plan, seed: int) -> list[Trial]:
    alone = {"sft-alone": plan.sft(), "rl-alone": plan.grpo(), "sft_rl": _with_adapters(plan, "sft_rl", False)}
    return [
        *_template_trials(plan, seed),
        *(_budgeted(plan, name, seed, method) for name, method in alone.items()),
    ]


def _methods(evidence: Evidence) -> Iterator[Claim]:
    for other, (name, points) in OTHERS.items():
        yield accuracy_claim(evidence, f"MIFO is better than {name}", points, "mifo", other)


# --- sensitivity: Figure 10 and Table 11 -----------------------------------------------------------------------------


def _variants(plan: Plan) -> dict[str, Tables]:
    half, twice = max(1, plan.tier.buffer // 2), 2 * plan.tier.buffer
    return {
        "p-0.25": {"accuracy_threshold": 0.25},  # of four rollouts none or one: the paper's 1/8 means none, as 0 would
        "p-0.5": {"accuracy_threshold": 0.5},
        "rho-0.1": {"token_fraction": 0.1},
        "rho-0.5": {"token_fraction": 0.5},
        "k-0.25": {"freeze_top": 0.25},
        "k-0.75": {"freeze_top": 0.75},
        "alpha-0": {"history": 0.0},
        "alpha-0.75": {"history": 0.75},
        f"buffer-{half}": {"buffer_size": half},
        f"buffer-{twice}": {"buffer_size": twice},
    }


def _sensitivity_trials(plan: Plan, seed: int) -> list[Trial]:
    variants = [_budgeted(plan, f"mifo-{name}", seed, plan.mifo(**over)) for name, over in _variants(plan).items()]
    return [*variants, _budgeted(plan, "mifo", seed, plan.mifo())]


def _sensitivity(evidence: Evidence) -> Iterator[Claim]:
    half = f"buffer-{max(1, evidence.plan.tier.buffer // 2)}"
    for name in _variants(evidence.plan):
        changed = evidence.difference(f"mifo-{name}", "mifo")
        text = name.replace("-", " = ")
        if name == half:  # S0 does not call the buffer insensitive
            paper = "36.3 at 64, 34.4 at 16, 32.4 at 8"
            yield Claim(
                text=f"{text}: worse than the default", paper=paper, unit="points", side="below", measured=changed
            )
            continue
        yield Claim(
            text=f"{text}: within {100 * INSENSITIVE:g} points of the default",
            paper="36.3 at 64, 36.1 at 128" if name.startswith("buffer") else "insensitive, Figure 10",
            unit="points",
            side="within",
            margin=INSENSITIVE,
            measured=changed,
        )


def _without_history(evidence: Evidence) -> Iterator[str]:
    """Where α could not matter: it weighs the intervals before the last."""
    seeds = [str(seed) for seed, run in evidence.runs("mifo").items() if run.summary["intervals"] < 2]
    if seeds:
        yield f"the budget ended within the first interval or behind it, where α has no effect: seed {', '.join(seeds)}"


# --- templates, adapters, combinations: Tables 13, 14, 9 -------------------------------------------------------------

TEMPLATE_METHODS = ("mifo", "luffy", "srft", "relift")
TEMPLATE_PAPER = {
    "none": {"relift": "+3.8", "luffy": "+3.4", "srft": "+0.8"},
    "qwen": {"relift": "+1.6", "luffy": "+2.6", "srft": "+1.0"},
    "prime": {"relift": "+1.1", "luffy": "+3.8", "srft": "+1.0"},
}


def _template_trials(plan: Plan, seed: int) -> list[Trial]:
    others = [_budgeted(plan, name, seed, plan.other(name)) for name in TEMPLATE_METHODS if name != "mifo"]
    return [_budgeted(plan, "mifo", seed, plan.mifo()), *others]


def _templates(evidence: Evidence) -> Iterator[Claim]:
    for template in evidence.plan.tier.templates:
        solved = {name: solved_with_template(evidence, name, template) for name in TEMPLATE_METHODS}
        for other, points in TEMPLATE_PAPER[template].items():
            both = bool(solved["mifo"]) and bool(solved[other])
            yield Claim(
                text=f"template {template}: MIFO is better than {other}",
                paper=f"{points} points",
                unit="points",
                side="above",
                measured=paired_difference(solved["mifo"], solved[other]) if both else None,
            )


ADAPTED = {"sft_rl": "-1.0", "relift": "-1.4", "mifo": "-2.1"}


def _with_adapters(plan: Plan, name: str, adapters: bool) -> Tables:
    own = {"sft": {"lora_rank": plan.tier.lora_rank, "lora_alpha": 2.0 * plan.tier.lora_rank}} if adapters else {}
    if name == "mifo":
        return plan.mifo(**own)
    over = {"sft_steps": max(1, plan.tier.start_updates // 2)} if name == "sft_rl" else {}
    return plan.other(name, **over, **own)


def _lora_trials(plan: Plan, seed: int) -> list[Trial]:
    trials = [_budgeted(plan, f"{name}-lora", seed, _with_adapters(plan, name, True)) for name in ADAPTED]
    return trials + [_budgeted(plan, name, seed, _with_adapters(plan, name, False)) for name in ADAPTED]


def _lora(evidence: Evidence) -> Iterator[Claim]:
    for name, points in ADAPTED.items():
        text = f"{name}: SFT by adapters is worse than of all weights"
        yield accuracy_claim(evidence, text, f"{points} points", f"{name}-lora", name, "below")


COMBINATIONS = {("ce", "grpo"): "+2.8", ("dft", "grpo"): "+1.9", ("ce", "dapo"): "+2.3", ("dft", "dapo"): "+1.8"}


def _combined(plan: Plan, method: str, sft: str, rl: str) -> Tables:
    dapo = {"advantage_std": True, "clip_high": 0.28, "dynamic_sampling": True, "dynamic_rounds": 4}
    over = {
        "sft": {"loss": "dft" if sft == "dft" else "cross_entropy"},
        "rl": {**plan.rl, **(dapo if rl == "dapo" else {})},
    }
    if method == "mifo":
        return plan.mifo(**over)
    return plan.other("sft_rl", sft_steps=max(1, plan.tier.start_updates // 2), **over)


def _combination(method: str, sft: str, rl: str) -> str:
    """The name of its run; cross-entropy with GRPO is the method as it stands in other findings."""
    return method if (sft, rl) == ("ce", "grpo") else f"{method}-{sft}-{rl}"


def _combination_trials(plan: Plan, seed: int) -> list[Trial]:
    return [
        _budgeted(plan, _combination(method, sft, rl), seed, _combined(plan, method, sft, rl))
        for (sft, rl), method in product(COMBINATIONS, ("mifo", "sft_rl"))
    ]


def _combinations(evidence: Evidence) -> Iterator[Claim]:
    for (sft, rl), points in COMBINATIONS.items():
        text = f"{'SFT' if sft == 'ce' else 'DFT'}+{rl.upper()}: MIFO is better than SFT→RL"
        first, second = (_combination(method, sft, rl) for method in ("mifo", "sft_rl"))
        yield accuracy_claim(evidence, text, f"{points} points", first, second)


FINDINGS = (
    Finding(
        name="methods",
        source="S0, Table 3",
        claim="MIFO ends higher than SFT, RL, SFT→RL, ReLIFT, LUFFY and SRFT.",
        setting="Each method from the start at equal FLOPs.",
        trials=per_seed(_method_trials),
        judge=lambda e: tuple(_methods(e)),
    ),
    Finding(
        name="length",
        source="S0, Figure 7",
        claim="Parameter freezing shortens responses; entropy selection lengthens them.",
        setting="Interleaving with and without each part from the start, at equal FLOPs; lengths after training.",
        trials=per_seed(parts_trials),
        judge=lambda e: tuple(_length(e)),
        in_arena={name: name for name in PARTS},
    ),
    Finding(
        name="ablation",
        source="S0, Table 4",
        claim="Both parts improve on interleaving, and both together on each.",
        setting="The runs of length.",
        trials=per_seed(parts_trials),
        judge=lambda e: tuple(_ablation(e)),
        in_arena={name: name for name in PARTS},
    ),
    Finding(
        name="sensitivity",
        source="S0, Figure 10 and Table 11",
        claim="MIFO is insensitive to p, ρ, k and α; a small buffer is worse, a larger one is not.",
        setting="MIFO from the start at equal FLOPs, one setting changed at a time.",
        trials=per_seed(_sensitivity_trials),
        judge=lambda e: tuple(_sensitivity(e)),
        remarks=lambda e: tuple(_without_history(e)),
    ),
    Finding(
        name="templates",
        source="S0, Table 13",
        claim="MIFO is better than LUFFY, SRFT and ReLIFT under prompts that it was not trained with.",
        setting="The four methods from the start at equal FLOPs, measured with the paper's templates that fit the context.",
        trials=per_seed(_template_trials),
        judge=lambda e: tuple(_templates(e)),
    ),
    Finding(
        name="lora",
        source="S0, Table 14",
        claim="SFT phases by low-rank adapters are worse than of all weights.",
        setting="SFT→RL, ReLIFT and MIFO from the start at equal FLOPs, with and without adapters.",
        trials=per_seed(_lora_trials),
        judge=lambda e: tuple(_lora(e)),
    ),
    Finding(
        name="combinations",
        source="S0, Table 9",
        claim="MIFO is better than SFT→RL whichever losses are combined.",
        setting="SFT or DFT with GRPO or DAPO from the start at equal FLOPs.",
        trials=per_seed(_combination_trials),
        judge=lambda e: tuple(_combinations(e)),
    ),
)
