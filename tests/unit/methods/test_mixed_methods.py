"""Data flow of the methods that learn from rollouts and demonstrations: what is sampled, what enters, what divides."""

import math

import pytest
import torch
from test_methods import group

from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.core.imitation import ChordPhi
from mifo.core.losses import CrossEntropy, PolicyGradient
from mifo.core.mixing import EntropyWeighted, OffPolicy
from mifo.core.reduce import sequence_scale, update_totals
from mifo.methods import make_method
from mifo.train.rows import counted_tokens, demonstrated, live_sequences
from mifo.types import Taken

RL = {"prompts_per_step": 2, "updates_per_step": 1, "rollouts_per_prompt": 4, "entropy_coefficient": 0.0}


def method(name, *, rl=None, reward=None, **settings):
    table = {"name": name, **settings}
    if name != "srft":
        table["rl"] = RL | (rl or {})
    return make_method(decode(Config, {"method": table, "reward": reward or {}}))


def weights(update, name):
    """Weights in a stream, by sequence; None where the stream does not see it."""
    return [s.weights.get(name) for s in update.sequences]


def denominator(update, name):
    """Tokens in the denominator of a stream, as the engine counts them."""
    term = next(t for t in update.terms if t.name == name)
    return sum(counted_tokens(term, s) for s in update.sequences)


# --- ReLIFT ---------------------------------------------------------------------------------------------------------


def test_relift_takes_failed_questions_and_learns_so_many_once():
    relift = method("relift", buffer_size=2)
    phase = relift.next_phase()
    assert (phase.name, phase.prompts, phase.rollouts) == ("rl", 2, 4)
    relift.updates(phase, [group("a", 0, of=4), group("b", 1, of=4)])
    assert relift.next_phase().name == "rl"  # b has one right: it is not failed
    relift.updates(phase, [group(n, 0, of=4) for n in "cdef"])
    sft = relift.next_phase()
    assert (sft.name, sft.optimizer, sft.prompts, sft.freeze) == ("sft", "sft", 0, None)
    [update] = relift.updates(sft, ())
    assert [s.problem_id for s in update.sequences] == ["a", "c"]
    assert update.terms[0].select is None
    assert relift.next_phase().name == "rl"  # d, e and f wait, though they are as many as S
    assert relift.progress() == {"buffer": 3, "buffer_size": 2}
    relift.updates(phase, [group("g", 4, of=4)])
    assert relift.next_phase().name == "sft"


def test_relift_of_the_authors_takes_the_newest():
    relift = method("relift", buffer_size=2, buffer_order="lifo")
    relift.updates(relift.next_phase(), [group(n, 0, of=4) for n in "abcd"])
    [update] = relift.updates(relift.next_phase(), ())
    assert [s.problem_id for s in update.sequences] == ["d", "c"]


def test_relift_state_survives_where_an_sft_step_is_due():
    first, second = method("relift", buffer_size=2), method("relift", buffer_size=2)
    first.updates(first.next_phase(), [group(n, 0, of=4) for n in "abc"])
    second.load_state_dict(first.state_dict())
    assert second.next_phase() == first.next_phase()
    assert second.updates(second.next_phase(), ()) == first.updates(first.next_phase(), ())
    assert second.state_dict() == first.state_dict()


# --- LUFFY, RL with SFT loss ----------------------------------------------------------------------------------------


