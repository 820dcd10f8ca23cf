"""Low-rank adapters against explicit weights and autograd; merging, masks, faults."""

import copy
from dataclasses import replace

import pytest
import torch
from builders import make_sequences
from torch.func import functional_call

from mifo.config.schema import GuardConfig, OptimizerConfig
from mifo.core.freeze import restore_frozen
from mifo.core.importance import ImportanceMap
from mifo.core.losses import CrossEntropy
from mifo.data.pack import pack
from mifo.train.adapters import Adapters, _Adapted, adapted_layers, adapter_elements
from mifo.train.faults import Fault
from mifo.train.guard import Guard
from mifo.train.learner import Learner
from mifo.train.ledger import Ledger
from mifo.train.model import tiny_model
from mifo.train.policy import Policy
from mifo.types import LowRank, Term, Update

CE = Term(name="ce", loss=CrossEntropy())
SHAPE = LowRank(rank=3, alpha=6.0)


def make(dtype=torch.float64, shape=SHAPE, seed=1, **settings):
    policy = Policy(tiny_model(seed=0).to(dtype))
    learner = Learner(policy, micro_batch_tokens=50)
    config = OptimizerConfig(**{"learning_rate": 0.01, "clip_norm": None, **settings})
    learner.adapters = Adapters(policy.body, learner.parameters, shape, config, seed=seed)
    return learner, learner.adapters


def update_of(learner, lengths=(5, 9, 3)):
    vocabulary = learner.policy.model.config.vocab_size
    made = make_sequences(list(lengths), vocabulary=vocabulary)
    return Update(sequences=tuple(replace(s, weights={"ce": 1.0}, sampler_logprobs=None) for s in made), terms=(CE,))


def randomise(adapters):
    """B is zero at first; anything but that."""
    with torch.no_grad():
        for up in adapters.up:
            up.copy_(torch.randn(up.shape, generator=torch.Generator().manual_seed(up.shape[0])) * 0.1)


def logits(model):
    ids = torch.arange(3, 15)[None]
    return model(input_ids=ids, use_cache=False).logits


def explicit(model, adapters):
    """A copy of the model with W + (α/r) B A written into its weights by its own arithmetic."""
    merged = copy.deepcopy(model)
    for module in merged.modules():
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, _Adapted)]:
            del module._forward_hooks[key]
    layers = adapted_layers(merged.get_decoder())
    with torch.no_grad():
        for (name, layer), down, up in zip(layers.items(), adapters.down, adapters.up, strict=True):
            assert name in adapters.layers
            for row in range(layer.weight.shape[0]):  # slow, and another order of sums
                for k in range(adapters.shape.rank):
                    layer.weight[row] += adapters.shape.alpha / adapters.shape.rank * up[row, k] * down[k]
    return merged


def hooked(model):
    return [h for module in model.modules() for h in module._forward_hooks.values() if isinstance(h, _Adapted)]


def bits(tensors):
    return [t.detach().numpy().tobytes() for t in tensors]


def test_all_linear_layers_but_the_output_layer():
    learner, adapters = make()
    names = list(adapters.layers)
    assert len(names) == 7 * learner.policy.model.config.num_hidden_layers
    assert all(name.endswith("_proj") for name in names)
    assert sum(p.numel() for p in adapters.parameters) == adapter_elements(learner.policy.body, 3)
    layer = adapters.layers[names[0]]
    assert (adapters.down[0].shape, adapters.up[0].shape) == ((3, layer.in_features), (layer.out_features, 3))


def test_the_first_forward_is_exactly_the_base():
    base = logits(Policy(tiny_model(seed=0).double()).model)
    learner, adapters = make()
    assert torch.equal(logits(learner.policy.model), base)
    assert all(float(down.detach().abs().max()) > 0 for down in adapters.down)
    randomise(adapters)
    assert not torch.allclose(logits(learner.policy.model), base)


def test_drawn_uniformly_and_by_the_seed():
    down = [make(seed=seed)[1].down for seed in (1, 1, 2)]
    assert bits(down[0]) == bits(down[1]) != bits(down[2])
    for a in down[0]:
        bound = a.shape[1] ** -0.5
        assert float(a.detach().abs().max()) <= bound
        assert float(a.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.2)


