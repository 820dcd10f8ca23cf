"""The choice of engine, the engine over `generate`, and what a request is checked for."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from mifo.errors import ConfigError, DataError, ModelError, NumericsError
from mifo.rollout.engine import make_engine, self_check
from mifo.rollout.hf import GenerateEngine
from mifo.rollout.local import LocalEngine
from mifo.rollout.request import Span, plan_batches
from mifo.types import Sampling


def engine_of(model, kind="auto", dtype=torch.float32, max_batch_rows=None):
    return make_engine(model, kind=kind, dtype=dtype, device="cpu", max_batch_rows=max_batch_rows)


def tokens_of(groups):
    return [[rollout.token_ids for rollout in group] for group in groups]


def gpt2():
    torch.manual_seed(0)
    size = {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 128, "initializer_range": 0.3}
    config = GPT2Config(vocab_size=97, bos_token_id=None, eos_token_id=None, **size)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_both_engines_give_the_same_rollouts(make_model, ragged_prompts, kind, temperature):
    model = make_model(kind)
    sampling = Sampling(temperature=temperature, max_tokens=40, stop_ids=(3, 17, 60))
    one = engine_of(model, "local").generate(ragged_prompts, 3, sampling, seed=9)
    two = engine_of(model, "generate").generate(ragged_prompts, 3, sampling, seed=9)
    split = engine_of(model, "generate", max_batch_rows=2).generate(ragged_prompts, 3, sampling, seed=9)
    assert tokens_of(one) == tokens_of(two) == tokens_of(split)
    for a, b in zip(sum(one, ()), sum(two, ()), strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert a.stop == b.stop


class AfterPair:
    """Ends a response with a token of `last_ids` that comes right after an even one."""

    last_ids = tuple(range(50, 97))

    def __init__(self):
        self.asked = 0

    def __call__(self, token_ids):
        self.asked += 1
        assert token_ids[-1] in self.last_ids
        return len(token_ids) > 1 and token_ids[-2] % 2 == 0

    def end(self, token_ids):
        for count in range(1, len(token_ids) + 1):
            if token_ids[count - 1] in self.last_ids and self(token_ids[:count]):
                return count
        return None


@pytest.mark.parametrize("stop_ids", [(), (3, 17)])
@pytest.mark.parametrize("rows", [None, 5])
def test_a_text_ends_a_response_in_both_engines(make_model, ragged_prompts, stop_ids, rows):
    """What is drawn is what is drawn without it, cut where the rule says: the oracle."""
    model, rule = make_model(), AfterPair()
    sampling = Sampling(max_tokens=24, stop_ids=stop_ids)
    plain = sum(engine_of(model, "local").generate(ragged_prompts, 4, sampling, seed=2), ())
    ended = 0
    for kind in ("local", "generate"):
        engine = engine_of(model, kind, max_batch_rows=rows)
        cut = sum(engine.generate(ragged_prompts, 4, replace(sampling, ends_text=rule), seed=2), ())
        for whole, own in zip(plain, cut, strict=True):
            end = rule.end(whole.token_ids)
            assert own.token_ids == whole.token_ids[:end]
            assert own.logprobs == pytest.approx(whole.logprobs[:end], abs=1e-4)
            assert own.stop == ("stop" if end is not None else whole.stop)
            ended += end is not None
    assert ended > 10


def test_auto_takes_local_where_it_can_and_says_so(make_model, caplog):
    with caplog.at_level(logging.INFO, logger="mifo.rollout.engine"):
        assert isinstance(engine_of(make_model()), LocalEngine)
        assert isinstance(engine_of(make_model("qwen3"), dtype=torch.bfloat16), LocalEngine)
        assert isinstance(engine_of(gpt2()), GenerateEngine)
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING"]
    assert "gpt2" in caplog.records[-1].getMessage()


def test_a_model_that_only_looks_covered_fails_the_self_check(make_model, caplog):
    model = make_model()
    for layer in model.model.layers:
        layer.self_attn.scaling = 1.0  # same names and shapes, other attention
    assert isinstance(engine_of(model), GenerateEngine)
    assert "differ" in caplog.text
    with pytest.raises(ModelError, match="differ"):
        engine_of(model, "local")
    with pytest.raises(ModelError, match="gpt2"):
        engine_of(gpt2(), "local")


def test_self_check_is_small_for_a_right_engine(make_model):
    model = make_model("qwen2")
    assert self_check(LocalEngine(model, dtype=torch.float32, device=torch.device("cpu")), model) < 1e-5


def test_generate_engine_scores_other_architectures_exactly(ragged_prompts):
    model = gpt2().eval()
    groups = engine_of(model).generate(ragged_prompts, 2, Sampling(max_tokens=12), seed=0)
    for prompt, group in zip(ragged_prompts, groups, strict=True):
        for rollout in group:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + rollout.token_ids])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
            assert rollout.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_generate_engine_leaves_the_model_as_it_was(make_model, ragged_prompts):
    model = make_model()
    plain = engine_of(model, "generate").generate(ragged_prompts, 1, Sampling(max_tokens=12), seed=0)
    model.generation_config.repetition_penalty = 5.0  # as some published models carry: must not bend the distribution
    model.generation_config.eos_token_id = plain[0][0].token_ids[2]
    own = model.generation_config
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    assert engine_of(model, "generate").generate(ragged_prompts, 1, Sampling(max_tokens=12), seed=0) == plain
    assert [module.training for module in model.modules()] == flags
    assert model.generation_config is own
    assert all(parameter.grad is None for parameter in model.parameters())


def test_generate_engine_marks_versions_and_refuses_broken_logits(make_model):
    model = make_model()
    engine = engine_of(model, "generate")
    engine.update(model, version=4)
    assert engine.generate([(1, 2)], 1, Sampling(max_tokens=2), seed=0)[0][0].weight_version == 4
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(NumericsError):
        engine.generate([(1, 2)], 1, Sampling(max_tokens=2), seed=0)


@pytest.mark.parametrize("kind", ["local", "generate"])
@pytest.mark.parametrize("max_batch_rows", [None, 4])
def test_broken_rollouts_are_named(make_model, kind, max_batch_rows):
    """One prompt holds a token whose embedding is broken: its rollouts are named, and no other's of the same batch."""
    model = make_model(tied=False)
    engine = make_engine(model, kind=kind, dtype=torch.float32, max_batch_rows=max_batch_rows)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    engine.update(model, version=1)
    with pytest.raises(NumericsError, match="log-probs of 2 of 4") as caught:
        engine.generate([(1, 2), (7, 2), (3, 4), (5,)], 2, Sampling(max_tokens=1), seed=0) if max_batch_rows else (
            engine.generate([(1, 2), (7, 2)], 2, Sampling(max_tokens=1), seed=0)
        )
    assert caught.value.rollouts == ((1, 0), (1, 1))