def test_luffy_shares_baseline_and_denominator():
    luffy = method("luffy")
    phase = luffy.next_phase()
    assert (phase.name, phase.optimizer, phase.prompts, phase.rollouts) == ("mixed", "rl", 2, 3)
    assert luffy.needs_demonstrations
    [update] = luffy.updates(phase, [group("a", 1, of=3), group("b", 3, of=3)])
    # a: rewards 1 0 0 and 1 of the demonstration, mean 1/2; the mean of the rollouts alone would be 1/3. b: all equal.
    assert weights(update, "pg") == [0.5, -0.5, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert weights(update, "off") == [0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0]
    pg, off = update.terms
    assert pg.loss == PolicyGradient(0.2, 0.2)
    assert (off.loss, off.uses_old_policy) == (OffPolicy(0.1), False)
    everything = 2 * (3 + 4 + 5 + 3)
    assert denominator(update, "pg") == denominator(update, "off") == everything
    assert live_sequences(update) == [0, 1, 2, 3]  # the all-equal group is not fed
    assert demonstrated([update]) == ["a"]
    assert update.sequences[3].response_ids == (7, 8, 9)
    assert update.sequences[3].sampler_logprobs is None


def test_luffy_demonstration_has_the_reward_of_a_correct_answer():
    luffy = method("luffy", reward={"correct": 3.0, "incorrect": 0.0}, rl={"advantage_std": True})
    [update] = luffy.updates(luffy.next_phase(), [group("a", 0, of=3)])
    std = math.sqrt(((3 - 0.75) ** 2 + 3 * 0.75**2) / 3)
    assert weights(update, "off")[3] == pytest.approx(2.25 / (std + 1e-6))
    assert weights(update, "pg")[:3] == pytest.approx([-0.75 / (std + 1e-6)] * 3)


def test_luffy_settings_reach_its_terms_and_updates():
    rl = {
        "updates_per_step": 2,
        "normalizer": "constant",
        "constant_tokens": 50,
        "clip_low": "none",
        "clip_high": "none",
    }
    luffy = method("luffy", gamma="none", rl=rl | {"entropy_coefficient": 0.1, "kl_coefficient": 0.2})
    assert luffy.needs_reference
    updates = luffy.updates(luffy.next_phase(), [group("a", 1, of=3), group("b", 2, of=3)])
    assert [[s.problem_id for s in u.sequences] for u in updates] == [["a"] * 4, ["b"] * 4]
    pg, kl, ent, off = updates[0].terms
    assert pg.loss == PolicyGradient(None, None)
    assert (off.loss, off.normalizer, off.constant_tokens) == (OffPolicy(None), "constant", 50)
    assert (kl.coefficient, ent.coefficient) == (0.2, 0.1)
    assert weights(updates[0], "ent") == weights(updates[0], "kl") == [1.0, 1.0, 1.0, None]


def test_rl_with_sft_leaves_the_demonstration_out_of_the_baseline():
    both = method("rl_with_sft", sft_coefficient=0.5, rl={"entropy_coefficient": 0.1}, sft={"entropy_coefficient": 0.3})
    assert both.next_phase().rollouts == 3
    [update] = both.updates(both.next_phase(), [group("a", 1, of=3), group("b", 0, of=3)])
    assert weights(update, "pg") == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 0, 0, None, None], abs=1e-12)
    assert weights(update, "ce") == [None] * 6 + [1.0, 1.0]
    assert {t.name: t.coefficient for t in update.terms} == {"pg": 1.0, "ent": 0.1, "ce": 0.5, "sft_ent": 0.15}
    assert weights(update, "ent") == [1.0] * 6 + [None] * 2
    assert weights(update, "sft_ent") == [None] * 6 + [1.0] * 2
    assert (denominator(update, "pg"), denominator(update, "ce")) == (24, 6)


# --- stages ---------------------------------------------------------------------------------------------------------


def phases(stages, count):
    seen = ""
    for _ in range(count):
        phase = stages.next_phase()
        seen += {"sft": "s", "rl": "r"}[phase.name]
        assert phase.fresh
        assert phase.optimizer == phase.name
        stages.updates(phase, [group("a", 1, of=4)] if phase.name == "rl" else [group("a", 0, of=0)])
    return seen


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("sft_rl", {"sft_steps": 3}, "sssrrrrr"),
        ("rl_sft", {"rl_steps": 2}, "rrssssss"),
        ("multi_stage", {"sft_steps": 1, "rl_steps": 2}, "srrsrrsr"),
    ],
)
def test_stages_switch_by_their_steps(name, settings, expected):
    assert phases(method(name, **settings), 8) == expected
    first, second = method(name, **settings), method(name, **settings)
    start = phases(first, 3)
    second.load_state_dict(first.state_dict())
    assert start + phases(second, 5) == expected


