"""Coupling: loss, KL, C_1 and the bounds against plain forward passes and hand-made cases."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lab_models import family_model, moved, save
from transformers import AutoModelForCausalLM

from mifo.config.legacy import LegacyConfig
from mifo.config.schema import Config, DataConfig, RolloutConfig
from mifo.core.intervals import wilson
from mifo.data.chartok import char_tokenizer
from mifo.data.labelled import COLA, LabelTask, make_task
from mifo.errors import ConfigError, DataError
from mifo.lab.coupling import CouplingSettings, _config, _task, coupling
from mifo.lab.coupling_bounds import (
    Estimate,
    Texts,
    above,
    c1,
    mean_estimate,
    mean_reward,
    rl_sft_bounds,
    sft_rl_bounds,
)
from mifo.lab.labels import read_examples
from mifo.lab.source import Source
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


def slow_c1(p, others, beta):
    """log Z − 1/β of one text from the formula, and J where every response is weighed by e^{r/β}."""
    mass = [(p, 1.0), *(((1 - p) / len(others), r) for r in others)]
    z = sum(weight * math.exp(r / beta) for weight, r in mass)
    return math.log(z) - 1 / beta, sum(weight * math.exp(r / beta) * r for weight, r in mass) / z


def test_c1_by_its_formula():
    texts = [(0.25, [-1.0, -1.0, -1.0]), (0.9, [-1.0, 1.0])]
    found = c1([math.log(p) for p, _ in texts], [[1.0, -1.0], [1.0, 1.0]], [rest for _, rest in texts], 0.5)
    slow = [slow_c1(p, rest, 0.5) for p, rest in texts]
    assert found.by_text == pytest.approx([c for c, _ in slow])
    assert found.value.value == pytest.approx(sum(c for c, _ in slow) / 2)
    assert found.optimum == pytest.approx(sum(j for _, j in slow) / 2)
    mixed = math.log((math.exp(2) + math.exp(-2)) / 2) - 2
    assert found.by_samples == pytest.approx(mixed / 2)
    assert found.without_right_sample == 0


def test_c1_of_a_small_beta_is_the_loss_and_not_a_count_of_unlucky_texts():
    """At β = 0.001 nothing but log p is left, though no sample of the second text was right; its samples alone say −2000."""
    found = c1([math.log(0.6), math.log(0.3)], [[1.0, -1.0], [-1.0, -1.0]], [[-1.0], [-1.0, -1.0]], 0.001)
    assert found.value.value == pytest.approx((math.log(0.6) + math.log(0.3)) / 2)
    assert found.by_samples == pytest.approx((math.log(0.5) - 2000) / 2)
    assert (found.without_right_sample, found.optimum) == (1, pytest.approx(1.0))
    sure = c1([0.0], [[1.0, 1.0]], [[]], 0.001)  # always right already: nothing to gain, nothing to lose
    assert (sure.value.value, sure.optimum) == (0.0, 1.0)


def test_the_statements_of_theorem_3_1(phases):
    paths, data = phases
    found = coupling(paths, settings_of(data))
    equation, order = found.bounds
    losses = found.points[0].sft_loss.value
    assert found.c1.value.value == pytest.approx(-losses, rel=1e-3)  # 1/β = 1000 leaves log p alone
    assert (found.c1.by_samples, found.c1.without_right_sample) == (
        pytest.approx(-2000),
        6,
    )  # no sample is the bare label
    assert equation.predicted == pytest.approx(losses + found.c1.value.value, abs=1e-6)
    assert equation.verdict == "fails"
    assert "eq. 10 fails" in equation.caveat  # an untrained model does not match the data
    assert "eq. 12 fails: J = -1" in equation.caveat  # and was not trained by RL
    assert order.predicted == losses
    assert order.difference.value == pytest.approx(found.points[1].sft_loss.value - losses)


def texts(label, loss, objective, kl, *, of=40):
    """Forty texts that differ widely among themselves, and by the given means from one model to another."""
    spread = [math.sin(i) for i in range(of)]
    centre = sum(spread) / of
    return Texts(
        label=label,
        sft_loss=[loss + s - centre for s in spread],
        objective=[objective + 0.5 * (s - centre) for s in spread],
        kl=[kl] * of,
    )


def test_theorem_3_1_goes_by_paired_differences():
    """Texts whose losses spread by ±1 and all rise by 0.1: unpaired intervals of ±0.2 would not tell; paired ones do."""
    first, second = texts("sft", 1.0, 0.0, 0.0), texts("rl", 1.1, 0.5, 0.1)
    constant = c1([-loss for loss in first.sft_loss], [[-1.0]] * 40, [[-1.0]] * 40, 0.01)
    equation, order = sft_rl_bounds(constant, [first, second])
    assert order.verdict == "holds"
    assert order.difference.high - order.difference.low < 1e-9
    assert equation.verdict == "fails"
    assert "eq. 12 fails: J = 0.5" in equation.caveat
    exact = [a + c for a, c in zip(first.sft_loss, constant.by_text, strict=True)]
    after = Texts(label="optimum", sft_loss=exact, objective=[1.0] * 40, kl=[0.5] * 40)
    equation, _ = sft_rl_bounds(constant, [first, after])
    assert equation.verdict == "holds"
    assert "eq. 12" not in equation.caveat


def test_an_equality_holds_within_a_margin_and_not_because_its_interval_is_wide():
    """Ten texts, of which three come out with a loss of 20 where 0 was predicted."""
    first = texts("sft", 0.36, 0.0, 0.0, of=10)
    constant = c1([-loss for loss in first.sft_loss], [[-1.0]] * 10, [[-1.0]] * 10, 0.001)
    after = replace(first, label="rl", sft_loss=[1e-4] * 7 + [20.0] * 3)
    equation, _ = sft_rl_bounds(constant, [first, after])
    assert equation.difference.low < 0.0 < equation.difference.high
    assert equation.verdict == "cannot be told"
    exact = replace(after, sft_loss=[a + c + 0.04 for a, c in zip(first.sft_loss, constant.by_text, strict=True)])
    assert sft_rl_bounds(constant, [first, exact])[0].verdict == "holds"
    off = replace(after, sft_loss=[a + c + 0.06 for a, c in zip(first.sft_loss, constant.by_text, strict=True)])
    assert sft_rl_bounds(constant, [first, off])[0].verdict == "fails"


def test_responses_end_where_the_run_had_them_end():
    run = Config(rollout=RolloutConfig(stop_texts=("</answer>",)), legacy=LegacyConfig(append_end=False))
    source = Source(given="x", field="MODEL", folder=Path("x"), run=run, checkpoint=False)
    made = _config(source, CouplingSettings(data="x", order="sft-rl"))
    assert (made.rollout.stop_texts, made.legacy.append_end) == (("</answer>",), False)
    plain = _config(replace(source, run=None), CouplingSettings(data="x", order="sft-rl"))
    assert (plain.rollout, plain.legacy) == (RolloutConfig(), LegacyConfig())


def test_proposition_1_and_theorem_4_1():
    points = [
        texts(*row)
        for row in (("rl", 0, 0.2, 0.0), ("near", 0, 0.1, 0.02), ("up", 0, 0.35, 0.02), ("far", 0, -0.5, 2.0))
    ]
    bounds = {(b.label, b.statement.split(":")[0]): b for b in rl_sft_bounds(points)}
    assert bounds["near", "Proposition 1"].predicted == pytest.approx(0.2 + math.sqrt(0.04))
    assert bounds["near", "Proposition 1"].verdict == "holds"
    assert bounds["far", "Proposition 1"].verdict == "says nothing"  # 0.2 + 2 exceeds every reward
    assert bounds["near", "Theorem 4.1"].verdict == "holds"
    assert "implied λ = 5 [5, 5]" in bounds["near", "Theorem 4.1"].caveat
    assert bounds["up", "Theorem 4.1"].verdict == "fails"
    assert "no local maximum" in bounds["up", "Theorem 4.1"].caveat
    [broken, _] = rl_sft_bounds([texts("rl", 0, 0.0, 0.0), texts("x", 0, 0.5, 0.02)])
    assert broken.verdict == "fails"
    [_, still] = rl_sft_bounds([texts("rl", 0, 0.0, 0.0), texts("same", 0, 0.0, 0.0)])
    assert still.verdict == "cannot be told"
    assert "not known, for the KL may be 0" in still.caveat
    same = [replace(texts(label, 0, 0.0, kl), objective=[-1.0] * 40) for label, kl in (("rl", 0.0), ("sft", 0.02))]
    assert "not known, for J changed by the same on every text" in rl_sft_bounds(same)[1].caveat


def test_intervals_decide_or_do_not():
    def around(value, half):
        return Estimate(value=value, low=value - half, high=value + half, texts=9)

    assert [above(around(*pair)) for pair in ((1, 0.9), (-1, 0.9), (1, 1.1))] == ["holds", "fails", "cannot be told"]
    estimate = mean_estimate([1.0, 2.0, 3.0])
    assert estimate.value == 2.0
    assert estimate.high - 2.0 == pytest.approx(
        4.302653 / math.sqrt(3), rel=1e-6
    )  # Student's t with two degrees of freedom


def test_mistakes(phases, tmp_path):
    paths, data = phases
    with pytest.raises(ConfigError, match="coupling of one model"):
        coupling(paths[:1], settings_of(data))
    with pytest.raises(ConfigError, match="--samples = 1 must be at least 2"):
        coupling(paths, settings_of(data, samples=1))
    (tmp_path / "x.csv").write_text("sentence,label\na,1\n")
    with pytest.raises(DataError, match=r"\.csv files are not read here"):
        coupling(paths, settings_of(str(tmp_path / "x.csv")))
    with pytest.raises(ConfigError, match="--beta = 0"):
        coupling(paths, settings_of(data, beta=0.0))


def test_one_text_decides_nothing(phases):
    paths, data = phases
    for order in ("sft-rl", "rl-sft"):
        found = coupling(paths, settings_of(data, order=order, limit=1))
        assert {bound.verdict for bound in found.bounds} <= {"cannot be told", "says nothing"}
        assert "(one text)" in str(found.points[1].sft_loss)


def test_rewards_that_are_all_equal_are_not_certain():
    found = mean_reward([-1.0] * 20)
    assert (found.value, found.low) == (-1.0, -1.0)
    assert found.high == pytest.approx(-1.0 + 2 * wilson(0.0, 20).high)
    assert mean_reward([0.1, 0.1, -0.1]) == mean_estimate([0.1, 0.1, -0.1])


def test_proposition_1_is_held_against_both_ends_of_the_kl():
    """B = 0.02 allows 0.2 and J rose by 0.3; but B is known to ±0.1 only, and 0.12 would allow 0.49."""
    first, second = texts("rl", 0, 0.0, 0.0), texts("x", 0, 0.3, 0.02)
    noisy = replace(second, kl=[0.02 + 0.33 * (-1) ** i for i in range(40)])
    assert rl_sft_bounds([first, second])[0].verdict == "fails"
    assert rl_sft_bounds([first, noisy])[0].verdict == "cannot be told"


def test_the_question_is_that_of_the_run():
    run = Config(data=DataConfig(labels=("no", "yes")))
    source = Source(given="x", field="MODEL", folder=Path("x"), run=run, checkpoint=False)
    assert _task(source) == make_task(("no", "yes"), None)
    assert _task(replace(source, run=Config())) == _task(replace(source, run=None)) == COLA


def test_counts_below_one(phases):
    paths, data = phases
    with pytest.raises(ConfigError, match="--limit = 0 must be at least 1"):
        coupling(paths, settings_of(data, limit=0))
