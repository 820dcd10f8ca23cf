"""Whole updates of the mixed methods against their printed objectives: one response at a time, plain passes, autograd in fp64.

The oracle knows groups, rewards and demonstrations, not terms, weights or denominators. Budgets of 40 and a million tokens must
give its gradient alike.
"""

import math
import random

import pytest
import torch
from test_invariance import gradient, plain_forward

from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.methods import make_method
from mifo.train.model import tiny_model
from mifo.train.policy import Policy
from mifo.types import Group, Message, Problem, Rollout, Sequence, Taken, Verdict

RL = {"prompts_per_step": 4, "updates_per_step": 1, "rollouts_per_prompt": 4, "entropy_coefficient": 0.0}


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny_model(seed=1, hidden=32).double())


def make_groups(policy, correct, rollouts):
    """Groups of ragged random responses, the first `correct[i]` of them right; no rollouts where `correct[i]` is None."""
    draw = random.Random(5)
    size = policy.model.get_input_embeddings().num_embeddings

    def ids(low, high):
        return tuple(draw.randrange(size) for _ in range(draw.randrange(low, high)))

    groups = []
    for i, right in enumerate(correct):
        count = 0 if right is None else rollouts
        verdicts = tuple(Verdict.CORRECT if k < (right or 0) else Verdict.WRONG for k in range(count))
        responses = [ids(1, 20) for _ in verdicts]
        groups.append(
            Group(
                problem=Problem(id=f"p{i}", messages=(Message("user", "?"),), answer="1"),
                prompt_ids=ids(3, 9),
                rollouts=tuple(
                    Rollout(token_ids=r, logprobs=(-1.0,) * len(r), stop="stop", weight_version=0) for r in responses
                ),
                verdicts=verdicts,
                rewards=tuple(float(v is Verdict.CORRECT) for v in verdicts),
                demonstration_ids=ids(2, 30),
            )
        )
    return groups


def stats(policy, group, ids):
    """(log-probs, entropies) of one response of a group, with gradients."""
    return plain_forward(
        policy.model, Sequence(problem_id="", prompt_ids=group.prompt_ids, response_ids=tuple(ids), weights={})
    )


def mean(values):
    return sum(values) / len(values)


def on_policy(logp, advantage):
    return -advantage * torch.exp(logp - logp.detach())


def luffy(policy, groups):
    total, tokens = 0.0, 0
    for g in groups:
        base = mean([*g.rewards, 1.0])
        for r, reward in zip(g.rollouts, g.rewards, strict=True):
            total = total + on_policy(stats(policy, g, r.token_ids)[0], reward - base).sum()
            tokens += len(r.token_ids)
        p = stats(policy, g, g.demonstration_ids)[0].exp()
        total = total - (1.0 - base) * (p / (p + 0.1)).sum()
        tokens += len(p)
    return total / tokens


def rl_with_sft(policy, groups):
    pg, nll, sampled, shown = 0.0, 0.0, 0, 0
    for g in groups:
        for r, reward in zip(g.rollouts, g.rewards, strict=True):
            pg = pg + on_policy(stats(policy, g, r.token_ids)[0], reward - mean(g.rewards)).sum()
            sampled += len(r.token_ids)
        nll = nll - stats(policy, g, g.demonstration_ids)[0].sum()
        shown += len(g.demonstration_ids)
    return pg / sampled + 0.5 * nll / shown


def srft(policy, groups):
    demos, rolls, sampled, shown = 0.0, 0.0, 0, 0
    for g in groups:
        rewards = torch.tensor([*g.rewards, 1.0], dtype=torch.float64)
        advantage = 0.0 if rewards.min() == 1.0 else float((1.0 - rewards.mean()) / (rewards.std() + 1e-6))
        logp, entropy = stats(policy, g, g.demonstration_ids)
        demos = demos - 0.5 * torch.exp(-entropy.mean().detach()) * logp.sum() - advantage * logp.exp().sum()
        shown += len(logp)
        for r, verdict in zip(g.rollouts, g.verdicts, strict=True):
            logp, entropy = stats(policy, g, r.token_ids)
            right = verdict is Verdict.CORRECT
            rolls = rolls + (-0.1 * torch.exp(entropy.mean().detach()) * logp.sum() if right else logp.sum())
            sampled += len(logp)
    return demos / shown + rolls / sampled


def top_entropy(logp, entropy, share):
    """Which tokens of a response have the highest entropy: the ⌈share·n⌉ first of a sort."""
    order = sorted(range(len(logp)), key=lambda t: -float(entropy[t].detach()))[: math.ceil(share * len(logp))]
    kept = torch.zeros(len(logp), dtype=torch.float64)
    kept[order] = 1.0
    return kept