def test_stages_draw_and_learn_what_their_kind_says():
    stages = method("sft_rl", sft_steps=1, sft_batch_size=5)
    phase = stages.next_phase()
    assert (phase.prompts, phase.rollouts) == (5, 0)
    [update] = stages.updates(phase, [group("a", 0, of=0), group("b", 0, of=0)])
    assert [s.response_ids for s in update.sequences] == [(7, 8, 9)] * 2
    assert isinstance(update.terms[0].loss, CrossEntropy)
    phase = stages.next_phase()
    assert (phase.prompts, phase.rollouts) == (2, 4)
    [update] = stages.updates(phase, [group("a", 1, of=4)])
    assert weights(update, "pg") == [0.75, -0.25, -0.25, -0.25]


# --- SRFT -----------------------------------------------------------------------------------------------------------


def test_srft_streams_by_hand():
    srft = method("srft", prompts_per_step=2, updates_per_step=1, rollouts_per_prompt=3)
    phase = srft.next_phase()
    assert (phase.name, phase.prompts, phase.rollouts) == ("mixed", 2, 3)
    [update] = srft.updates(phase, [group("a", 1, of=3), group("b", 3, of=3)])
    assert weights(update, "pos") == [1.0, 0.0, 0.0, None, 1.0, 1.0, 1.0, None]
    assert weights(update, "neg") == [0.0, -1.0, -1.0, None, 0.0, 0.0, 0.0, None]
    assert weights(update, "sft") == [None, None, None, 1.0] * 2
    std = math.sqrt(4 * 0.25 / 3)  # rewards 1 0 0 1
    assert weights(update, "off")[3::4] == pytest.approx([0.5 / (std + 1e-6), 0.0])
    assert {t.name: t.loss for t in update.terms} == {
        "sft": EntropyWeighted(0.5, "minus", "sequence"),
        "off": OffPolicy(None),
        "pos": EntropyWeighted(0.1, "plus", "sequence"),
        "neg": CrossEntropy(),
    }
    assert denominator(update, "pos") == denominator(update, "neg") == 24
    assert denominator(update, "sft") == denominator(update, "off") == 6


def test_srft_switches():
    settings = {"sft_entropy_sign": "plus", "entropy_scope": "token", "gamma": 0.1, "negative_weight": 0.0}
    srft = method("srft", sft_scale=0.3, rl_scale=0.2, advantage_std=False, normalizer="sequence", **settings)
    [update] = srft.updates(srft.next_phase(), [group("a", 1, of=3)])
    assert weights(update, "neg")[:3] == [0.0, 0.0, 0.0]
    assert weights(update, "off")[3] == 0.5
    sft, off, pos, _ = update.terms
    assert (sft.loss, pos.loss) == (EntropyWeighted(0.3, "plus", "token"), EntropyWeighted(0.2, "plus", "token"))
    assert off.loss == OffPolicy(0.1)
    assert {t.normalizer for t in update.terms} == {"sequence"}
    assert live_sequences(update) == [0, 3]


def test_wrong_rollouts_of_srft_become_less_likely():
    """E_{y−}[+ℓ]: the sign is that of a loss, so its gradient by ℓ is +1."""
    from mifo.types import TokenStats

    logp = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.long)
    CrossEntropy()(TokenStats(logp_T=logp, entropy_T=logp, weight_T=torch.tensor([-1.0]), sequence_T=zero)).backward()
    assert logp.grad.item() == 1.0


# --- HPT, SuperRL ---------------------------------------------------------------------------------------------------

SCORES = {"none": 0, "one": 1, "two": 2, "all": 4}


def gated(name, **settings):
    """{problem: streams it is learned by}, and the update."""
    gate = method(name, **settings)
    phase = gate.next_phase()
    assert (phase.name, phase.prompts, phase.rollouts) == ("mixed", 2, 4)
    [update] = gate.updates(phase, [group(n, c, of=4) for n, c in SCORES.items()])
    learned = {n: {k for s in update.sequences if s.problem_id == n for k, w in s.weights.items() if w} for n in SCORES}
    return learned, update


