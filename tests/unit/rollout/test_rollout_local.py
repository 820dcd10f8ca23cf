"""The local engine against transformers: tokens, log-probs, distribution, stops, compaction, updates."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from test_rollout_sampler import chi_square_z

from mifo.errors import ModelError, NumericsError
from mifo.rollout import cache, local, weights
from mifo.rollout.local import LocalEngine
from mifo.types import Sampling

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0, max_tokens=24)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ARCHITECTURES = [
    ("llama", {"tied": True}),
    ("llama", {"tied": False, "vocab": 1003}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": LLAMA3_ROPE}),
    ("mistral", {"tied": False}),
    ("qwen2", {"tied": True, "vocab": 1003}),
    ("qwen2", {"tied": False}),
    ("qwen3", {"tied": True}),
    ("qwen3", {"tied": False, "vocab": 1003}),
]


def engine_of(model, **options):
    return LocalEngine(model, **{"dtype": torch.float32, "device": CPU, **options})


def tokens_of(groups):
    return [[rollout.token_ids for rollout in group] for group in groups]


@torch.no_grad()
def generated(model, prompt, count):
    out = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=count,
        pad_token_id=0,
    )
    return tuple(out[0, len(prompt) :].tolist())


@torch.no_grad()
def scored(model, prompt, response):
    """Logits of a plain full forward pass, one row per response token."""
    return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()


@pytest.mark.parametrize(("kind", "extra"), ARCHITECTURES)
def test_greedy_tokens_and_logprobs_are_those_of_the_model(make_model, ragged_prompts, kind, extra):
    model = make_model(kind, **extra)
    engine = engine_of(model)
    groups = engine.generate(ragged_prompts, 2, GREEDY, seed=0)
    for prompt, group in zip(ragged_prompts, groups, strict=True):
        assert [r.token_ids for r in group] == [generated(model, prompt, 24)] * 2
    sampled = engine.generate(ragged_prompts, 2, Sampling(max_tokens=24), seed=0)
    for prompt, group in zip(ragged_prompts, sampled, strict=True):
        for rollout in group:
            logp = scored(model, prompt, rollout.token_ids).log_softmax(-1)
            expected = logp.gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(rollout.logprobs).double(), expected, atol=1e-4)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 0.9), (0.7, 0.8)])
def test_logprobs_are_under_the_sampling_distribution(make_model, ragged_prompts, temperature, top_p):
    model = make_model()
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=16)
    for prompt, group in zip(
        ragged_prompts, engine_of(model).generate(ragged_prompts, 3, sampling, seed=1), strict=True
    ):
        for rollout in group:
            p = (scored(model, prompt, rollout.token_ids) / temperature).softmax(-1)
            for row, token, logp in zip(p, rollout.token_ids, rollout.logprobs, strict=True):
                values = row.sort(descending=True).values
                mass = values[(values.cumsum(0) - values) < top_p].sum()
                assert logp == pytest.approx(math.log(row[token] / mass), abs=1e-3)


def test_first_and_second_tokens_follow_the_model(make_model):
    model, prompt = make_model(initializer_range=0.12), (5, 6, 7)
    group = engine_of(model).generate([prompt], 6000, Sampling(max_tokens=2), seed=0)[0]
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        pairs = torch.tensor([[*prompt, token] for token in range(97)])
        second = first @ model(pairs).logits[:, -1].softmax(-1)
    for position, expected in ((0, first), (1, second)):
        counts = torch.bincount(torch.tensor([r.token_ids[position] for r in group]), minlength=97)
        assert abs(chi_square_z(counts, expected)) < 4
        uniform = torch.full((97,), 1 / 97)
        assert chi_square_z(counts, uniform) > 8


@pytest.mark.parametrize("n", [1, 6])
def test_long_responses_outgrow_the_first_slots(make_model, n):
    model, prompt = make_model(), (5, 6, 7, 8)
    sampling = dataclasses.replace(GREEDY, max_tokens=2 * cache.FIRST_SLOTS + 20)
    engine = engine_of(model)
    expected = generated(model, prompt, sampling.max_tokens)
    assert tokens_of(engine.generate([prompt], n, sampling, seed=0)) == [[expected] * n]


@pytest.mark.parametrize("stop_ids", [(11,), (3, 17, 60, 81)])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("n", [1, 12])
def test_stops_only_cut_responses(make_model, ragged_prompts, stop_ids, compact, n):
    """A response with stop ids is the one without them, cut after the first: whatever leaves the batch around it."""
    model, open_end = make_model(), Sampling(max_tokens=90)
    whole = engine_of(model).generate(ragged_prompts, n, open_end, seed=3)
    stopping = dataclasses.replace(open_end, stop_ids=stop_ids)
    cut = engine_of(model, compact=compact).generate(ragged_prompts, n, stopping, seed=3)
    reasons = set()
    for full, part in zip(sum(whole, ()), sum(cut, ()), strict=True):
        hits = [t for t, token in enumerate(full.token_ids) if token in stop_ids]
        length = hits[0] + 1 if hits else 90
        assert part.token_ids == full.token_ids[:length]
        assert part.logprobs == pytest.approx(full.logprobs[:length], abs=1e-4)
        assert part.stop == ("stop" if hits else "length")
        reasons.add(part.stop)
    assert "stop" in reasons


def test_a_stop_at_the_last_position_is_a_stop(make_model):
    model, prompt = make_model(), (5, 6, 7)
    tokens = generated(model, prompt, 4)
    assert tokens[3] not in tokens[:3]
    sampling = Sampling(temperature=0, max_tokens=4, stop_ids=(tokens[3],))
    rollout = engine_of(model).generate([prompt], 1, sampling, seed=0)[0][0]
    assert (rollout.token_ids, rollout.stop) == (tokens, "stop")
    first = dataclasses.replace(sampling, stop_ids=(tokens[0],))
    rollout = engine_of(model).generate([prompt], 1, first, seed=0)[0][0]
    assert (rollout.token_ids, rollout.stop) == (tokens[:1], "stop")


def test_seeds(make_model, ragged_prompts):
    engine, sampling = engine_of(make_model()), Sampling(max_tokens=12)
    groups = engine.generate(ragged_prompts, 3, sampling, seed=5)
    assert groups == engine.generate(ragged_prompts, 3, sampling, seed=5)
    assert groups != engine.generate(ragged_prompts, 3, sampling, seed=6)
    assert len({rollout.token_ids for group in groups for rollout in group}) == 12
    twice = engine.generate([ragged_prompts[0]] * 2, 1, sampling, seed=5)
    assert twice[0] != twice[1]  # equal prompts are still different draws


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100])
def test_the_batch_split_changes_nothing(make_model, ragged_prompts, rows):
    model, sampling = make_model(), Sampling(max_tokens=16, stop_ids=(3, 17, 60))
    together = engine_of(model).generate(ragged_prompts, 3, sampling, seed=2)
    split = engine_of(model, max_batch_rows=rows).generate(ragged_prompts, 3, sampling, seed=2)
    assert tokens_of(split) == tokens_of(together)


@pytest.mark.parametrize("prefill_tokens", [1, 20])
def test_prompts_read_in_parts_give_the_same(make_model, ragged_prompts, monkeypatch, prefill_tokens):
    engine = engine_of(make_model())
    together = engine.generate(ragged_prompts, 2, GREEDY, seed=0)
    monkeypatch.setattr(local, "PREFILL_TOKENS", prefill_tokens)
    assert tokens_of(engine.generate(ragged_prompts, 2, GREEDY, seed=0)) == tokens_of(together)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_sharing_the_prompt_changes_nothing(make_model, ragged_prompts, monkeypatch, kind):
    engine, sampling = engine_of(make_model(kind)), Sampling(max_tokens=90, stop_ids=(3, 17, 60))
    assert cache.flash_works(torch.float32)
    made = []
    make_cache = local.make_cache

    def recorded(*arguments):
        made.append(make_cache(*arguments))
        return made[-1]

    monkeypatch.setattr(local, "make_cache", recorded)
    shared = engine.generate(ragged_prompts, 10, sampling, seed=4)
    monkeypatch.setattr(cache, "SHARED_MIN_ROWS", float("inf"))
    flat = engine.generate(ragged_prompts, 10, sampling, seed=4)
    assert [type(c) for c in made] == [cache.SharedPrefix, cache.FlatPrefix]
    assert tokens_of(shared) == tokens_of(flat)
    separate = engine.generate([p for p in ragged_prompts for _ in range(2)], 1, GREEDY, seed=0)
    assert tokens_of(engine.generate(ragged_prompts, 2, GREEDY, seed=0)) == [
        [separate[2 * i][0].token_ids, separate[2 * i + 1][0].token_ids] for i in range(len(ragged_prompts))
    ]


def test_plain_linear_layers_give_the_same_and_reuse_their_buffers(make_model, ragged_prompts, monkeypatch):
    model = make_model("qwen2")
    packed = engine_of(model).generate(ragged_prompts, 2, GREEDY, seed=0)
    monkeypatch.setattr(weights, "packing_works", lambda device, dtype: False)
    engine = engine_of(model)
    assert tokens_of(engine.generate(ragged_prompts, 2, GREEDY, seed=0)) == tokens_of(packed)
    addresses = [engine._weights.head._weight.data_ptr(), engine._weights.layers[0].qkv._weight.data_ptr()]
    engine.update(make_model("qwen2", seed=1), version=1)
    assert addresses == [engine._weights.head._weight.data_ptr(), engine._weights.layers[0].qkv._weight.data_ptr()]


@pytest.mark.parametrize("packs", [True, False])
def test_weights_change_on_update_and_only_then(make_model, ragged_prompts, monkeypatch, packs):
    if not packs:
        monkeypatch.setattr(weights, "packing_works", lambda device, dtype: False)
    model, other = make_model(), make_model(seed=1)
    engine = engine_of(model)
    before = engine.generate(ragged_prompts, 1, GREEDY, seed=0)
    assert {r.weight_version for group in before for r in group} == {0}
    with torch.no_grad():
        for parameter, source in zip(model.parameters(), other.parameters(), strict=True):
            parameter.copy_(source)
    assert engine.generate(ragged_prompts, 1, GREEDY, seed=0) == before
    engine.update(model, version=7)
    after = engine.generate(ragged_prompts, 1, GREEDY, seed=0)
    assert tokens_of(after) != tokens_of(before)
    assert tokens_of(after) == tokens_of(engine_of(other).generate(ragged_prompts, 1, GREEDY, seed=0))
    assert engine.version == 7
    assert {r.weight_version for group in after for r in group} == {7}


def test_bf16_is_close_to_the_model(make_model, ragged_prompts):
    model = make_model(initializer_range=0.1)
    groups = engine_of(model, dtype=torch.bfloat16).generate(ragged_prompts, 8, Sampling(max_tokens=24), seed=0)
    gaps = []
    for prompt, group in zip(ragged_prompts, groups, strict=True):
        for rollout in group:
            logp = scored(model, prompt, rollout.token_ids).log_softmax(-1)
            expected = logp.gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
            gaps.append((torch.tensor(rollout.logprobs) - expected).abs())
    assert torch.cat(gaps).mean() < 0.02


def test_broken_weights_are_an_error(make_model):
    model = make_model()
    engine = engine_of(model)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    engine.update(model, version=1)
    for temperature in (0.0, 1.0):
        with pytest.raises(NumericsError, match="not finite"):
            engine.generate([(1, 2)], 2, Sampling(temperature=temperature, max_tokens=3), seed=0)


@pytest.mark.parametrize(
    ("kind", "extra", "reason"),
    [
        ("mistral", {"sliding_window": 16}, "sliding"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "sliding"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_models_that_are_not_covered_are_refused(make_model, kind, extra, reason):
    with pytest.raises(ModelError, match=reason):
        engine_of(make_model(kind, **extra))


def test_wrapped_projections_are_refused(make_model):
    class Adapter(torch.nn.Linear):
        pass

    model = make_model()
    model.model.layers[1].self_attn.q_proj = Adapter(48, 48)
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj is a Adapter"):
        engine_of(model)
