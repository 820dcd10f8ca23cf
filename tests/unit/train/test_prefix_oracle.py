"""Whole updates of the methods that continue demonstrations, and of SASR, against their printed objectives, in fp64.

As in test_mixed_oracle: one response at a time, plain passes, autograd; the oracle knows groups and rewards, not terms.
"""

from dataclasses import replace

import pytest
import torch
from test_invariance import gradient
from test_mixed_oracle import RL, make_groups, mean, on_policy, stats

from mifo.config.check import check_config
from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.methods import make_method
from mifo.train.model import tiny_model
from mifo.train.policy import Policy


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny_model(seed=1, hidden=32).double())


def begun(group, prefixes):
    """The group with rollouts that begin with so many tokens of its demonstration."""
    rollouts = tuple(
        replace(r, token_ids=group.demonstration_ids[:p] + r.token_ids, prefix_tokens=p)
        for r, p in zip(group.rollouts, prefixes, strict=True)
    )
    return replace(group, rollouts=rollouts)


def std(rewards):
    return float(torch.tensor(rewards, dtype=torch.float64).std()) + 1e-6


def uft(policy, reference, groups):
    """GRPO with std and KL on continuations, entropy bonus there, 0.001 NLL over the hint tokens of every rollout."""
    pg, ent, kl, nll, sampled, shown = 0.0, 0.0, 0.0, 0.0, 0, 0
    for g in groups:
        for r, reward in zip(g.rollouts, g.rewards, strict=True):
            p = r.prefix_tokens
            logp, entropy = stats(policy, g, r.token_ids)
            with torch.no_grad():
                ref, _ = stats(reference, g, r.token_ids)
            if len(set(g.rewards)) > 1:
                pg = pg + on_policy(logp[p:], (reward - mean(g.rewards)) / std(g.rewards)).sum()
            ent, d = ent - entropy[p:].sum(), ref[p:] - logp[p:]
            kl = kl + (d.exp() - d - 1).sum()
            nll = nll - logp[:p].sum()
            sampled, shown = sampled + len(logp) - p, shown + p
    return (pg + 0.001 * kl + 0.01 * ent) / sampled + 0.001 * nll / shown