def test_hpt_imitates_what_fails_and_only_that():
    learned, update = gated("hpt", sft_coefficient=0.3)
    assert learned == {"none": {"ce"}, "one": {"pg"}, "two": {"pg"}, "all": set()}
    # As if every question had taken part in both: 4 groups of 3+4+5+6 tokens, 4 demonstrations of 3.
    assert (denominator(update, "pg"), denominator(update, "ce")) == (72, 12)
    assert {t.name: t.coefficient for t in update.terms} == {"pg": 1.0, "ce": 0.3}
    assert len(live_sequences(update)) == 9  # one demonstration, and the rollouts of two groups
    assert demonstrated([update]) == ["none"]
    _, narrow = gated("hpt", denominator="stream")
    assert (denominator(narrow, "pg"), denominator(narrow, "ce")) == (54, 3)


def test_hpt_threshold_counts_at_most():
    learned, _ = gated("hpt", accuracy_threshold=0.25)
    assert learned["one"] == {"ce"}
    assert learned["two"] == {"pg"}


@pytest.mark.parametrize("correct", [0, 4])
@pytest.mark.parametrize("denominators", ["batch", "stream"])
def test_hpt_where_all_questions_are_on_one_side(correct, denominators):
    gate = method("hpt", denominator=denominators)
    [update] = gate.updates(gate.next_phase(), [group("a", correct, of=4), group("b", correct, of=4)])
    assert demonstrated([update]) == (["a", "b"] if correct == 0 else [])
    names = {t.name for t in update.terms}
    assert names == {"pg", "ce"} if denominators == "batch" else names == ({"ce"} if correct == 0 else {"pg"})


def test_superrl_gates():
    learned, _ = gated("superrl")
    assert learned == {"none": {"ce"}, "one": {"pg"}, "two": {"pg"}, "all": set()}
    learned, _ = gated("superrl", gate="advantage")
    assert learned == {"none": {"ce"}, "one": {"pg"}, "two": {"pg"}, "all": {"ce"}}


def test_log_sigma_learns_both_of_every_question_and_moves_its_weights_by_the_losses():
    """σ ← σ − η (1 − 2 e^{−2σ} L), by hand: a policy-gradient loss of 0 lets σ fall, an NLL above ½ lets it rise."""
    both = method("superrl", gate="log_sigma", sigma_rate=0.1, rl={"entropy_coefficient": 0.01})
    groups = [group(n, c, of=4) for n, c in SCORES.items()]
    [update] = both.updates(both.next_phase(), groups)
    assert {t.name: t.coefficient for t in update.terms} == {"pg": 1.0, "ent": 0.01, "ce": 1.0}
    assert [s.problem_id for s in update.sequences if "ce" in s.weights] == list(SCORES)
    assert (denominator(update, "pg"), denominator(update, "ce")) == (72, 12)
    both.learned(both.next_phase(), [Taken(grad_norm=1.0, losses={"pg": 0.0, "ent": -3.0, "ce": 2.0})])
    assert both.sigma == pytest.approx({"pg": -0.1, "ce": 0.3})
    [update] = both.updates(both.next_phase(), groups)
    factors = {"pg": math.exp(0.2), "ent": 0.01, "ce": math.exp(-0.6)}
    assert {t.name: t.coefficient for t in update.terms} == pytest.approx(factors)
    assert both.progress() == pytest.approx({"rl_weight": math.exp(0.2), "sft_weight": math.exp(-0.6)})
    # What the engine measured has the factors in it; σ goes by the losses without them.
    both.learned(both.next_phase(), [Taken(grad_norm=1.0, losses={"pg": 0.0, "ce": 2.0 * math.exp(-0.6)})])
    assert both.sigma["ce"] == pytest.approx(0.3 - 0.1 * (1 - 4 * math.exp(-0.6)))
    other = method("superrl", gate="log_sigma", sigma_rate=0.1)
    other.load_state_dict(both.state_dict())
    assert other.progress() == both.progress()


