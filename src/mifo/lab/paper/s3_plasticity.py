"""Findings of S3, the rejuvenation paper: what SFT for too long does to RL, and whether rejuvenation mends it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mifo.lab.arena_statistics import Estimate
from mifo.lab.claims import KEPT, Claim, Side, contrast, in_points, ratio
from mifo.lab.paper.finding import Evidence, Finding, accuracy_claim, per_seed, ratio_claim
from mifo.lab.paper.measure import PASS_SAMPLES, demonstrations, pass_gaps, total_norms
from mifo.lab.paper.plan import Plan, Tables
from mifo.lab.trials import Trial, TrialResult

STAGES = ("under", "mod", "over")


def sft_for(plan: Plan, stage: str, seed: int, name: str | None = None, **over: Tables) -> Trial:
    """SFT of the model as it ships on a few demonstrations, for the epochs of a stage."""
    tier = plan.tier
    epochs = tier.epochs[STAGES.index(stage)]
    return plan.trial(
        name or stage,
        seed,
        plan.sft(**over),
        steps=max(1, epochs * tier.few_demonstrations // tier.batch),
        keep=True,
        tables={"data": {"train_problems": tier.few_demonstrations}},
    )


def rl_after(plan: Plan, trial: Trial, name: str, seed: int, rejuvenate: Tables | None = None) -> Trial:
    """RL on all problems from the end of another run, which is rejuvenated towards the model as it ships before that.

    All have the seed of the SFT, since the random model of the smallest tier is made from it.
    """
    tables: dict[str, Any] = {"train": {"seed": seed}}
    if rejuvenate is not None:
        own = {"base": plan.shipped(seed), "samples": plan.tier.pairs, **rejuvenate}
        tables["stages"] = [{"rejuvenate": own}, {"steps": plan.tier.rl_steps}]
    return plan.trial(
        f"{name}-rl", seed, plan.grpo(), after=trial, steps=plan.tier.rl_steps, keep=rejuvenate is None, tables=tables
    )


def _output_trials(plan: Plan, seed: int) -> list[Trial]:
    return [sft_for(plan, stage, seed) for stage in STAGES]


def _training_loss(run: TrialResult) -> float | None:
    """At the end: mean over the last quarter of an epoch, for an epoch may be all of the training of underSFT."""
    losses = [update["loss"] for update in run.updates if update["loss"] is not None]
    epoch = max(1, run.config.data.train_problems or 1) // run.config.method.batch_size  # type: ignore[union-attr]
    last = losses[-max(1, epoch // 4) :]
    return sum(last) / len(last) if last else None


def _output(evidence: Evidence) -> Iterator[Claim]:
    entropy = {stage: demonstrations(evidence, stage, "validation")["entropy"] for stage in STAGES}
    loss = {stage: evidence.each(stage, _training_loss) for stage in STAGES}
    papers = {("mod", "under"): ("0.184 against 0.281", "0.111 against 0.178")}
    papers["over", "mod"] = ("0.024 against 0.184", "0.002 against 0.111")
    for (more, less), (of_entropy, of_loss) in papers.items():
        for figures, text, paper in ((entropy, "token entropy", of_entropy), (loss, "training loss", of_loss)):
            yield ratio_claim(
                f"{text} falls from {less}- to {more}SFT", paper, ratio(figures[more], figures[less]), "below"
            )
    moved = {stage: total_norms(evidence, "shipped", stage) for stage in ("mod", "over")}
    yield ratio_claim(
        "overSFT moves the weights further than modSFT", "larger, Figures 2 and 3", ratio(moved["over"], moved["mod"])
    )
    gaps = {stage: pass_gaps(evidence, stage) for stage in STAGES}
    for less, more, paper in (
        ("over", "mod", "11.2 against 15.3 points"),
        ("over", "under", "11.2 against 13.7 points"),
    ):
        yield Claim(
            text=f"Pass@{PASS_SAMPLES} - Pass@1 is smaller from {less}SFT than from {more}SFT",
            paper=paper,
            unit="points",
            side="below",
            measured=contrast([(1.0, gaps[less]), (-1.0, gaps[more])]),
        )


def gain_trials(plan: Plan, seed: int) -> list[Trial]:
    """RL from the under-, the moderately and the over-trained model."""
    return [rl_after(plan, sft_for(plan, stage, seed), stage, seed) for stage in STAGES]


def _gradient_norm(run: TrialResult) -> float | None:
    """Mean over all updates that were taken: one whose groups have equal rewards counts with its norm of 0."""
    norms = [
        norm for norm in (update["grad_norm"] for update in run.updates) if norm is not None and math.isfinite(norm)
    ]
    return sum(norms) / len(norms) if norms else None


def _gain(evidence: Evidence) -> Iterator[Claim]:
    ratios: tuple[tuple[str, str, Side, Estimate | None], ...] = (
        (
            "RL's gradients are larger from overSFT than from modSFT",
            "much larger, Figure 4",
            "above",
            _gradients(evidence, "mod"),
        ),
        (
            "RL moves the weights less from overSFT than from modSFT",
            "less, Figure 3",
            "below",
            _shifts(evidence, "mod"),
        ),
        (
            "RL moves the weights less than the overSFT before it",
            "much less, Figure 3",
            "below",
            ratio(total_norms(evidence, "over", "over-rl"), total_norms(evidence, "shipped", "over")),
        ),
    )
    for text, paper, side, measured in ratios:
        yield ratio_claim(text, paper, measured, side)
    yield Claim(
        text="RL gains less from overSFT than from modSFT",
        paper="+4.9 against +7.9 points",
        unit="points",
        side="below",
        measured=_gains(evidence, "mod"),
    )
    yield accuracy_claim(evidence, "and ends lower", "-2.1 points", "over-rl", "mod-rl", "below")


def _before_rl(evidence: Evidence) -> Iterator[str]:
    """Whether overSFT is over-trained at all."""
    found = evidence.difference("over-rl", "mod-rl", "before", "before")
    if found is not None:
        yield f"before RL overSFT is ahead of modSFT by {in_points(found)}; in the paper by +0.9"


def _beside(evidence: Evidence) -> Iterator[str]:
    """Where the runs begin; how many groups of rollouts tell RL anything; and the same against the under-trained model, which
    the paper has in Table 1 alone."""
    yield from _before_rl(evidence)
    mixed = {stage: evidence.each(f"{stage}-rl", lambda run: run.mixed_groups) for stage in ("over", "mod")}
    if all(mixed.values()):
        over, mod = (100 * sum(shares.values()) / len(shares) for shares in mixed.values())
        yield f"groups whose rewards differ, all others having no gradient: {over:.0f} % from overSFT, {mod:.0f} % from modSFT"
    for text, found in (
        ("RL's gradients", _gradients(evidence, "under")),
        ("how far RL moves the weights", _shifts(evidence, "under")),
    ):
        if found is not None:
            yield f"{text} from overSFT, beside underSFT: {found.value:.3g} times [{found.low:.3g}, {found.high:.3g}]"
    gained = _gains(evidence, "under")
    if gained is not None:
        yield f"what RL gains from overSFT, less what it gains from underSFT: {in_points(gained)}"


def _gradients(evidence: Evidence, stage: str) -> Estimate | None:
    over, other = (evidence.each(f"{name}-rl", _gradient_norm) for name in ("over", stage))
    return ratio(over, other)


def _shifts(evidence: Evidence, stage: str) -> Estimate | None:
    over, other = (total_norms(evidence, name, f"{name}-rl") for name in ("over", stage))
    return ratio(over, other)


def _gains(evidence: Evidence, stage: str) -> Estimate | None:
    signs = {("over-rl", "after"): 1.0, ("over-rl", "before"): -1.0}
    return evidence.contrast({**signs, (f"{stage}-rl", "after"): -1.0, (f"{stage}-rl", "before"): 1.0})


# --- rejuvenation: Tables 2 and 4 to 7 -------------------------------------------------------------------------------

REJUVENATED = "after stage 1"  # the evaluation behind the stage that rejuvenates
ALPHAS = (0.4, 0.45, 0.55, 0.6)
RHOS = (0.005, 0.02, 0.04)
OF_STAGES = {"rejuvenated-rl": "of overSFT", "mod-rejuvenated-rl": "of modSFT"}
OF_RHOS = {"rejuvenated-rl": "ρ = 1 %:"} | {f"rejuvenated-{rho:g}-rl": f"ρ = {100 * rho:g} %:" for rho in RHOS}


def _rejuvenated(plan: Plan, name: str, seed: int, stage: str = "over", **switches: float) -> Trial:
    return rl_after(plan, sft_for(plan, stage, seed), name, seed, switches)


def _reset_shares(evidence: Evidence, names: Mapping[str, str]) -> Iterator[str]:
    """How many neurons the union of all targets resets, which the paper calls very few."""
    shares = []
    for name, said in names.items():
        own = evidence.each(name, lambda run: run.summary["rejuvenations"][0]["neuron_share"])
        if own:
            shares.append(f"{said} {100 * sum(own.values()) / len(own):.0f} %")
    if shares:
        pairs = evidence.plan.tier.pairs
        yield f"neurons reset, the union over {pairs} pairs: {', '.join(shares)}; in the paper very few"


def _rejuvenation_trials(plan: Plan, seed: int) -> list[Trial]:
    dft = sft_for(plan, "over", seed, "over-dft", sft={"loss": "dft"})
    mod, over = (rl_after(plan, sft_for(plan, stage, seed), stage, seed) for stage in ("mod", "over"))
    return [
        mod,
        over,
        rl_after(plan, dft, "over-dft", seed),
        _rejuvenated(plan, "rejuvenated", seed, alpha=0.5, rho=0.01),
        _rejuvenated(plan, "fused", seed, alpha=0.5, rho=0.0),
        _rejuvenated(plan, "mod-rejuvenated", seed, "mod", alpha=0.5, rho=0.01),
    ]


def _rejuvenation(evidence: Evidence) -> Iterator[Claim]:
    for first, second, bound, text, paper in (
        ("rejuvenated", "over", 0.0, "rejuvenation before RL improves on RL from overSFT", "+2.6 points"),
        ("rejuvenated", "mod", -KEPT, "and reaches RL from modSFT", "+0.5 points"),
        ("fused", "over", 0.0, "fusion alone improves on RL from overSFT", "+2.1 points"),
        ("rejuvenated", "fused", 0.0, "resetting neurons improves on fusion alone", "+0.5 points"),
        ("over-dft", "over", 0.0, "DFT in place of SFT improves on RL from overSFT", "+0.3 points"),
        ("rejuvenated", "over-dft", 0.0, "rejuvenation improves on DFT", "+2.3 points"),
        ("mod-rejuvenated", "mod", 0.0, "rejuvenation improves on RL from modSFT too", "+0.6 points"),
    ):
        yield accuracy_claim(evidence, text, paper, f"{first}-rl", f"{second}-rl", bound=bound)
    gained = {
        ("rejuvenated-rl", "after"): 1.0,
        ("rejuvenated-rl", REJUVENATED): -1.0,
        ("over-rl", "after"): -1.0,
        ("over-rl", "before"): 1.0,
    }
    yield Claim(
        text="RL gains more after rejuvenation than from overSFT",
        paper="+12.1 against +4.9 points",
        unit="points",
        side="above",
        measured=evidence.contrast(gained),
    )


def _switch_trials(plan: Plan, seed: int) -> list[Trial]:
    return [
        _rejuvenated(plan, "rejuvenated", seed, alpha=0.5, rho=0.01),
        _rejuvenated(plan, "fused", seed, alpha=0.5, rho=0.0),
        *(_rejuvenated(plan, f"fused-{alpha:g}", seed, alpha=alpha, rho=0.0) for alpha in ALPHAS),
        *(_rejuvenated(plan, f"rejuvenated-{rho:g}", seed, alpha=0.5, rho=rho) for rho in RHOS),
    ]


def _switches(evidence: Evidence) -> Iterator[Claim]:
    for first, second, text, paper in (
        ("fused", "fused-0.4", "α = 0.5 is better than 0.4", "+0.2 points"),
        ("fused", "fused-0.45", "α = 0.5 is better than 0.45", "+0.2 points"),
        ("fused", "fused-0.55", "α = 0.5 is better than 0.55", "+0.4 points"),
        ("fused", "fused-0.6", "α = 0.5 is better than 0.6", "+1.2 points"),
        ("rejuvenated", "rejuvenated-0.005", "ρ = 1 % is better than 0.5 %", "+0.8 points"),
        ("rejuvenated", "rejuvenated-0.02", "ρ = 1 % is better than 2 %", "+0.2 points"),
        ("rejuvenated", "rejuvenated-0.04", "ρ = 1 % is better than 4 %", "+1.9 points"),
    ):
        yield accuracy_claim(evidence, text, paper, f"{first}-rl", f"{second}-rl")


FINDINGS = (
    Finding(
        name="saturation",
        source="S3, Table 1 and Figure 2",
        claim="SFT for too long drives entropy and training loss toward zero and the weights far away.",
        setting="SFT of the model as it ships for three numbers of epochs on a few demonstrations; entropy on held-out ones.",
        trials=per_seed(_output_trials),
        judge=lambda e: tuple(_output(e)),
    ),
    Finding(
        name="plasticity",
        source="S3, Figures 3 to 5 and Table 2",
        claim="From an over-trained model RL has larger gradients, moves less and gains less.",
        setting="The same RL from the under-, the moderately and the over-trained model.",
        trials=per_seed(gain_trials),
        judge=lambda e: tuple(_gain(e)),
        remarks=lambda e: tuple(_beside(e)),
    ),
    Finding(
        name="rejuvenation",
        source="S3, Tables 2, 4 and 7",
        claim="Fusing an over-trained model with its base and resetting neurons restores what RL gains, and where it ends.",
        setting="The same RL from the over-trained model, from it fused, fused and reset, and from its like trained by DFT.",
        trials=per_seed(_rejuvenation_trials),
        judge=lambda e: tuple(_rejuvenation(e)),
        remarks=lambda e: (
            *_before_rl(e),
            *_reset_shares(e, {"rejuvenated-rl": "of overSFT", "mod-rejuvenated-rl": "of modSFT"}),
        ),
    ),
    Finding(
        name="rejuvenation-switches",
        source="S3, Tables 5 and 6",
        claim="α = 0.5 and ρ = 1 % are better than less and more.",
        setting="RL after fusion with α of 0.4, 0.45, 0.5, 0.55 and 0.6, and after resetting with ρ of 0.5, 1, 2 and 4 %.",
        trials=per_seed(_switch_trials),
        judge=lambda e: tuple(_switches(e)),
        remarks=lambda e: tuple(
            _reset_shares(
                e, {"rejuvenated-rl": "ρ = 1 %:"} | {f"rejuvenated-{rho:g}-rl": f"ρ = {100 * rho:g} %:" for rho in RHOS}
            )
        ),
    ),
)