def test_generate_engine_uses_autocast_for_another_dtype(make_model, ragged_prompts):
    model = make_model(initializer_range=0.1)
    exact = engine_of(model, "generate").generate(ragged_prompts, 1, Sampling(max_tokens=1), seed=0)
    rounded = engine_of(model, "generate", dtype=torch.bfloat16).generate(
        ragged_prompts, 1, Sampling(max_tokens=1), seed=0
    )
    assert rounded != exact
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["local", "generate"])
@pytest.mark.parametrize(
    ("prompts", "n", "options", "error", "text"),
    [
        ([(1,), ()], 1, {}, DataError, "prompt 1 is empty"),
        ([(1, 97)], 1, {}, DataError, "token id 97"),
        ([(-1, 5)], 1, {}, DataError, "token id -1"),
        ([(1,)], 0, {}, ConfigError, "rollouts per prompt = 0"),
        ([(1,)], 1, {"temperature": -0.5}, ConfigError, "temperature = -0.5"),
        ([(1,)], 1, {"temperature": float("nan")}, ConfigError, "temperature = nan"),
        ([(1,)], 1, {"top_p": 0.0}, ConfigError, "top_p = 0.0"),
        ([(1,)], 1, {"top_p": 1.1}, ConfigError, r"top_p = 1\.1"),
        ([(1,)], 1, {"max_tokens": 0}, ConfigError, "max_tokens = 0"),
        ([(1,), (1, 2)], 1, {"max_tokens": 255}, ConfigError, r"prompt 1 \(2 tokens\).*context of 256"),
        ([(1,)], 1, {"stop_ids": (97,)}, ConfigError, "stop_ids holds 97"),
    ],
)
def test_requests_are_checked_before_any_compute(make_model, kind, prompts, n, options, error, text):
    model = make_model()
    engine = engine_of(model, kind)
    model.forward = None  # any use of the model would fail otherwise
    with pytest.raises(error, match=text):
        engine.generate(prompts, n, Sampling(**{"max_tokens": 4, **options}), seed=0)


def test_a_response_may_fill_the_context(make_model):
    engine = engine_of(make_model())
    rollout = engine.generate([(1, 2)], 1, Sampling(temperature=0, max_tokens=254), seed=0)[0][0]
    assert len(rollout.token_ids) == 254
    assert engine.generate([], 3, Sampling(), seed=0) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [({"kind": "fast"}, "kind"), ({"dtype": torch.int8}, "dtype"), ({"max_batch_rows": 0}, "max_batch_rows")],
)
def test_wrong_arguments_of_make_engine(make_model, options, text):
    with pytest.raises(ConfigError, match=text):
        engine_of(make_model(), **options)


def test_batches_keep_groups_whole_and_like_lengths_together():
    prompts = [(0,) * length for length in (9, 1, 8, 2, 7)]
    assert plan_batches(prompts, 2, None) == [tuple(Span(prompt=i, first=0, count=2) for i in range(5))]
    batches = plan_batches(prompts, 2, 5)
    assert [[span.prompt for span in batch] for batch in batches] == [[1, 3], [4, 2], [0]]
    split = plan_batches(prompts[:1], 5, 2)
    assert [(b[0].first, b[0].count) for b in split] == [(0, 2), (2, 2), (4, 1)]
