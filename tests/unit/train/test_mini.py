"""The mini model: what ships is what the code names, it is a base model as it claims, nothing held out went into it."""

import hashlib

import pytest
import torch

from mifo.config.schema import ModelConfig
from mifo.data import tasks
from mifo.rollout.local import LocalEngine
from mifo.train import mini
from mifo.train.model import load_model, load_tokenizer, resolve_model_path
from mifo.types import Sampling

WEIGHTS_SHA256 = "577868a65f350f32817b3ec34bc47668fa381e1f50f13416341e8b84f80ea49c"


def sampled(family, temperature, count=30):
    """Responses of the shipped model to test problems of a family, with their problems."""
    config = ModelConfig(path="mini")
    model, tokenizer = load_model(config), load_tokenizer(config)
    problems = tasks.generate("test", count, families=(family,), max_level=1)
    turns = [[{"role": "user", "content": problem.messages[0].content}] for problem in problems]
    prompts = [
        tuple(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True)["input_ids"])
        for turn in turns
    ]
    engine = LocalEngine(model, dtype=torch.float32, device=torch.device("cpu"))
    sampling = Sampling(temperature=temperature, top_p=1.0, max_tokens=40, stop_ids=(tokenizer.eos_token_id,))
    groups = engine.generate(prompts, 4, sampling, seed=0)
    return [
        (problem, tokenizer.decode(r.token_ids[:-1])) for problem, rs in zip(problems, groups, strict=True) for r in rs
    ]


def ends_right(problem, text):
    return any(text.endswith(form.format(steps="", answer=problem.answer)) for form in mini.FORMATS)


def test_the_shipped_weights_are_those_that_the_figures_rest_on():
    path = mini.MINI_FOLDER / "model.safetensors"
    assert resolve_model_path("mini") == str(mini.MINI_FOLDER)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == WEIGHTS_SHA256


def test_the_shipped_architecture_is_the_one_that_the_code_makes():
    made, shipped = mini.random_model(0), load_model(ModelConfig(path="mini"))
    assert {n: t.shape for n, t in made.state_dict().items()} == {n: t.shape for n, t in shipped.state_dict().items()}
    assert load_tokenizer(ModelConfig(path="mini")).get_vocab() == mini.char_tokenizer().get_vocab()


def test_it_knows_the_sums_and_boxes_some_of_them():
    found = sampled("chain_add", 1.0)
    right = sum(ends_right(problem, text) for problem, text in found) / len(found)
    boxed = sum("\\boxed" in text for _, text in found) / len(found)
    assert right > 0.7
    assert 0.1 < boxed < 0.5


@pytest.mark.parametrize("family", ["subtract", "reverse"])
def test_it_does_not_know_what_demonstrations_are_to_teach(family):
    found = sampled(family, 1.0)
    assert sum(ends_right(problem, text) for problem, text in found) / len(found) < 0.1


def test_its_corpus_holds_no_solution_of_a_held_out_problem():
    corpus = mini._Corpus(0)
    held_out = [
        problem
        for split in ("validation", "test")
        for family in (*mini.ASKED, "subtract", "reverse")
        for problem in tasks.generate(
            split, tasks.available(split, families=(family,), max_level=1), families=(family,), max_level=1
        )
    ]
    questions = {problem.messages[0].content for problem in held_out}
    steps = {problem.demonstration.rpartition("\n")[0] for problem in held_out}
    drawn = [corpus.draw() for _ in range(20_000)]
    assert {question for question, _ in drawn} & questions == set()
    assert {response for question, response in drawn if question in ("Calculate.", "Spell.")} & steps == set()


def test_pretraining_repeats_in_the_same_bits_and_learns():
    first, second = (mini.pretrain(steps=12, log_every=100).state_dict() for _ in range(2))
    start = mini.random_model(0).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], start["model.embed_tokens.weight"])


def test_the_loss_is_the_mean_over_response_tokens_alone():
    model, tokenizer = mini.random_model(0), mini.char_tokenizer()
    batch = [mini._encode(tokenizer, example) for example in (("Add 1, 2, 3.", "6"), ("Spell.", "a b\nb a"))]
    losses = []
    for prompt, response in batch:
        ids = torch.tensor([[*prompt, *response]])
        logp = model(ids).logits[0].log_softmax(-1)
        losses += [-logp[len(prompt) + i - 1, token] for i, token in enumerate(response)]
    torch.testing.assert_close(mini._loss(model, batch), torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
