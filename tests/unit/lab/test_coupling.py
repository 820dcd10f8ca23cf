"""Coupling: loss, KL, C_1 and the bounds against plain forward passes and hand-made cases."""

import json
import math

import pytest
import torch
from lab_models import family_model, moved, save
from transformers import AutoModelForCausalLM

from mifo.config.schema import Config
from mifo.data.chartok import char_tokenizer
from mifo.data.labelled import LabelTask
from mifo.errors import ConfigError
from mifo.lab.coupling import (
    CouplingPoint,
    CouplingSettings,
    Estimate,
    _order,
    _rl_sft_bounds,
    c1,
    coupling,
    mean_estimate,
)
from mifo.lab.labels import label_scores, read_examples
from mifo.train.build import make_chat

TASK = LabelTask(labels=("n", "y"), instruction="{text}?")


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coupling")
    base = family_model("qwen2")
    models = [base, moved(base, 1, scale=0.02)]
    (folder / "data.jsonl").write_text("\n".join(json.dumps({"text": f"{i}", "label": i % 2}) for i in range(6)))
    return [save(m, folder / f"m{i}") for i, m in enumerate(models)], str(folder / "data.jsonl")


def settings_of(data, **changes):
    plain = {"data": data, "order": "sft-rl", "task": TASK, "samples": 4, "max_tokens": 3}
    return CouplingSettings(**plain | changes)


def test_the_loss_of_the_right_label(phases):
    paths, data = phases
    found = coupling(paths, settings_of(data))
    chat = make_chat(Config(), char_tokenizer())
    for path, point in zip(paths, found.points, strict=True):
        model, losses = AutoModelForCausalLM.from_pretrained(path), []
        for i, example in enumerate(read_examples(data, TASK)):
            prompt = chat.prompt_ids(example.problem(TASK, i))
            gold = chat.demonstration_ids(TASK.labels[example.label])
            logp = (
                model(input_ids=torch.tensor([prompt + gold]))
                .logits[0, len(prompt) - 1 : -1]
                .detach()
                .double()
                .log_softmax(-1)
            )
            losses.append(-sum(float(logp[t, token]) for t, token in enumerate(gold)))
        assert point.sft_loss.value == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_kl_is_zero_to_itself_and_near_the_exact_one(phases):
    paths, data = phases
    found = coupling(paths, settings_of(data, samples=200, max_tokens=1))
    assert found.points[0].kl.value == pytest.approx(0.0, abs=1e-5)
    chat, exact = make_chat(Config(), char_tokenizer()), []
    models = [AutoModelForCausalLM.from_pretrained(path) for path in paths]
    for i, example in enumerate(read_examples(data, TASK)):
        ids = torch.tensor([chat.prompt_ids(example.problem(TASK, i))])
        first, second = (m(input_ids=ids).logits[0, -1].double().log_softmax(-1).detach() for m in models)
        exact.append(float((second.exp() * (second - first)).sum()))
    expected, point = sum(exact) / len(exact), found.points[1]
    assert expected > 0.01
    assert point.kl.value == pytest.approx(expected, rel=0.3)  # 1200 samples


def test_the_same_seed_gives_the_same_figures(phases):
    paths, data = phases
    assert coupling(paths, settings_of(data)).rows() == coupling(paths, settings_of(data)).rows()


def test_c1_by_hand():
    assert c1([[1.0, 1.0]], 0.5) == pytest.approx(0.0)  # always right already: nothing to gain, nothing to lose
    mixed = math.log((math.exp(2) + math.exp(-2)) / 2) - 2
    assert c1([[1.0, -1.0], [1.0, 1.0]], 0.5) == pytest.approx(mixed / 2)
    assert c1([[1.0, -1.0]], 0.001) == pytest.approx(math.log(0.5), abs=1e-9)  # exp(1000) does not overflow


def test_the_statements_of_theorem_3_1(phases):
    paths, data = phases
    found = coupling(paths, settings_of(data))
    equation, order = found.bounds
    assert found.c1 == c1([[-1.0]], 0.001)  # an untrained model never gives the bare label: Z is exp(−1/β) everywhere
    assert equation.predicted == pytest.approx(found.points[0].sft_loss.value + found.c1)
    assert equation.verdict == "fails"
    assert "eq. 10 fails" in equation.caveat  # an untrained model does not match the data
    assert order.predicted == found.points[0].sft_loss.value


def point(label, objective, kl, half=0.01):
    some = label_scores([0, 1], [0, 1])

    def estimate(value):
        return Estimate(value=value, low=value - half, high=value + half)

    return CouplingPoint(
        label=label, sft_loss=estimate(1.0), kl=estimate(kl), objective=estimate(objective), strict=some, robust=some
    )


def test_proposition_1_and_theorem_4_1():
    points = [point("rl", 0.2, 0.0), point("near", 0.1, 0.02), point("up", 0.35, 0.02), point("far", -0.5, 2.0)]
    bounds = {(b.label, b.statement.split(":")[0]): b for b in _rl_sft_bounds(points)}
    assert bounds["near", "Proposition 1"].predicted == pytest.approx(0.2 + math.sqrt(0.04))
    assert bounds["near", "Proposition 1"].verdict == "holds"
    assert bounds["far", "Proposition 1"].verdict == "says nothing"  # 0.2 + 2 exceeds every reward
    assert bounds["near", "Theorem 4.1"].verdict == "holds"
    assert bounds["near", "Theorem 4.1"].caveat == "implied λ = 5"
    assert bounds["up", "Theorem 4.1"].verdict == "fails"
    assert "no local maximum" in bounds["up", "Theorem 4.1"].caveat
    [broken, _] = _rl_sft_bounds([point("rl", 0.0, 0.0), point("x", 0.5, 0.02)])
    assert broken.verdict == "fails"


def test_intervals_decide_or_do_not():
    low, high = Estimate(value=1, low=0.9, high=1.1), Estimate(value=2, low=1.9, high=2.1)
    wide = Estimate(value=2, low=0.5, high=3.5)
    assert (_order(low, high), _order(high, low), _order(low, wide)) == ("holds", "fails", "cannot be told")
    estimate = mean_estimate([1.0, 2.0, 3.0])
    assert estimate.value == 2.0
    assert estimate.high - 2.0 == pytest.approx(1.959964 / math.sqrt(3))


def test_mistakes(phases):
    paths, data = phases
    with pytest.raises(ConfigError, match="coupling of one model"):
        coupling(paths[:1], settings_of(data))
    with pytest.raises(ConfigError, match="--samples = 1 must be at least 2"):
        coupling(paths, settings_of(data, samples=1))
    with pytest.raises(ConfigError, match="--beta = 0"):
        coupling(paths, settings_of(data, beta=0.0))
