"""Findings of S3, the rejuvenation paper: what SFT for too long does to RL, and whether rejuvenation mends it."""

from __future__ import annotations

from collections.abc import Iterator

from mifo.lab.paper.finding import Evidence, Finding, ratio
from mifo.lab.paper.measure import demonstrations, total_norms
from mifo.lab.paper.mifo_paper import accuracy_claim, per_seed
from mifo.lab.paper.plan import Plan, Tables
from mifo.lab.paper.verdict import Claim
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


def rl_after(plan: Plan, trial: Trial, name: str, seed: int) -> Trial:
    """RL on all problems from the end of another run."""
    return plan.trial(f"{name}-rl", seed, plan.grpo(), after=trial, steps=plan.tier.rl_steps, keep=True)


def _output_trials(plan: Plan, seed: int) -> list[Trial]:
    return [sft_for(plan, stage, seed) for stage in STAGES]


def _training_loss(run: TrialResult) -> float | None:
    """Mean over the last epoch."""
    losses = [update["loss"] for update in run.updates if update["loss"] is not None]
    epoch = max(1, run.config.data.train_problems or 1) // run.config.method.batch_size  # type: ignore[union-attr]
    last = losses[-max(1, epoch) :]
    return sum(last) / len(last) if last else None


def _output(evidence: Evidence) -> Iterator[Claim]:
    entropy = {stage: demonstrations(evidence, stage, "validation")["entropy"] for stage in STAGES}
    loss = {stage: evidence.each(stage, _training_loss) for stage in STAGES}
    papers = {("mod", "under"): ("0.184 against 0.281", "0.111 against 0.178")}
    papers["over", "mod"] = ("0.024 against 0.184", "0.002 against 0.111")
    for (more, less), (of_entropy, of_loss) in papers.items():
        for figures, text, paper in ((entropy, "token entropy", of_entropy), (loss, "training loss", of_loss)):
            yield Claim(
                text=f"{text} falls from {less}- to {more}SFT",
                paper=paper,
                unit="ratio",
                side="below",
                bound=1.0,
                measured=ratio(figures[more], figures[less]),
            )
    yield Claim(
        text="overSFT moves the weights further than modSFT",
        paper="far more, read off the figure",
        unit="ratio",
        side="above",
        bound=1.0,
        measured=ratio(total_norms(evidence, "shipped", "over"), total_norms(evidence, "shipped", "mod")),
    )


def gain_trials(plan: Plan, seed: int) -> list[Trial]:
    """RL from the moderately and the over-trained model."""
    return [rl_after(plan, sft_for(plan, stage, seed), stage, seed) for stage in ("mod", "over")]


def _gradient_norm(run: TrialResult) -> float | None:
    norms = [update["grad_norm"] for update in run.updates if update["grad_norm"]]
    return sum(norms) / len(norms) if norms else None


def _gain(evidence: Evidence) -> Iterator[Claim]:
    moved = {stage: total_norms(evidence, stage, f"{stage}-rl") for stage in ("mod", "over")}
    gradient = {stage: evidence.each(f"{stage}-rl", _gradient_norm) for stage in ("mod", "over")}
    gained = {
        ("over-rl", "after"): 1.0,
        ("over-rl", "before"): -1.0,
        ("mod-rl", "after"): -1.0,
        ("mod-rl", "before"): 1.0,
    }
    yield Claim(
        text="RL's gradients are larger from overSFT than from modSFT",
        paper="much larger, read off the figure",
        unit="ratio",
        side="above",
        bound=1.0,
        measured=ratio(gradient["over"], gradient["mod"]),
    )
    yield Claim(
        text="RL moves the weights less from overSFT than from modSFT",
        paper="less, read off the figure",
        unit="ratio",
        side="below",
        bound=1.0,
        measured=ratio(moved["over"], moved["mod"]),
    )
    yield Claim(
        text="RL moves the weights less than the overSFT before it",
        paper="much less, read off the figure",
        unit="ratio",
        side="below",
        bound=1.0,
        measured=ratio(moved["over"], total_norms(evidence, "shipped", "over")),
    )
    yield Claim(
        text="RL gains less from overSFT than from modSFT",
        paper="+4.9 against +7.9 points",
        unit="points",
        side="below",
        measured=evidence.contrast(gained),
    )
    yield accuracy_claim(evidence, "and ends lower", "-2.1 points", "over-rl", "mod-rl", "below")


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
        setting="The same RL from the moderately and the over-trained model.",
        trials=per_seed(gain_trials),
        judge=lambda e: tuple(_gain(e)),
    ),
)
