"""Findings of S4, the non-decoupling paper: a second phase undoes what the first one reached."""

from __future__ import annotations

from collections.abc import Iterator

from mifo.lab.claims import Claim, ratio
from mifo.lab.paper.finding import Evidence, Finding, accuracy_claim, per_seed, ratio_claim
from mifo.lab.paper.measure import demonstrations
from mifo.lab.paper.plan import Plan
from mifo.lab.trials import Trial


def _sft_rl_trials(plan: Plan, seed: int) -> list[Trial]:
    return [plan.rl_phase(seed)]


def _sft_rl(evidence: Evidence) -> Iterator[Claim]:
    loss = {name: demonstrations(evidence, name, "validation")["loss"] for name in ("shipped", "start", "rl")}
    yield ratio_claim(
        "RL raises the loss on held-out demonstrations above that after SFT",
        "abruptly, Figure 3a",
        ratio(loss["rl"], loss["start"]),
    )
    yield ratio_claim(
        "and in the end above that of the model before SFT", "exceeds it", ratio(loss["rl"], loss["shipped"])
    )


def _rl_sft_trials(plan: Plan, seed: int) -> list[Trial]:
    rl = plan.rl_phase(seed)
    return [rl, plan.trial("rl-then-sft", seed, plan.sft(), after=rl, steps=plan.tier.start_updates)]


def _rl_sft(evidence: Evidence) -> Iterator[Claim]:
    yield accuracy_claim(
        evidence, "SFT after RL lowers the reward", "a sharp drop, Figure 3b", "rl-then-sft", "rl", "below"
    )
    yield accuracy_claim(
        evidence, "in the end below that before RL", "-2.1 points of accuracy", "rl-then-sft", "start", "below"
    )


FINDINGS = (
    Finding(
        name="sft-then-rl",
        source="S4, Figure 3a",
        claim="RL after SFT raises the SFT loss, in the end above that of the base model.",
        setting="The start and its RL phase; loss on demonstrations of held-out problems.",
        trials=per_seed(_sft_rl_trials),
        judge=lambda e: tuple(_sft_rl(e)),
    ),
    Finding(
        name="rl-then-sft",
        source="S4, Figure 3b",
        claim="SFT after RL lowers the reward, in the end below that of the base model.",
        setting="RL from the start, then as many SFT updates as made the start; accuracy on held-out problems is the reward.",
        trials=per_seed(_rl_sft_trials),
        judge=lambda e: tuple(_rl_sft(e)),
    ),
)