def srft_by_dft(policy, groups):
    """The demonstration's −ℓ is −sg(p)ℓ of the surest-not half of its tokens, divided by all of them; the rest is SRFT's."""
    total, shown = srft(policy, groups), sum(len(g.demonstration_ids) for g in groups)
    for g in groups:
        logp, entropy = stats(policy, g, g.demonstration_ids)
        weight = 0.5 * torch.exp(-entropy.mean().detach())
        instead = top_entropy(logp, entropy, 0.5) * logp.detach().exp() * logp
        total = total + weight * (logp.sum() - instead.sum()) / shown
    return total


def log_sigma(policy, groups):
    """Every question in both, σ₁ = −0.1 and σ₂ = 0.3; imitated are the surest-not quarter of the tokens."""
    pg, nll, sampled, shown = 0.0, 0.0, 0, 0
    for g in groups:
        for r, reward in zip(g.rollouts, g.rewards, strict=True):
            pg = pg + on_policy(stats(policy, g, r.token_ids)[0], reward - mean(g.rewards)).sum()
            sampled += len(r.token_ids)
        logp, entropy = stats(policy, g, g.demonstration_ids)
        nll = nll - (top_entropy(logp, entropy, 0.25) * logp).sum()
        shown += len(logp)
    return math.exp(0.2) * pg / sampled + math.exp(-0.6) * nll / shown


def gated(policy, groups):
    """HPT at γ = 1/4, β = 0.3: means over everything that could have taken part."""
    pg, nll, sampled, shown = 0.0, 0.0, 0, 0
    for g in groups:
        sampled += sum(len(r.token_ids) for r in g.rollouts)
        shown += len(g.demonstration_ids)
        if sum(g.rewards) <= 1:
            nll = nll - stats(policy, g, g.demonstration_ids)[0].sum()
            continue
        for r, reward in zip(g.rollouts, g.rewards, strict=True):
            pg = pg + on_policy(stats(policy, g, r.token_ids)[0], reward - mean(g.rewards)).sum()
    return pg / sampled + 0.3 * nll / shown


def chord(policy, groups):
    """μ = 0.3."""
    pg, sft, sampled, shown = 0.0, 0.0, 0, 0
    for g in groups:
        for r, reward in zip(g.rollouts, g.rewards, strict=True):
            pg = pg + on_policy(stats(policy, g, r.token_ids)[0], reward - mean(g.rewards)).sum()
            sampled += len(r.token_ids)
        if not g.rollouts:
            logp, _ = stats(policy, g, g.demonstration_ids)
            p = logp.detach().exp()
            sft = sft - (p * (1 - p) * logp).sum()
            shown += len(logp)
    return 0.7 * pg / sampled + 0.3 * sft / shown


CONSTANT_MU = {"mu_peak": 0.3, "mu_valley": 0.3, "mu_warmup_steps": 0, "mu_decay_steps": 0}
CASES = {
    "luffy": (luffy, {"rl": RL}, (0, 1, 2, 3), 3),
    "rl_with_sft": (rl_with_sft, {"rl": RL, "sft_coefficient": 0.5}, (0, 1, 2, 3), 3),
    "srft": (srft, {"prompts_per_step": 4, "updates_per_step": 1, "rollouts_per_prompt": 3}, (0, 1, 3, 2), 3),
    "hpt": (gated, {"rl": RL, "accuracy_threshold": 0.25, "sft_coefficient": 0.3}, (0, 1, 2, 4), 4),
    "srft by dft": (
        srft_by_dft,
        {
            "prompts_per_step": 4,
            "updates_per_step": 1,
            "rollouts_per_prompt": 3,
            "sft": {"loss": "dft", "token_fraction": 0.5},
        },
        (0, 1, 3, 2),
        3,
    ),
    "superrl by sigma": (
        log_sigma,
        {"rl": RL, "gate": "log_sigma", "sigma_rate": 0.1, "sft": {"token_fraction": 0.25}},
        (0, 1, 2, 4),
        4,
    ),
    "chord": (
        chord,
        {"rl": RL, "sft": {"loss": "chord_phi"}, "demonstrations_per_step": 3, **CONSTANT_MU},
        (0, 1, 3, 4, None, None, None),
        4,
    ),
}


@pytest.mark.parametrize("budget", [40, 10**6])
@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_the_objective(policy, name, budget):
    oracle, settings, correct, rollouts = CASES[name]
    groups = make_groups(policy, correct, rollouts)
    method = make_method(decode(Config, {"method": {"name": name.split()[0], **settings}}))
    if name == "superrl by sigma":  # to −0.1 and 0.3
        method.learned(method.next_phase(), [Taken(grad_norm=1.0, losses={"pg": 0.0, "ce": 2.0})])
    [update] = method.updates(method.next_phase(), groups)
    found, _ = gradient(policy, update, budget=budget)
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(oracle(policy, groups), policy.parameters)])
    assert float(expected.norm()) > 1e-3
    assert float((found - expected).norm() / expected.norm()) < 1e-9
