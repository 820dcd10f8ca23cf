"""Findings of S2, the corrected-baseline paper: SFT→RL against mixed methods, and a short RL phase."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mifo.lab.bugs import BugSettings, bug_trials, compare_bugs, read_bug_run
from mifo.lab.claims import KEPT, Claim, in_points
from mifo.lab.paper.finding import Evidence, Finding, accuracy_claim, per_seed
from mifo.lab.paper.plan import Plan
from mifo.lab.trials import Trial

MIXED = {"luffy": "+10.7", "relift": "+8.2", "srft": "+3.8", "prefix_rft": "+5.2", "hpt": "+4.3"}
SFT_AHEAD = {"luffy": "+5.9", "relift": "+3.4", "prefix_rft": "+0.4"}
SHORT_AHEAD = {"luffy": "+9.3", "relift": "+6.8", "srft": "+2.4", "prefix_rft": "+3.8", "hpt": "+2.9"}
IN_ARENA = ("sft", "sft_rl", "luffy", "relift", "srft")
SHORTER, RATE = 4, 5.0  # the short phase: a quarter of the steps (the paper: 50 of 500) at five times the rate


def _corrected_trials(plan: Plan, seed: int) -> list[Trial]:
    """From the model as it ships, since SFT is part of what is compared."""
    methods = {
        "sft": plan.sft(),
        "sft_rl": plan.other("sft_rl"),
        **{name: plan.other(name) for name in MIXED},
    }
    compared = [
        plan.trial(f"shipped-{name}", seed, method, flops=plan.tier.shipped_flops) for name, method in methods.items()
    ]
    return [*compared, plan.rl_phase(seed), _short_phase(plan, seed)]


def _corrected(evidence: Evidence) -> Iterator[Claim]:
    for other, points in MIXED.items():
        yield accuracy_claim(
            evidence, f"SFT→RL is better than {other}", f"{points} points", "shipped-sft_rl", f"shipped-{other}"
        )
    for other, points in SFT_AHEAD.items():
        text = f"SFT alone is better than {other}"
        yield accuracy_claim(evidence, text, f"{points} points", "shipped-sft", f"shipped-{other}")
    yield accuracy_claim(evidence, "RL on top of SFT improves on it", "+4.8 points", "rl", "start")
    for other, points in SHORT_AHEAD.items():
        text = f"a short RL phase on top of SFT is better than {other}"
        yield accuracy_claim(evidence, text, f"{points} points", "rl-short", f"shipped-{other}")


def _beside_budgets(evidence: Evidence) -> Iterator[str]:
    """The other comparison of SFT→RL and SFT: RL takes the place of further SFT. And what the short phase spent."""
    found = evidence.difference("shipped-sft_rl", "shipped-sft")
    if found is not None:
        yield f"at an equal budget, part of it for RL, SFT→RL less SFT alone: {in_points(found)}; the paper does not compare that"
    spent = [
        sum(evidence.each(name, lambda run: run.summary["flops"])[seed] for name in ("start", "rl-short"))
        for seed in sorted(evidence.runs("start").keys() & evidence.runs("rl-short").keys())
    ]
    if spent:
        budget = evidence.plan.tier.shipped_flops
        yield f"the start and the short phase spent {100 * max(spent) / budget:.0f} % of the budget of the others at most"


def _short_steps(plan: Plan) -> int:
    return max(1, plan.tier.rl_steps // SHORTER)


def _short_phase(plan: Plan, seed: int) -> Trial:
    rate = plan.base["rl_optimizer"]["learning_rate"] * RATE
    return plan.trial(
        "rl-short",
        seed,
        plan.grpo(),
        after=plan.start(seed),
        steps=_short_steps(plan),
        tables={"rl_optimizer": {"learning_rate": rate}},
    )


def _short_trials(plan: Plan, seed: int) -> list[Trial]:
    return [plan.rl_phase(seed), _short_phase(plan, seed)]


def _short(evidence: Evidence) -> Iterator[Claim]:
    yield accuracy_claim(
        evidence, "the short phase keeps up with the long one", "-1.4 points", "rl-short", "rl", bound=-KEPT
    )
    yield accuracy_claim(evidence, "the short phase improves on SFT", "+3.4 points", "rl-short", "start")


# --- the two bugs: Table 2 and Figure 2 --------------------------------------------------------------------------------


def _bug_settings(plan: Plan) -> BugSettings:
    return BugSettings(seeds=plan.tier.seeds, steps=max(1, plan.tier.start_updates // 2))


def _bug_trials(plan: Plan) -> list[Trial]:
    return list(bug_trials(plan.recipe(), _bug_settings(plan)).values())


def _bugs(evidence: Evidence) -> Sequence[Claim]:
    settings = _bug_settings(evidence.plan)
    runs = [
        read_bug_run(variant, evidence.results[trial.name])
        for (variant, _), trial in bug_trials(evidence.plan.recipe(), settings).items()
        if trial.name in evidence.results
    ]
    return compare_bugs(settings, runs).claims


FINDINGS = (
    Finding(
        name="corrected",
        source="S2, Tables 1 and 5",
        claim="Without the bugs, SFT followed by RL is better than the mixed methods, and SFT alone than some of them.",
        setting="From the model as it ships at equal FLOPs, each method with its recipe's rates; RL on top of SFT: the start and "
        "its RL phase, or the short one.",
        trials=per_seed(_corrected_trials),
        judge=lambda e: tuple(_corrected(e)),
        in_arena={f"shipped-{name}": name for name in IN_ARENA},
        remarks=lambda e: tuple(_beside_budgets(e)),
    ),
    Finding(
        name="short-rl",
        source="S2, Table 5",
        claim="A tenth of the RL steps at five times the rate brings most of what RL brings.",
        setting=f"RL from the start, and 1/{SHORTER} of its steps, rounded down, at {RATE:g} times the rate.",
        trials=per_seed(_short_trials),
        judge=lambda e: tuple(_short(e)),
        remarks=lambda e: (
            f"steps of the short and of the long phase: {_short_steps(e.plan)} and {e.plan.tier.rl_steps}",
        ),
    ),
    Finding(
        name="bugs",
        source="S2, Table 2 and Figure 2",
        claim="Dropped micro-batches cost SFT most, a mean of means little; the loss and its variability show them.",
        setting="SFT of the model as it ships, once right and with each bug (mifo probe bugs).",
        trials=_bug_trials,
        judge=_bugs,
    ),
)
