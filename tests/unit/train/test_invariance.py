"""The gradient of an update does not depend on how it is cut up.

Each property is also checked on references that are wrong on purpose (dropped micro-batches, means of means), which must fail
it: otherwise the test could not have caught the bugs that distorted published comparisons.
"""

import random

import pytest
import torch
from builders import make_sequences

from mifo.config.schema import OptimizerConfig
from mifo.core.freeze import ElementFreeze
from mifo.core.losses import CrossEntropy, EntropyBonus, KlToReference, PolicyGradient
from mifo.train.learner import Learner
from mifo.train.model import tiny_model
from mifo.train.optim import ScheduledAdamW
from mifo.train.policy import Policy
from mifo.types import Term, TopEntropy, Update

NORMALIZERS = [("token", None), ("sequence", None), ("constant", 100)]


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny_model(seed=1, hidden=32).double())


@pytest.fixture(scope="module")
def reference():
    return Policy(tiny_model(seed=2, hidden=32).double())


def vocabulary(policy):
    return policy.model.get_input_embeddings().num_embeddings


def all_terms(normalizer, constant):
    shape = {"normalizer": normalizer, "constant_tokens": constant}
    return (
        Term(name="pg", loss=PolicyGradient(), uses_old_policy=True, **shape),
        Term(name="ce", loss=CrossEntropy(), coefficient=0.5, select=TopEntropy(fraction=0.3), **shape),
        Term(name="kl", loss=KlToReference(), coefficient=0.1, uses_reference=True, **shape),
        Term(name="ent", loss=EntropyBonus(), coefficient=0.01, uses_entropy_gradient=True, **shape),
    )


def gradient(policy, update, *, budget=10**6, reference=None):
    learner = Learner(policy, micro_batch_tokens=budget, reference=reference)
    tally = learner.accumulate(update)
    flat = torch.cat([p.grad.reshape(-1) for p in learner.parameters])
    learner._clear()
    return flat, sum(tally.losses.values())


def slow_gradient(policy, update, reference):
    """The obvious version: one sequence at a time, plain forward passes, log_softmax of everything, formulas as printed."""
    model = policy.model
    total = torch.zeros((), dtype=torch.float64)
    for term in update.terms:
        mine = [s for s in update.sequences if term.name in s.weights]
        tokens, count = sum(len(s.response_ids) for s in mine), len(mine)
        for s in mine:
            logp, entropy = plain_forward(model, s)
            with torch.no_grad():
                ref, _ = plain_forward(reference.model, s) if term.name == "kl" else (None, None)
            weight = s.weights[term.name]
            if term.name == "pg":
                values = -weight * torch.exp(logp - logp.detach())
            elif term.name == "ce":
                keep = sorted(range(len(logp)), key=lambda t: (-float(entropy[t].detach()), t))[
                    : -(-3 * len(logp) // 10)
                ]
                values = -weight * logp * torch.tensor([float(t in keep) for t in range(len(logp))])
            elif term.name == "kl":
                values = weight * (torch.exp(ref - logp) - (ref - logp) - 1)
            else:
                values = -weight * entropy
            divisor = {"token": tokens, "sequence": count * len(logp), "constant": count * 100}[term.normalizer]
            total = total + term.coefficient * values.sum() / divisor
    flat = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, policy.parameters)])
    return flat, float(total.detach())


