"""Contributions to a logit: they add up, and each is what an ablation or a finite difference says."""

import copy

import pytest
import torch
from lab_models import FAMILIES, family_model

from mifo.errors import ModelError
from mifo.train.attribution import KINDS, PREFIX, WRITERS, Attribution, Target, projections
from mifo.train.norm import fuse_norms

IDS = tuple(3 + (7 * i) % 40 for i in range(14))
TARGETS = (Target(5, 9), Target(11, 20), Target(13, 4))
TINY = 1e-6


def pieces(modules, scores_S):
    return dict(zip([m.name for m in modules], scores_S.split([m.neurons for m in modules]), strict=True))


def exact_scores(model, targets=TARGETS):
    """Scores in doubles: {module: [A]} a target."""
    with Attribution(model) as attribution:
        found = attribution.scores(IDS, targets)
    return attribution.modules, found


def logit(model, target, ids=IDS):
    return float(model(input_ids=torch.tensor([ids])).logits[0, target.position, target.token])


def double_model(family):
    """In doubles throughout: the stock norms of transformers compute in fp32 whatever comes in."""
    model = family_model(family).double()
    assert fuse_norms(model) >= 5
    return model


@pytest.fixture(params=FAMILIES)
def model(request):
    return double_model(request.param)


def test_the_parts_sum_to_the_logit(model):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        own = copy.deepcopy(model).to(dtype)
        with Attribution(own) as attribution:
            found = attribution.scores(IDS, TARGETS)
        for target, scores in zip(TARGETS, found, strict=True):
            assert scores.logit == pytest.approx(logit(own, target), abs=tolerance)
            assert scores.reconstructed == pytest.approx(scores.logit, abs=tolerance)


def test_neurons_are_counted_by_rows_and_columns(model):
    modules = projections(model)
    assert [m.kind for m in modules] == list(KINDS) * 2
    for module in modules:
        weight = model.get_submodule(module.name).weight
        assert weight.shape[module.dimension] == module.neurons
        assert module.dimension == (1 if module.kind in WRITERS else 0)
    by_kind = {m.kind: m.neurons for m in modules[:7]}
    heads = model.config.num_attention_heads, model.config.num_key_value_heads
    assert by_kind["q_proj"] * heads[1] == by_kind["k_proj"] * heads[0]  # grouped: keys have their own, fewer neurons
    assert by_kind["k_proj"] == by_kind["v_proj"]


def frozen_logit(model, residual_D, scale, target):
    """The logit of a residual stream when the final norm keeps its scale."""
    normed = scale * residual_D * model.model.norm.weight
    z = torch.dot(normed, model.lm_head.weight[target.token])
    return float(z if model.lm_head.bias is None else z + model.lm_head.bias[target.token])


def run_ablated(model, target, name, neuron, keep_mlp=None):
    """The residual stream before the final norm, at the target, when one input of a writer is zero there; `keep_mlp`, an output
    of the last MLP, stands in for what it would answer to that."""
    residual, hooks = {}, []

    def ablate(_, inputs):
        changed = inputs[0].clone()
        if neuron is not None:
            changed[0, target.position, neuron] = 0.0
        return (changed,)

    hooks.append(model.get_submodule(name).register_forward_pre_hook(ablate))
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, inputs: residual.update(h=inputs[0])))
    last = model.model.layers[-1].mlp
    if keep_mlp is not None:
        hooks.append(last.register_forward_hook(lambda *_: keep_mlp))
    else:
        hooks.append(last.register_forward_hook(lambda _, __, output: residual.update(mlp=output)))
    model(input_ids=torch.tensor([IDS]))
    for hook in hooks:
        hook.remove()
    return residual["h"][0, target.position], residual.get("mlp")


@pytest.mark.parametrize("kind", WRITERS)
def test_writers_of_the_last_layer_against_ablation(model, kind):
    """Exact where nothing comes after: down_proj as it is, o_proj with the answer of the MLP behind it held."""
    modules, found = exact_scores(model)
    name = [m.name for m in modules if m.kind == kind][-1]
    for target, scores in zip(TARGETS, found, strict=True):
        whole_D, mlp = run_ablated(model, target, name, None)
        scale = torch.rsqrt(whole_D.square().mean() + model.model.norm.variance_epsilon)
        own = pieces(modules, scores.scores_S)[name]
        for neuron in (0, 7, len(own) - 1):
            part_D, _ = run_ablated(model, target, name, neuron, keep_mlp=mlp if kind == "o_proj" else None)
            effect = frozen_logit(model, whole_D, scale, target) - frozen_logit(model, part_D, scale, target)
            assert float(own[neuron]) == pytest.approx(effect, abs=TINY)


def scaled_logit(model, target, name, neuron, positions, factor):
    """The logit when one output of a module is multiplied at some positions."""

    def change(_, __, output):
        output = output.clone()
        output[0, positions, neuron] *= factor
        return output

    hook = model.get_submodule(name).register_forward_hook(change)
    value = logit(model, target)
    hook.remove()
    return value


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WRITERS])
def test_readers_against_finite_differences(model, kind, layer):
    """s = dz/d(scale of the neuron) before RoPE, over the prefix for k and v, at the position for the others."""
    modules, found = exact_scores(model)
    [name] = [m.name for m in modules if (m.kind, m.layer) == (kind, layer)]
    target, scores = TARGETS[1], pieces(modules, found[1].scores_S)[name]
    positions = list(range(target.position + 1)) if kind in PREFIX else [target.position]
    step = 1e-4
    for neuron in (1, len(scores) - 1):
        up, down = (scaled_logit(model, target, name, neuron, positions, 1 + sign * step) for sign in (1, -1))
        assert float(scores[neuron]) == pytest.approx((up - down) / (2 * step), abs=TINY, rel=1e-4)


def test_keys_and_values_at_the_position_alone_would_differ():
    model = double_model("llama")
    modules, found = exact_scores(model)
    [name] = [m.name for m in modules if (m.kind, m.layer) == ("v_proj", 0)]
    target, own = TARGETS[1], pieces(modules, found[1].scores_S)[name]
    alone = [
        (scaled_logit(model, target, name, n, [target.position], 1.0001) - logit(model, target)) / 1e-4
        for n in range(4)
    ]
    assert max(abs(float(own[n]) - alone[n]) for n in range(4)) > 1e-2


def test_each_target_is_scored_as_if_it_were_alone():
    """A later target must not leak into the scores of an earlier one, which share a forward pass."""
    model = double_model("qwen3")
    _, together = exact_scores(model)
    for target, scores in zip(TARGETS, together, strict=True):
        _, [alone] = exact_scores(model, (target,))
        assert torch.allclose(scores.scores_S, alone.scores_S, atol=1e-7)


def test_hooks_come_off():
    model = family_model("llama")
    exact_scores(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_another_family_is_refused():
    model = family_model("llama")
    model.config.model_type = "gpt2"
    with pytest.raises(ModelError, match=r"model type 'gpt2'.*llama, mistral, qwen2, qwen3.*rho = 0"):
        projections(model)
