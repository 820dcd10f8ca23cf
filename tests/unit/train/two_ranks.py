"""Run as two processes by test_two_ranks: gradients over gloo against one process, and sharded top-k against one shard."""

import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from builders import make_sequences

from mifo.config.schema import OptimizerConfig
from mifo.core.losses import CrossEntropy, PolicyGradient
from mifo.core.surgery import GradientDrop
from mifo.core.topk import Shards, select_top_k
from mifo.train.learner import Learner
from mifo.train.model import tiny_model
from mifo.train.optim import ScheduledAdamW
from mifo.train.parallel import World, current_world
from mifo.train.policy import Policy
from mifo.types import Term, TopPrefixEntropy, Update

TERMS = (
    Term(name="pg", loss=PolicyGradient(), normalizer="sequence", uses_old_policy=True),
    Term(name="ce", loss=CrossEntropy(), normalizer="token"),
)


def gradient(policy, sequences, world):
    learner = Learner(policy, micro_batch_tokens=30, world=world)
    learner.accumulate(Update(sequences=tuple(sequences), terms=TERMS))
    flat = torch.cat([p.grad.reshape(-1) for p in learner.parameters])
    learner._clear()
    return flat


def selections_are_shared(policy, everything, world):
    """The prefix tokens of highest entropy are those of both ranks together, also where one rank has none."""
    term = replace(TERMS[0], select=TopPrefixEntropy(fraction=0.2))
    prefixes = (2, 12, 4, 0)
    begun = [
        replace(s, prefix_tokens=p, sampler_logprobs=s.sampler_logprobs[p:])
        for s, p in zip(everything, prefixes, strict=True)
    ]
    for parts in (([0, 1], [2, 3]), ([0, 1, 2], [3])):
        found = []
        for ranks, mine in ((world, parts[world.rank]), (World(), [0, 1, 2, 3])):
            learner = Learner(policy, micro_batch_tokens=30, world=ranks)
            learner.accumulate(Update(sequences=tuple(begun[i] for i in mine), terms=(term,)))
            found.append(torch.cat([p.grad.reshape(-1) for p in learner.parameters]))
            learner._clear()
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def faults_are_shared(policy, everything, world):
    """A number that is not finite on one rank stops the step on all; that rank names the sample, all report the same."""
    optimizer = ScheduledAdamW(policy.parameters, OptimizerConfig())
    learner = Learner(policy, micro_batch_tokens=30, world=world)
    before = [p.detach().clone() for p in policy.parameters]
    good = everything[2 * world.rank : 2 * world.rank + 2]
    bad = [replace(good[0], weights={"pg": float("nan"), "ce": 1.0}), good[1]] if world.rank == 1 else good
    report = learner.apply(Update(sequences=tuple(bad), terms=TERMS), optimizer)
    assert not report.taken
    assert [s.problem_id for s in report.fault.samples] == ([good[0].problem_id] if world.rank == 1 else [])
    assert all(torch.equal(p, old) for p, old in zip(policy.parameters, before, strict=True))
    whole = learner.apply(Update(sequences=tuple(good), terms=TERMS), optimizer)
    assert whole.taken
    assert whole.tokens == sum(len(s.response_ids) for s in everything)


def gradients_are_dropped_alike(everything, world):
    """Half of each summed gradient is cleared: the same half on both ranks, as in one process, at every step."""
    found = []
    for ranks, mine in ((world, everything[2 * world.rank : 2 * world.rank + 2]), (World(), everything)):
        policy = Policy(tiny_model(seed=1, hidden=32).double())
        learner = Learner(policy, micro_batch_tokens=30, world=ranks, gradient_drop=GradientDrop(0.5, seed=3))
        optimizer = ScheduledAdamW(policy.parameters, OptimizerConfig(learning_rate=1e-3, weight_decay=0.0))
        start = [p.detach().clone() for p in policy.parameters]
        for step in range(2):
            assert learner.apply(Update(sequences=tuple(mine), terms=TERMS), optimizer, step=step).taken
        found.append([p.detach().clone() for p in policy.parameters])
    still = sum(int((p == old).sum()) for p, old in zip(found[1], start, strict=True)) / sum(p.numel() for p in start)
    assert 0.2 < still < 0.9  # a quarter was cleared in both steps; some have no gradient at all
    for mine, alone in zip(*found, strict=True):
        torch.testing.assert_close(mine, alone, rtol=1e-7, atol=1e-10)


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = current_world()
    policy = Policy(tiny_model(seed=1, hidden=32).double())
    everything = make_sequences([3, 17, 5, 8], vocabulary=policy.model.config.vocab_size, terms=["pg", "ce"])
    splits = {
        "3 against 17 tokens": ([0], [1]),
        "uneven": ([0, 1, 2], [3]),
        "a rank without sequences": ([0, 1, 2, 3], []),
    }
    for name, parts in splits.items():
        mine = gradient(policy, [everything[i] for i in parts[world.rank]], world)
        whole = gradient(policy, [everything[i] for part in parts for i in part], World())
        torch.testing.assert_close(mine, whole, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    selections_are_shared(policy, everything, world)
    faults_are_shared(policy, everything, world)
    gradients_are_dropped_alike(everything, world)
    values = [torch.randint(0, 5, (n,), generator=torch.Generator().manual_seed(n)).float() for n in (41, 6, 100)]
    pieces = [v.tensor_split(2)[world.rank].contiguous() for v in values]
    masks = select_top_k(pieces, 60, Shards(world.rank, world.size, world.all_sum))
    expected = select_top_k(values, 60)
    for mask, full in zip(masks, expected, strict=True):
        assert torch.equal(mask, full.tensor_split(2)[world.rank])
    dist.destroy_process_group()
    print(f"rank {world.rank} agrees", flush=True)


if __name__ == "__main__":
    sys.exit(main())
