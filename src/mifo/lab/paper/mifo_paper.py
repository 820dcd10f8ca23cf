"""Findings of S0, the MIFO paper: forgetting, magnitude, redundancy, the method and its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

from mifo.lab.arena_statistics import paired_difference
from mifo.lab.claims import Claim, Side, difference_over_seeds, ratio
from mifo.lab.paper.finding import Evidence, Finding
from mifo.lab.paper.measure import pruning_drop, smallest_layer_ratio, solved_with_template, total_norms
from mifo.lab.paper.plan import Plan, Tables
from mifo.lab.trials import Trial

KEPT = 0.02
"""What a score may lose and still count as kept: two points. The papers give no margin."""
INSENSITIVE = 0.05
"""What a score may change and still count as insensitive to a setting: five points."""

Variants = dict[str, Tables]


def per_seed(make: Callable[[Plan, int], Sequence[Trial]]) -> Callable[[Plan], Sequence[Trial]]:
    """The runs of every seed, seed by seed."""
    return lambda plan: [trial for seed in plan.seeds for trial in make(plan, seed)]


def accuracy_claim(
    evidence: Evidence, text: str, paper: str, first: str, second: str, side: Side = "above", bound: float = 0.0
) -> Claim:
    """That one run ends with a higher (or lower) accuracy than another."""
    return Claim(
        text=text, paper=paper, unit="points", side=side, bound=bound, measured=evidence.difference(first, second)
    )


# --- forgetting: Table 2 -------------------------------------------------------------------------------------------

FORGETTING = {
    "rl_sft": ("RL, then SFT", "-15.6"),
    "luffy": ("RL, then LUFFY", "-12.6"),
    "srft": ("RL, then SRFT", "-8.6"),
    "relift": ("RL, then ReLIFT", "-11.1"),
}


def _forgetting_trials(plan: Plan, seed: int) -> list[Trial]:
    rl, tier = plan.rl_phase(seed), plan.tier
    objectives = {
        "rl": plan.grpo(),
        "rl_sft": plan.sft(),
        "luffy": plan.other("luffy"),
        "srft": plan.other("srft"),
        "relift": plan.other("relift"),
    }
    trials = [
        plan.trial(f"forget-{name}", seed, method, after=rl, steps=tier.forget_steps)
        for name, method in objectives.items()
    ]
    frozen = ("mifo.lab.frozen_run", "--top", "0.5")  # what the RL phase moved most does not move
    selected = plan.sft(token_fraction=0.2)
    mifo = plan.trial("forget-mifo", seed, selected, after=rl, steps=tier.forget_steps, command=frozen)
    return [*trials, mifo]


def _forgetting(evidence: Evidence) -> Iterator[Claim]:
    yield accuracy_claim(evidence, "RL that goes on keeps the score", "+1.1 points", "forget-rl", "rl", bound=-KEPT)
    for name, (text, paper) in FORGETTING.items():
        yield accuracy_claim(evidence, f"{text}: the score falls", f"{paper} points", f"forget-{name}", "rl", "below")
    yield accuracy_claim(evidence, "RL, then MIFO keeps the score", "+0.9 points", "forget-mifo", "rl", bound=-KEPT)


# --- magnitude and redundancy: Figures 1 to 3 ----------------------------------------------------------------------


def _magnitude_trials(plan: Plan, seed: int) -> list[Trial]:
    return [plan.rl_phase(seed), plan.sft_like_rl(seed)]


def _magnitude(evidence: Evidence) -> Iterator[Claim]:
    sft, rl = total_norms(evidence, "start", "sft"), total_norms(evidence, "start", "rl")
    yield Claim(
        text="SFT moves the weights further than RL",
        paper="several times, read off the figure",
        unit="ratio",
        side="above",
        bound=1.0,
        measured=ratio(sft, rl),
    )
    yield Claim(
        text="in every layer: the least ratio over layers",
        paper="above 1 in all layers",
        unit="ratio",
        side="above",
        bound=1.0,
        measured=ratio(smallest_layer_ratio(evidence, "start", "sft", "rl"), dict.fromkeys(evidence.plan.seeds, 1.0)),
    )


def _online_trials(plan: Plan, seed: int) -> list[Trial]:
    drop = {"gradient_drop": 0.5}
    rate = plan.base["rl_optimizer"]["learning_rate"]
    start, steps = plan.start(seed), plan.tier.rl_steps
    return [
        plan.rl_phase(seed),
        plan.sft_like_rl(seed),
        plan.trial("rl-drop", seed, plan.grpo(), after=start, steps=steps, tables={"train": drop}),
        plan.trial(
            "sft-drop",
            seed,
            plan.sft(batch_size=plan.tier.prompts),
            after=start,
            steps=steps,
            tables={"train": drop, "sft_optimizer": {"learning_rate": rate}},
        ),
    ]


def _online(evidence: Evidence) -> Iterator[Claim]:
    yield accuracy_claim(
        evidence, "RL loses by dropping half of the gradient", "-4.23 points", "rl-drop", "rl", "below"
    )
    lost = {("rl", "after"): 1.0, ("rl-drop", "after"): -1.0, ("sft", "after"): -1.0, ("sft-drop", "after"): 1.0}
    yield Claim(
        text="RL loses more than SFT",
        paper="4.23 against 1.07 points",
        unit="points",
        side="above",
        measured=evidence.contrast(lost),
    )


def _pruning(evidence: Evidence) -> Iterator[Claim]:
    plan = evidence.plan
    drops = {
        name: {seed: pruning_drop(evidence, seed, "start", name) for seed in evidence.runs(name)}
        for name in ("rl", "sft")
    }
    papers = ("5.6 against 0.9 points, at a rate it does not print", "14.4 against 2.4 points, at a higher rate")
    for place, rate in enumerate(plan.tier.rates):
        key = f"{rate:g}"
        by_seed = {name: {seed: found[key] for seed, found in drops[name].items()} for name in drops}
        yield Claim(
            text=f"RL loses more than SFT when {100 * rate:g} % of the change is taken back",
            paper=papers[min(place, 1)],
            unit="points",
            side="above",
            measured=difference_over_seeds(by_seed["rl"], by_seed["sft"]),
        )


# --- the method's parts: Figures 6 and 7, Table 4 -------------------------------------------------------------------


def _selection_trials(plan: Plan, seed: int) -> list[Trial]:
    return [plan.sft_like_rl(seed), plan.sft_like_rl(seed, "sft-selected", token_fraction=0.2)]


def _selection(evidence: Evidence) -> Iterator[Claim]:
    whole, selected = total_norms(evidence, "start", "sft"), total_norms(evidence, "start", "sft-selected")
    yield Claim(
        text="SFT on the 20 % of tokens with the highest entropy moves the weights less than on all",
        paper="noticeably less in most layers",
        unit="ratio",
        side="below",
        bound=1.0,
        measured=ratio(selected, whole),
    )


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
        yield Claim(
            text=text,
            paper="read off the figure",
            unit="ratio",
            side=side,
            bound=1.0,
            measured=ratio(lengths[first], lengths[second]),
        )


# --- sensitivity: Figure 10 and Table 11 -----------------------------------------------------------------------------


def _variants(plan: Plan) -> Variants:
    half, twice = max(1, plan.tier.buffer // 2), 2 * plan.tier.buffer
    return {
        "p-0": {"accuracy_threshold": 0.0},
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
    for name in _variants(evidence.plan):
        paper = (
            "36.3 at 64, 36.1 at 128, 34.4 at 16" if name.startswith("buffer") else "insensitive, read off the figure"
        )
        yield Claim(
            text=f"{name.replace('-', ' = ')}: within {100 * INSENSITIVE:g} points of the default",
            paper=paper,
            unit="points",
            side="within",
            margin=INSENSITIVE,
            measured=evidence.difference(f"mifo-{name}", "mifo"),
        )


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


def _combination_trials(plan: Plan, seed: int) -> list[Trial]:
    return [
        _budgeted(plan, f"{method}-{sft}-{rl}", seed, _combined(plan, method, sft, rl))
        for (sft, rl), method in product(COMBINATIONS, ("mifo", "sft_rl"))
    ]


def _combinations(evidence: Evidence) -> Iterator[Claim]:
    for (sft, rl), points in COMBINATIONS.items():
        text = f"{'SFT' if sft == 'ce' else 'DFT'}+{rl.upper()}: MIFO is better than SFT→RL"
        yield accuracy_claim(evidence, text, f"{points} points", f"mifo-{sft}-{rl}", f"sft_rl-{sft}-{rl}")


FINDINGS = (
    Finding(
        name="forgetting",
        source="S0, Table 2",
        claim="A few steps of SFT, LUFFY, SRFT or ReLIFT after RL undo what RL brought; RL and MIFO keep it.",
        setting="RL from the start, then a few steps of each objective from where it ends; paired with the end of RL. MIFO "
        "stands for its SFT: on high-entropy tokens, with what that RL moved most frozen.",
        trials=per_seed(_forgetting_trials),
        judge=lambda e: tuple(_forgetting(e)),
    ),
    Finding(
        name="magnitude",
        source="S0, Figure 1",
        claim="At the same learning rate and data SFT moves every layer further than RL.",
        setting="RL and SFT from the start: equal rate, number of updates and problems in an update.",
        trials=per_seed(_magnitude_trials),
        judge=lambda e: tuple(_magnitude(e)),
    ),
    Finding(
        name="online-sparsity",
        source="S0, Figure 2",
        claim="Dropping half of the gradient's elements in every update costs RL more than SFT.",
        setting="The runs of magnitude, and the same with train.gradient_drop = 0.5.",
        trials=per_seed(_online_trials),
        judge=lambda e: tuple(_online(e)),
    ),
    Finding(
        name="pruning",
        source="S0, Figure 3",
        claim="Taking back a random share of the change costs RL more than SFT.",
        setting="The ends of the runs of magnitude, pruned toward the start.",
        trials=per_seed(_magnitude_trials),
        judge=lambda e: tuple(_pruning(e)),
    ),
    Finding(
        name="selection",
        source="S0, Figure 6",
        claim="SFT on high-entropy tokens alone makes smaller updates.",
        setting="SFT of magnitude, on all tokens and on the top 20 %.",
        trials=per_seed(_selection_trials),
        judge=lambda e: tuple(_selection(e)),
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
        claim="MIFO is insensitive to p, ρ, k, α and the size of the buffer.",
        setting="MIFO from the start at equal FLOPs, one setting changed at a time.",
        trials=per_seed(_sensitivity_trials),
        judge=lambda e: tuple(_sensitivity(e)),
    ),
    Finding(
        name="templates",
        source="S0, Table 13",
        claim="MIFO is better than LUFFY, SRFT and ReLIFT under prompts that it was not trained with.",
        setting="The four methods from the start at equal FLOPs, measured with other templates.",
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