def test_log_sigma_settles_where_its_objective_is_least_and_is_bounded():
    """For a loss L that stays, e^{−2σ} L + σ is least at σ = ln(2 L)/2; for L = 0 only the bound holds σ."""
    both = method("superrl", gate="log_sigma", sigma_rate=0.05, sigma_bound=0.7)
    for _ in range(400):
        weight = both.progress()["sft_weight"]
        both.learned(both.next_phase(), [Taken(grad_norm=1.0, losses={"pg": 0.0, "ce": weight * 0.9})])
    assert both.sigma["ce"] == pytest.approx(math.log(1.8) / 2, abs=1e-6)
    assert both.sigma["pg"] == -0.7


def test_superrl_asks_for_a_reward_not_for_correctness():
    both = [method(n, reward={"correct": 1.0, "incorrect": -1.0}) for n in ("superrl", "hpt")]
    negative = group("a", 0, of=4)
    object.__setattr__(negative, "rewards", (-1.0,) * 4)
    assert [gate.by_rl(negative) for gate in both] == [False, False]
    object.__setattr__(negative, "rewards", (0.5,) * 4)
    assert [gate.by_rl(negative) for gate in both] == [True, False]


def test_gated_loss_is_the_mean_over_questions():
    """One failed question of four weighs a quarter of what it does alone."""
    _, update = gated("hpt")
    ce = next(t for t in update.terms if t.name == "ce")
    lengths = [counted_tokens(ce, s) for s in update.sequences]
    [totals] = update_totals([lengths])
    assert sequence_scale(3, totals, "token") == pytest.approx(1 / 12)


# --- CHORD ----------------------------------------------------------------------------------------------------------

CHORD = {"demonstrations_per_step": 2, "mu_peak": 0.5, "mu_valley": 0.1, "mu_warmup_steps": 2, "mu_decay_steps": 2}


def chord_groups():
    return [group("a", 1, of=4), group("b", 2, of=4), group("c", 0, of=0), group("d", 0, of=0)]


def test_chord_mixes_questions_of_their_own():
    chord = method("chord", rl={"entropy_coefficient": 0.1}, sft={"loss": "chord_phi"}, **CHORD)
    phase = chord.next_phase()
    assert (phase.name, phase.prompts, phase.rollouts, phase.demonstrations) == ("mixed", 2, 4, 2)
    seen = []
    for _ in range(6):
        [update] = chord.updates(chord.next_phase(), chord_groups())
        seen.append({t.name: t.coefficient for t in update.terms})
    mu = [0.0, 0.25, 0.5, 0.3, 0.1, 0.1]
    assert [c["ce"] for c in seen] == pytest.approx(mu)
    assert [c["pg"] for c in seen] == pytest.approx([1 - m for m in mu])
    assert {c["ent"] for c in seen} == {0.1}
    assert [s.problem_id for s in update.sequences] == ["a"] * 4 + ["b"] * 4 + ["c", "d"]
    assert (denominator(update, "pg"), denominator(update, "ce")) == (36, 6)
    assert isinstance(next(t for t in update.terms if t.name == "ce").loss, ChordPhi)


def test_chord_splits_both_kinds_between_its_updates():
    chord = method("chord", rl={"updates_per_step": 2}, **CHORD)
    updates = chord.updates(chord.next_phase(), chord_groups())
    assert [[s.problem_id for s in u.sequences] for u in updates] == [["a"] * 4 + ["c"], ["b"] * 4 + ["d"]]
    assert isinstance(next(t for t in updates[0].terms if t.name == "ce").loss, CrossEntropy)


def test_chord_state_is_its_step():
    first, second = method("chord", **CHORD), method("chord", **CHORD)
    for _ in range(3):
        first.updates(first.next_phase(), chord_groups())
    second.load_state_dict(first.state_dict())
    assert second.progress() == first.progress() == {"mu": pytest.approx(0.3)}


@pytest.mark.parametrize("name", ["luffy", "rl_with_sft", "srft", "hpt", "superrl", "chord", "relift", "sft_rl"])
def test_a_step_whose_rollouts_failed_has_no_updates(name):
    one = method(name, **({"sft_steps": 1} if name == "sft_rl" else {}))
    if name == "sft_rl":
        one.updates(one.next_phase(), [group("a", 0, of=0)])
    assert one.updates(one.next_phase(), ()) == []
