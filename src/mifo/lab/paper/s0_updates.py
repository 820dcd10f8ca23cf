"""Findings of S0, the MIFO paper, about what training moves: forgetting, magnitude, redundancy, selection."""

from __future__ import annotations

from collections.abc import Iterator

from mifo.lab.arena_statistics import Runs
from mifo.lab.claims import KEPT, Claim, contrast, in_points, ratio
from mifo.lab.paper.finding import Evidence, Finding, accuracy_claim, per_seed, ratio_claim
from mifo.lab.paper.measure import smallest_layer_ratio, solved_pruned, total_norms
from mifo.lab.paper.plan import Plan
from mifo.lab.trials import Trial

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
    yield accuracy_claim(
        evidence, "MIFO's SFT loses less than SFT", "+0.9 against -15.6 points", "forget-mifo", "forget-rl_sft"
    )


def _rates(evidence: Evidence) -> str:
    base = evidence.plan.base
    sft, rl = (base[f"{name}_optimizer"]["learning_rate"] for name in ("sft", "rl"))
    return f"SFT has the recipe's rate, {sft:g}, and RL its own, {rl:g}; the paper has one rate for both"


# --- magnitude and redundancy: Figures 1 to 3 ----------------------------------------------------------------------


def _magnitude_trials(plan: Plan, seed: int) -> list[Trial]:
    return [plan.rl_phase(seed), plan.sft_like_rl(seed)]


def _magnitude(evidence: Evidence) -> Iterator[Claim]:
    sft, rl = total_norms(evidence, "start", "sft"), total_norms(evidence, "start", "rl")
    yield ratio_claim("SFT moves the weights further than RL", "much larger, Figure 1", ratio(sft, rl))
    yield ratio_claim(
        "in every layer: the least ratio over layers",
        "across all layers, Figure 1",
        ratio(smallest_layer_ratio(evidence, "start", "sft", "rl"), dict.fromkeys(evidence.plan.seeds, 1.0)),
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
    yield Claim(
        text="SFT hardly loses by it",
        paper="-1.07 points",
        unit="points",
        side="within",
        margin=KEPT,
        measured=evidence.difference("sft-drop", "sft"),
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
    solved = {
        name: {seed: solved_pruned(evidence, seed, "start", name) for seed in evidence.runs(name)}
        for name in ("rl", "sft")
    }

    def lost(name: str, rate: str, sign: float) -> list[tuple[float, Runs]]:
        own = solved[name]
        return [
            (sign, {s: found["0"] for s, found in own.items()}),
            (-sign, {s: found[rate] for s, found in own.items()}),
        ]

    papers = ("5.6 against 0.9 points, at a rate it does not print", "14.4 against 2.4 points, at a higher rate")
    for place, rate in enumerate(plan.tier.rates):
        yield Claim(
            text=f"RL loses more than SFT when {100 * rate:g} % of the change is taken back",
            paper=papers[min(place, 1)],
            unit="points",
            side="above",
            measured=contrast([*lost("rl", f"{rate:g}", 1.0), *lost("sft", f"{rate:g}", -1.0)]),
        )


def _gains(evidence: Evidence) -> Iterator[str]:
    """What there was to lose."""
    rl, sft = (evidence.difference(name, "start") for name in ("rl", "sft"))
    if rl is not None and sft is not None:
        yield f"from the start RL had gained {in_points(rl)}, and SFT {in_points(sft)}: who gained more has more to lose"


# --- selection: Figure 6 -------------------------------------------------------------------


def _selection_trials(plan: Plan, seed: int) -> list[Trial]:
    return [plan.sft_like_rl(seed), plan.sft_like_rl(seed, "sft-selected", token_fraction=0.2)]


def _selection(evidence: Evidence) -> Iterator[Claim]:
    whole, selected = total_norms(evidence, "start", "sft"), total_norms(evidence, "start", "sft-selected")
    yield ratio_claim(
        "SFT on the 20 % of tokens with the highest entropy moves the weights less than on all",
        "noticeably less in most layers",
        ratio(selected, whole),
        "below",
    )


FINDINGS = (
    Finding(
        name="forgetting",
        source="S0, Table 2",
        claim="A few steps of SFT, LUFFY, SRFT or ReLIFT after RL undo what RL brought; RL and MIFO keep it.",
        setting="RL from the start, then a few steps of each objective from where it ends; paired with the end of RL. MIFO "
        "stands for its SFT: on high-entropy tokens, with what that RL moved most frozen.",
        trials=per_seed(_forgetting_trials),
        judge=lambda e: tuple(_forgetting(e)),
        remarks=lambda e: (_rates(e),),
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
        remarks=lambda e: tuple(_gains(e)),
    ),
    Finding(
        name="selection",
        source="S0, Figure 6",
        claim="SFT on high-entropy tokens alone makes smaller updates.",
        setting="SFT of magnitude, on all tokens and on the top 20 %.",
        trials=per_seed(_selection_trials),
        judge=lambda e: tuple(_selection(e)),
    ),
)