def plain_forward(model, sequence):
    """An ordinary call of the model, which goes through transformers' own attention."""
    ids = torch.tensor([sequence.prompt_ids + sequence.response_ids])
    log_probs = torch.log_softmax(model(input_ids=ids).logits[0], -1)[len(sequence.prompt_ids) - 1 : -1]
    target = torch.tensor(sequence.response_ids)
    return log_probs.gather(1, target[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


@pytest.mark.parametrize(("normalizer", "constant"), NORMALIZERS)
def test_gradient_and_loss_equal_the_slow_version(policy, reference, normalizer, constant):
    terms = all_terms(normalizer, constant)
    names = [t.name for t in terms]
    sequences = make_sequences([3, 17, 1, 40, 8, 8], vocabulary=vocabulary(policy), terms=names, group=2)
    update = Update(sequences=tuple(sequences), terms=terms)
    fast, fast_loss = gradient(policy, update, reference=reference)
    slow, slow_loss = slow_gradient(policy, update, reference)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
    assert fast_loss == pytest.approx(slow_loss, rel=1e-9)


@pytest.mark.parametrize(("normalizer", "constant"), NORMALIZERS)
def test_partition_packing_and_order_do_not_matter(policy, reference, normalizer, constant):
    terms = all_terms(normalizer, constant)
    lengths = [1, 130, 7, 30, 2, 64, 11, 5]
    sequences = make_sequences(lengths, vocabulary=vocabulary(policy), terms=[t.name for t in terms], group=2)
    whole, loss = gradient(policy, Update(sequences=tuple(sequences), terms=terms), reference=reference)
    for budget, seed in [(1, 0), (60, 1), (200, 2), (10**6, 3)]:
        shuffled = sequences[:]
        random.Random(seed).shuffle(shuffled)
        update = Update(sequences=tuple(shuffled), terms=terms)
        again, again_loss = gradient(policy, update, budget=budget, reference=reference)
        torch.testing.assert_close(again, whole, rtol=1e-9, atol=1e-12)
        assert again_loss == pytest.approx(loss, rel=1e-9)


def test_partition_in_fp32_within_a_millionth_of_the_norm():
    policy = Policy(tiny_model(seed=1, hidden=32))
    terms = (Term(name="pg", loss=PolicyGradient(), uses_old_policy=True),)
    sequences = make_sequences([1, 90, 7, 30, 2, 64], vocabulary=vocabulary(policy))
    whole, _ = gradient(policy, Update(sequences=tuple(sequences), terms=terms))
    cut, _ = gradient(policy, Update(sequences=tuple(reversed(sequences)), terms=terms), budget=50)
    assert float((whole - cut).norm()) <= 1e-6 * float(whole.norm())


def test_replication_gives_the_gradient_of_one(policy):
    terms = (Term(name="ce", loss=CrossEntropy()),)
    [one] = make_sequences([9], vocabulary=vocabulary(policy), terms=["ce"])
    single, _ = gradient(policy, Update(sequences=(one,), terms=terms))
    for copies in (2, 3, 4, 8):
        many, _ = gradient(policy, Update(sequences=(one,) * copies, terms=terms), budget=1)
        torch.testing.assert_close(many, single, rtol=1e-9, atol=1e-13)


def one_hot_micro_batches(count):
    """Micro-batch j has gradient only on coordinate j, through the same reducer as everything else."""
    from mifo.core.reduce import sequence_scale, update_totals, weighted_sum

    parameter = torch.nn.Parameter(torch.zeros(count, dtype=torch.float64))
    [totals] = update_totals([[5] * count])
    scale = sequence_scale(5, totals, "token")
    return parameter, [
        lambda j=j: weighted_sum(parameter[j].expand(5), torch.full((5,), scale, dtype=torch.float64))
        for j in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("freeze", [False, True])
def test_one_hot_accumulation(count, freeze):
    """Every micro-batch reaches the optimizer with the same weight, twice in a row, with and without a freeze."""
    parameter, losses = one_hot_micro_batches(count)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    for step in (1, 2):
        for loss in losses:
            loss().backward()
        if freeze:
            ElementFreeze({parameter: torch.zeros(count, dtype=torch.bool)}).step(optimizer)
        else:
            optimizer.step()
        optimizer.zero_grad()
        assert parameter.tolist() == pytest.approx([-step / count] * count, rel=1e-12)


@pytest.mark.parametrize("count", [3, 4, 8])
def test_dropped_micro_batches_fail_the_one_hot_test(count):
    """Bug A (first and last survive) passes with two micro-batches; that is why three are asked for."""
    parameter, losses = one_hot_micro_batches(count)
    for j, loss in enumerate(losses):
        if j in (0, count - 1):
            loss().backward()
    assert (parameter.grad == 0).sum() == count - 2
    parameter, losses = one_hot_micro_batches(2)
    for loss in (losses[0], losses[-1]):
        loss().backward()
    assert bool((parameter.grad != 0).all())


def broken(policy, update, budget, how):
    """References with the published bugs, on the real model: a list of per-micro-batch gradients, combined wrongly."""
    from mifo.data.pack import plan_micro_batches

    plans = plan_micro_batches(update.sequences, budget)
    assert len(plans) >= 3
    total = sum(len(s.response_ids) for s in update.sequences)
    parts = []
    for plan in plans:
        part = Update(sequences=tuple(update.sequences[i] for i in plan), terms=update.terms)
        own, _ = gradient(policy, part)  # divided by this micro-batch's own count
        parts.append((own, sum(len(s.response_ids) for s in part.sequences)))
    if how == "mean of means":
        return sum(own for own, _ in parts) / len(parts)
    kept = {"first and last": [parts[0], parts[-1]], "first only": parts[:1], "all": parts}[how]
    return sum(own * count for own, count in kept) / total


@pytest.mark.parametrize("how", ["mean of means", "first and last", "first only"])
def test_the_published_bugs_fail_partition_invariance(policy, how):
    terms = (Term(name="ce", loss=CrossEntropy()),)
    sequences = make_sequences([1, 90, 7, 30, 2, 64], vocabulary=vocabulary(policy), terms=["ce"])
    update = Update(sequences=tuple(sequences), terms=terms)
    whole, _ = gradient(policy, update)
    torch.testing.assert_close(broken(policy, update, 60, "all"), whole, rtol=1e-9, atol=1e-12)
    wrong = broken(policy, update, 60, how)
    assert float((wrong - whole).norm()) > 1e-2 * float(whole.norm())


def test_order_matters_to_the_dropping_bug_and_not_to_us(policy):
    terms = (Term(name="ce", loss=CrossEntropy()),)
    sequences = make_sequences([30, 31, 32, 33], vocabulary=vocabulary(policy), terms=["ce"])
    forward = Update(sequences=tuple(sequences), terms=terms)
    turned = Update(sequences=(*sequences[1:], sequences[0]), terms=terms)
    ours = [gradient(policy, update, budget=40)[0] for update in (forward, turned)]
    torch.testing.assert_close(*ours, rtol=1e-9, atol=1e-12)
    theirs = [broken(policy, update, 40, "first and last") for update in (forward, turned)]
    assert float((theirs[0] - theirs[1]).norm()) > 1e-2 * float(theirs[0].norm())


def test_empty_sequences_and_short_windows(policy):
    """A response without tokens is ignored by TOK and left out of |U| by SEQ; everything stays finite."""
    for normalizer in ("token", "sequence"):
        terms = (Term(name="ce", loss=CrossEntropy(), normalizer=normalizer),)
        sequences = make_sequences([4, 0, 9, 0, 2], vocabulary=vocabulary(policy), terms=["ce"])
        with_empty, _ = gradient(policy, Update(sequences=tuple(sequences), terms=terms), budget=12)
        without, _ = gradient(policy, Update(sequences=tuple(s for s in sequences if s.response_ids), terms=terms))
        assert bool(torch.isfinite(with_empty).all())
        torch.testing.assert_close(with_empty, without, rtol=1e-9, atol=1e-13)


def test_all_equal_groups_are_skipped_exactly(policy):
    """Sequences with advantage 0 are not fed, and still count: the gradient equals that of feeding them."""
    terms = (Term(name="pg", loss=PolicyGradient(), uses_old_policy=True),)
    sequences = make_sequences([6, 9, 20, 4], vocabulary=vocabulary(policy), group=2)
    flat = [s if i < 2 else type(s)(**{f: getattr(s, f) for f in s.__dataclass_fields__} | {"weights": {"pg": 0.0}})
            for i, s in enumerate(sequences)]  # fmt: skip
    learner = Learner(policy, micro_batch_tokens=10**6)
    tally = learner.accumulate(Update(sequences=tuple(flat), terms=terms))
    skipped = torch.cat([p.grad.reshape(-1) for p in learner.parameters])
    learner._clear()
    assert tally.tokens == 15
    tiny_weight = [s if i < 2 else type(s)(**{f: getattr(s, f) for f in s.__dataclass_fields__} | {"weights": {"pg": 1e-300}})
                   for i, s in enumerate(sequences)]  # fmt: skip
    fed, _ = gradient(policy, Update(sequences=tuple(tiny_weight), terms=terms))
    torch.testing.assert_close(skipped, fed, rtol=1e-9, atol=1e-13)
    dropped, _ = gradient(policy, Update(sequences=tuple(sequences[:2]), terms=terms))
    assert float((dropped - skipped).norm()) > 0.1 * float(
        skipped.norm()
    )  # leaving them out of the count is another method


def test_streams_have_their_own_denominators(policy):
    """Adding imitation tokens does not dilute the policy gradient."""
    pg = Term(name="pg", loss=PolicyGradient(), uses_old_policy=True)
    ce = Term(name="ce", loss=CrossEntropy(), coefficient=0.0)
    own = make_sequences([6, 9], vocabulary=vocabulary(policy), terms=["pg"])
    demos = make_sequences([50, 70], vocabulary=vocabulary(policy), terms=["ce"], seed=9)
    alone, _ = gradient(policy, Update(sequences=tuple(own), terms=(pg,)))
    mixed, _ = gradient(policy, Update(sequences=(*own, *demos), terms=(pg, ce)))
    torch.testing.assert_close(mixed, alone, rtol=1e-9, atol=1e-13)


def test_clipped_norm_is_that_of_the_whole_masked_gradient():
    policy = Policy(tiny_model(seed=1, hidden=32).double())
    terms = (Term(name="ce", loss=CrossEntropy()),)
    sequences = make_sequences([6, 90, 4, 33], vocabulary=vocabulary(policy), terms=["ce"])
    update = Update(sequences=tuple(sequences), terms=terms)
    whole, _ = gradient(policy, update)
    draw = torch.Generator().manual_seed(0)
    masks = {p: torch.rand(p.shape, generator=draw) < 0.5 for p in policy.parameters}
    free = ~torch.cat([m.reshape(-1) for m in masks.values()])
    optimizer = ScheduledAdamW(policy.parameters, OptimizerConfig(learning_rate=1e-9, clip_norm=1e-3, weight_decay=0.0))
    report = Learner(policy, micro_batch_tokens=50).apply(update, optimizer, freeze=ElementFreeze(masks))
    assert report.grad_norm == pytest.approx(float(whole[free].norm()), rel=1e-9)
    assert report.grad_norm < 0.9 * float(whole.norm())
    moments = torch.cat([optimizer.optimizer.state[p]["exp_avg"].reshape(-1) for p in policy.parameters])
    assert float(moments.norm()) == pytest.approx(0.1 * 1e-3, rel=1e-3)  # (1 − β1) times the clipped norm


def test_padded_layout_agrees_with_packed():
    model = tiny_model(seed=4, hidden=32).double()
    terms = (Term(name="ce", loss=CrossEntropy()), Term(name="ent", loss=EntropyBonus(), uses_entropy_gradient=True))
    sequences = make_sequences([6, 3, 15, 1, 9], vocabulary=model.config.vocab_size, terms=["ce", "ent"], group=2)
    update = Update(sequences=tuple(sequences), terms=terms)
    packed, _ = gradient(Policy(model, layout="packed"), update)
    padded, _ = gradient(Policy(model, layout="padded"), update)
    torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_activation_checkpointing_leaves_the_gradient():
    terms = (Term(name="ce", loss=CrossEntropy()),)
    sequences = make_sequences([6, 3, 15], vocabulary=80, terms=["ce"])
    update = Update(sequences=tuple(sequences), terms=terms)
    plain, _ = gradient(Policy(tiny_model(seed=4, hidden=32).double()), update)
    recomputed, _ = gradient(Policy(tiny_model(seed=4, hidden=32).double(), activation_checkpointing=True), update)
    torch.testing.assert_close(plain, recomputed, rtol=1e-9, atol=1e-12)