def test_forward_against_explicit_weights():
    learner, adapters = make()
    randomise(adapters)
    expected = logits(explicit(learner.policy.model, adapters))
    assert torch.allclose(logits(learner.policy.model), expected, rtol=1e-10, atol=1e-12)


def test_gradient_against_autograd_through_explicit_weights():
    """d loss / d A and d loss / d B of the learner's whole update, where W + (α/r) B A is written out as the weight."""
    learner, adapters = make()
    randomise(adapters)
    update = update_of(learner)
    learner.accumulate(update)
    own = [p.grad for p in adapters.parameters]
    assert all(p.grad is None for p in learner.parameters)

    model = Policy(tiny_model(seed=0).double()).model
    down = [p.detach().clone().requires_grad_() for p in adapters.down]
    up = [p.detach().clone().requires_grad_() for p in adapters.up]
    weights = {
        f"model.{name}.weight": layer.weight.detach() + 2.0 * b @ a
        for (name, layer), a, b in zip(adapted_layers(model.get_decoder()).items(), down, up, strict=True)
    }
    total, count = 0.0, 0
    for s in update.sequences:
        ids = torch.tensor([s.prompt_ids + s.response_ids])
        output = functional_call(model, weights, kwargs={"input_ids": ids, "use_cache": False})
        logp = output.logits[0, :-1].log_softmax(-1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        total = total - logp[-len(s.response_ids) :].sum()
        count += len(s.response_ids)
    (total / count).backward()
    for mine, theirs in zip(own, [*down, *up], strict=True):
        assert float(theirs.grad.abs().max()) > 0
        assert torch.allclose(mine, theirs.grad, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merging_equals_the_forward_with_adapters(dtype):
    learner, adapters = make(dtype)
    randomise(adapters)
    before = logits(learner.policy.model)
    explicit_model = explicit(learner.policy.model, adapters)
    adapters.merge(lambda: None)
    after = logits(learner.policy.model)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert torch.allclose(after, before, rtol=tolerance, atol=tolerance)
    for own, theirs in zip(learner.parameters, explicit_model.parameters(), strict=True):
        assert torch.allclose(own, theirs, rtol=tolerance, atol=tolerance)
    assert all(p.requires_grad for p in learner.parameters)


def test_packed_and_padded_see_the_adapters():
    learner, adapters = make()
    randomise(adapters)
    assert learner.policy.layout == "packed"
    sequences = update_of(learner).sequences
    packed, _ = learner.policy.token_stats(pack(sequences, range(3)))
    plain = Policy(explicit(learner.policy.model, adapters), layout="padded")
    padded, _ = plain.token_stats(pack(sequences, range(3)))
    assert torch.allclose(packed, padded, rtol=1e-9, atol=1e-10)


def test_only_adapters_move_and_weight_decay_leaves_the_weights_alone():
    learner, adapters = make(torch.float32, weight_decay=0.5)
    weights, own = bits(learner.parameters), bits(adapters.parameters)
    for _ in range(3):
        report = learner.apply(update_of(learner), adapters.optimizer)
    assert report.taken
    assert report.grad_norm > 0
    assert bits(learner.parameters) == weights
    assert all(a != b for a, b in zip(bits(adapters.parameters), own, strict=True))
    assert adapters.optimizer.updates == 3


def test_an_evaluation_inside_a_phase_sees_the_merged_weights_and_leaves_no_trace():
    learner, adapters = make(torch.float32)
    randomise(adapters)
    weights, seen = bits(learner.parameters), []
    with adapters.merged(lambda: seen.append("finished")):
        inside = bits(learner.parameters)
        model = copy.deepcopy(learner.policy.model)
        assert not hooked(learner.policy.model)
    assert seen == ["finished"]
    assert inside != weights == bits(learner.parameters)
    assert torch.allclose(logits(model), logits(learner.policy.model), rtol=1e-4, atol=1e-4)  # hooked again
    with pytest.raises(KeyError), adapters.merged(lambda: None):
        raise KeyError
    assert bits(learner.parameters) == weights
    adapters.merge(lambda: None)
    assert bits(learner.parameters) == inside


def test_frozen_elements_keep_their_bits_through_the_merge():
    learner = Learner(Policy(tiny_model(seed=0)), micro_batch_tokens=50)
    importance = ImportanceMap(learner.parameters, top=0.5)
    with torch.no_grad():
        for i, p in enumerate(learner.parameters):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 1e-3)
        learner.parameters[1].view(-1)[::2] = -0.0  # a sign that a sum would lose
    importance.end_interval()
    adapters = Adapters(learner.policy.body, learner.parameters, SHAPE, OptimizerConfig(), seed=1)
    randomise(adapters)
    before = [p.detach().clone() for p in learner.parameters]
    adapters.merge(lambda: restore_frozen(importance.parameters, importance.start, importance.marks))
    moved = 0
    for i, (old, now) in enumerate(zip(before, learner.parameters, strict=True)):
        mask = importance.mask(i)
        assert bits([old[mask]]) == bits([now[mask]])
        moved += int((old != now)[~mask].sum())
    adapted = [layer.weight for layer in adapters.layers.values()]
    free = [~importance.mask(i) for i, p in enumerate(learner.parameters) if any(p is weight for weight in adapted)]
    elements = sum(int(mask.sum()) for mask in free)
    assert 0.99 * elements < moved <= elements < sum(mask.numel() for mask in free)


def test_a_rollback_undoes_a_step_of_the_adapters(monkeypatch):
    learner, adapters = make(torch.float32)
    guard = Guard(GuardConfig(on_spike="rollback"))
    guard.begin("sft")
    learner.apply(update_of(learner), adapters.optimizer, guard=guard)
    kept = bits(adapters.parameters), bits(adapters.optimizer.state_tensors().values())
    learner.apply(update_of(learner), adapters.optimizer, guard=guard)
    assert bits(adapters.parameters) != kept[0]
    spike = Fault(kind="spike", reason="", action="rollback")
    monkeypatch.setattr(guard, "judge", lambda loss, norm: spike)
    report = learner.apply(update_of(learner), adapters.optimizer, guard=guard)
    assert (report.taken, report.moved) == (False, True)
    assert (bits(adapters.parameters), bits(adapters.optimizer.state_tensors().values())) == kept
    assert adapters.optimizer.updates == 1


def test_an_update_that_is_not_finite_touches_no_adapter():
    learner, adapters = make(torch.float32)
    own = bits(adapters.parameters)
    update = update_of(learner)
    update.sequences[1].weights["ce"] = float("nan")
    term = Term(name="ce", loss=lambda stats: -stats.logp_T * stats.weight_T)
    report = learner.apply(Update(sequences=update.sequences, terms=(term,)), adapters.optimizer)
    assert report.fault.kind == "not finite"
    assert bits(adapters.parameters) == own
    assert all(p.grad is None for p in adapters.parameters)


def test_state_goes_and_comes_back():
    learner, adapters = make(torch.float32)
    learner.apply(update_of(learner), adapters.optimizer)
    state, tensors = adapters.state_dict(), {n: t.detach().clone() for n, t in adapters.state_tensors().items()}
    other_learner, other = make(torch.float32, seed=9)
    other.load(state, tensors)
    for one, its in ((learner, adapters), (other_learner, other)):
        one.apply(update_of(one), its.optimizer)
    assert bits(adapters.parameters) == bits(other.parameters)
    assert adapters.state_dict() == other.state_dict() == {"rank": 3, "alpha": 6.0, "optimizer": {"updates": 2}}
    names = adapters.named_tensors()
    assert "A of layers.0.self_attn.q_proj" in names
    assert "exp_avg of B of layers.1.mlp.down_proj" in names


def test_the_ledger_counts_four_instead_of_six_for_the_weights():
    ledger = Ledger(parameters=1000)
    ledger.rl_fed_tokens, ledger.sft_fed_tokens = 10, 7
    ledger.trained_adapters(5, elements=30)
    assert ledger.training_flops == 6 * 1000 * (10 + 2) + 4 * 1000 * 5 + 6 * 30 * 5