def prefix_rft(policy, reference, groups, *, form="shared", entropy_from_start=True, alone=False):
    """One ranking over all prefix tokens (`alone`: of each response); the advantage of the others is 0, and they still count."""
    rows, rankings = [], {}
    for g in groups:
        for r in g.rollouts:
            rows.append(stats(policy, g, r.token_ids))
            rankings.setdefault(len(rows) if alone else 0, []).extend(
                (-float(h.detach().float()), len(rows) - 1, t) for t, h in enumerate(rows[-1][1][: r.prefix_tokens])
            )
    kept = {(i, t) for ranking in rankings.values() for _, i, t in sorted(ranking)[: -(-len(ranking) // 5)]}
    assert 1 < len(kept) < sum(map(len, rankings.values()))
    total, ent, counted, tokens, i = 0.0, 0.0, 0, 0, -1
    for g in groups:
        plain = mean(g.rewards[:-1])
        for n, (r, reward) in enumerate(zip(g.rollouts, g.rewards, strict=True)):
            i, p = i + 1, r.prefix_tokens
            (logp, entropy), hybrid = rows[i], n == len(g.rollouts) - 1
            head = reward - (mean(g.rewards) if form == "shared" else plain)
            rest = {"shared": head, "dr_grpo_prefix": reward, "dr_grpo_prefix_v2": 0.0}[form] if hybrid else head
            row = [head * ((i, t) in kept) for t in range(p)] + [rest] * (len(logp) - p)
            total = total + on_policy(logp, torch.tensor(row, dtype=torch.float64)).sum()
            start = 0 if entropy_from_start else p
            ent, counted = ent - entropy[start:].sum(), counted + len(logp) - start
            tokens += len(logp)
    return total / tokens + 0.01 * ent / counted


def bread(policy, reference, groups):
    """Four questions: the second and third failed; the second was found a group behind a prefix, the third was not."""
    total, tokens = 0.0, 0
    for g in (groups[0], groups[4], groups[2], groups[3]):
        for r, reward in zip(g.rollouts, g.rewards, strict=True):
            p = r.prefix_tokens
            logp, _ = stats(policy, g, r.token_ids)
            total = total + on_policy(logp[p:], reward - mean(g.rewards)).sum()
            tokens += len(logp) - p
    return total / tokens


ENT = {"entropy_coefficient": 0.01}
CASES = {
    "uft": (uft, {"rl": RL | ENT | {"advantage_std": True, "kl_coefficient": 0.001}}, (0, 1, 2, 4), "same"),
    "prefix_rft": (prefix_rft, {"rl": RL | ENT}, (0, 1, 2, 4), "last"),
    "dr_grpo_prefix": (
        lambda *a: prefix_rft(*a, form="dr_grpo_prefix"),
        {"name": "prefix_rft", "rl": RL | ENT, "advantage": "dr_grpo_prefix"},
        (0, 1, 2, 4),
        "last",
    ),
    "dr_grpo_prefix_v2": (
        lambda *a: prefix_rft(*a, form="dr_grpo_prefix_v2", entropy_from_start=False),
        {"name": "prefix_rft", "rl": RL | ENT, "advantage": "dr_grpo_prefix_v2", "entropy_span": "continuation"},
        (0, 1, 2, 4),
        "last",
    ),
    "prefix_rft of micro-batches of one response": (
        lambda *a: prefix_rft(*a, alone=True),
        {"name": "prefix_rft", "rl": RL | ENT, "legacy": {"gpus": 2, "micro_batch_tokens": 1}},
        (0, 1, 2, 4),
        "last",
    ),
    "prefix_rft of one micro-batch": (
        prefix_rft,
        {"name": "prefix_rft", "rl": RL | ENT, "legacy": {"gpus": 1, "micro_batch_tokens": 10**6}},
        (0, 1, 2, 4),
        "last",
    ),
    "bread": (bread, {"rl": RL}, (1, 0, 0, 2, 3, 4), "again"),
}


def prefixed(groups, kind):
    if kind == "again":  # two groups more: one of question 1 in the band, one of question 2 above it
        again = [replace(g, problem=groups[i].problem) for g, i in ((groups[4], 1), (groups[5], 2))]
        again = [replace(g, prompt_ids=groups[i].prompt_ids) for g, i in zip(again, (1, 2), strict=True)]
        return groups[:4] + [begun(g, [1] * len(g.rollouts)) for g in again]
    cuts = [len(g.demonstration_ids) // 2 for g in groups]
    cuts[2] = 0 if kind == "same" else cuts[2]
    return [begun(g, [c] * 4 if kind == "same" else [0, 0, 0, c]) for g, c in zip(groups, cuts, strict=True)]


@pytest.fixture(scope="module")
def reference():
    return Policy(tiny_model(seed=2, hidden=32).double())


@pytest.mark.parametrize("budget", [40, 10**6])
@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_the_objective(policy, reference, name, budget):
    oracle, settings, correct, kind = CASES[name]
    groups = prefixed(make_groups(policy, correct, 4), kind)
    if kind == "last":  # of the last group the hybrid is wrong, elsewhere it is right
        groups = [replace(g, rewards=(*g.rewards[:-1], float(i < 3))) for i, g in enumerate(groups)]
    table = {"name": name, **settings}
    legacy = (
        {"name": "prefix_rft", "prefix_ranking": "within_micro_batches", **table.pop("legacy")}
        if "legacy" in table
        else {}
    )
    config = decode(Config, {"method": table, "legacy": legacy})
    check_config(config)
    method = make_method(config)
    [update] = method.updates(method.next_phase(), groups)
    found, _ = gradient(policy, update, budget=budget, reference=reference)
    expected = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(oracle(policy, reference, groups), policy.parameters)]
    )
    assert float(expected.norm()) > 1e-3
    assert float((found - expected).norm() / expected.norm()) < 1e-9


def test_sasr_takes_either_gradient_whole(policy, reference):
    """An SFT step is the token mean of NLL, an RL step GRPO with KL to the reference; nothing is mixed."""
    config = decode(Config, {"method": {"name": "sasr", "rl": RL | {"kl_coefficient": 0.1}, "warmup_steps": 1}})
    sasr = make_method(config)
    groups = make_groups(policy, (0, 1, 2, 3), 4)
    [sft] = sasr.updates(sasr.next_phase(), groups)
    nll = sum(-stats(policy, g, g.demonstration_ids)[0].sum() for g in groups)
    nll = nll / sum(len(g.demonstration_ids) for g in groups)
    [rl] = sasr.updates(replace(sasr.next_phase(), name="rl"), groups)
    total, tokens = 0.0, 0
    for g in groups:
        for r, reward in zip(g.rollouts, g.rewards, strict=True):
            logp, _ = stats(policy, g, r.token_ids)
            with torch.no_grad():
                d = stats(reference, g, r.token_ids)[0]
            total = total + on_policy(logp, reward - mean(g.rewards)).sum()
            total = total + 0.1 * ((d - logp).exp() - (d - logp) - 1).sum()
            tokens += len(logp)
    for update, objective in ((sft, nll), (rl, total / tokens)):
        found, _ = gradient(policy, update, budget=60, reference=reference)
        expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(objective, policy.parameters)])
        assert float((found - expected).norm() / expected.norm()) < 1e-9
