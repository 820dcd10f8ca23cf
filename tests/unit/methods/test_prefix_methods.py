"""Data flow of methods whose rollouts begin inside a demonstration, and of SASR: lengths, searches, what enters, what divides."""

import math
from dataclasses import replace

import pytest
from test_methods import group
from test_mixed_methods import denominator, method, weights

from mifo.methods.bread import Search
from mifo.methods.prefix import longest_prefix, prefix_of_parts
from mifo.methods.uft import Hints
from mifo.train.rows import demonstrated, live_sequences
from mifo.types import Taken, TopPrefixEntropy


def begun(made, *prefixes):
    """A group whose rollouts begin with so many tokens of the demonstration (7, 8, 9)."""
    rollouts = tuple(
        replace(r, token_ids=made.demonstration_ids[:p] + r.token_ids, prefix_tokens=p)
        for r, p in zip(made.rollouts, prefixes, strict=True)
    )
    return replace(made, rollouts=rollouts)


# --- where a prefix ends --------------------------------------------------------------------------------------------


def test_a_prefix_leaves_the_end_token_and_one_token_of_the_longest_response():
    assert [longest_prefix(9, 100), longest_prefix(9, 6), longest_prefix(2, 100)] == [8, 5, 1]
    assert [prefix_of_parts(k, 5, 11, 100) for k in range(6)] == [0, 2, 4, 6, 8, 10]  # of the ten before the end token
    assert [prefix_of_parts(k, 5, 11, 8) for k in range(6)] == [0, 2, 4, 6, 7, 7]
    assert [prefix_of_parts(k, 4, 11, 100) for k in range(5)] == [0, 2, 5, 8, 10]


# --- UFT ------------------------------------------------------------------------------------------------------------


def lengths(uft, step, *, tokens=11, names=("a",)):
    uft.step = step
    rule = uft.next_phase().prefixes
    return [rule(name, tokens) for name in names]


def test_uft_hints_follow_the_cosine_and_end():
    uft = method("uft", hint_steps=300)
    names = [f"q{i}" for i in range(4000)]
    for step, p in [(0, 0.95), (149, 0.5), (299, 0.05)]:
        assert Hints(uft.method, 0, step, 100).probability == pytest.approx(p, abs=2e-4)
        rows = lengths(uft, step, names=names)
        assert all(len(row) == 4 and len(set(row)) == 1 for row in rows)  # the same for all rollouts of a question
        chunks = [row[0] // 2 for row in rows]
        mean, variance = sum(chunks) / 4000, 5 * p * (1 - p)
        assert mean == pytest.approx(5 * p, abs=5 * math.sqrt(variance / 4000))
        assert sum((c - 5 * p) ** 2 for c in chunks) / 4000 == pytest.approx(variance, rel=0.15)
    assert lengths(uft, 300, names=names[:50]) == [(0,) * 4] * 50  # t = 301
    assert any(row[0] for row in lengths(uft, 298, names=names))


def test_uft_hints_are_a_function_of_seed_step_and_question():
    first, second = method("uft"), method("uft")
    names = [f"q{i}" for i in range(30)]
    assert lengths(first, 5, names=names) == lengths(second, 5, names=names[::-1])[::-1]
    assert lengths(first, 6, names=names) != lengths(first, 5, names=names)
    second.seed = 1
    assert lengths(second, 5, names=names) != lengths(first, 5, names=names)


def test_uft_stages_fall_from_five_to_none():
    uft = method("uft", hints="stage", hint_steps=300)
    found = [lengths(uft, step)[0][0] // 2 for step in range(310)]
    # t = step + 1 and 300 // 6 = 50 steps a stage, as the authors count
    assert found == [5] * 49 + [4] * 50 + [3] * 50 + [2] * 50 + [1] * 50 + [0] * 61
    assert lengths(uft, 0, tokens=4) == [(3,) * 4]  # three tokens before the end are three chunks


def test_uft_r3_hints_are_uniform_to_the_end():
    uft = method("uft", hints="uniform", hint_coefficient=0.0)
    chunks = [row[0] // 2 for row in lengths(uft, 400, names=[f"q{i}" for i in range(6000)])]
    assert [chunks.count(k) / 6000 for k in range(6)] == pytest.approx([1 / 6] * 6, abs=0.02)


def test_uft_reads_hints_and_learns_them_once():
    rl = {"entropy_coefficient": 0.1, "kl_coefficient": 0.2}
    uft = method("uft", rl=rl, hint_coefficient=0.5)
    assert uft.needs_demonstrations
    assert uft.needs_reference
    phase = uft.next_phase()
    assert (phase.name, phase.prompts, phase.rollouts) == ("mixed", 2, 4)
    groups = [begun(group("a", 1, of=4), 2, 2, 2, 2), group("b", 0, of=4)]
    [update] = uft.updates(phase, groups)
    assert uft.step == 1
    assert {t.name: t.coefficient for t in update.terms} == {"pg": 1.0, "kl": 0.2, "ent": 0.1, "ce": 0.5}
    assert [s.prompt_ids for s in update.sequences] == [(1, 2, 7, 8)] * 4 + [(1, 2)] * 5
    assert [s.response_ids for s in update.sequences][:5] == [(5,) * n for n in (3, 4, 5, 6, 3)]
    assert weights(update, "pg") == [0.75, -0.25, -0.25, -0.25, 0.0, 0.0, 0.0, 0.0, None]
    assert weights(update, "ce") == [None] * 8 + [1.0]
    assert weights(update, "kl") == weights(update, "ent") == [1.0] * 8 + [None]
    hint = update.sequences[8]
    assert (hint.problem_id, hint.response_ids, hint.sampler_logprobs) == ("a", (7, 8), None)
    assert (denominator(update, "pg"), denominator(update, "ce")) == (36, 2)
    assert all(len(s.sampler_logprobs) == len(s.response_ids) for s in update.sequences[:8])
    assert demonstrated([update]) == ["a"]


def test_uft_without_hints_is_rl():
    uft, grpo = method("uft"), method("grpo")
    groups = [group("a", 1, of=4), group("b", 2, of=4)]
    assert uft.updates(uft.next_phase(), groups) == grpo.updates(grpo.next_phase(), groups)
    r3 = method("uft", hints="uniform", hint_coefficient=0.0)
    [update] = r3.updates(r3.next_phase(), [begun(group("a", 1, of=4), 2, 2, 2, 2)])
    assert [t.name for t in update.terms] == ["pg"]
    assert demonstrated([update]) == ["a"]  # shown, though not learned


def test_uft_splits_groups_and_hints_alike():
    uft = method("uft", rl={"updates_per_step": 2})
    groups = [begun(group(name, 1, of=4), 2, 2, 2, 2) for name in "ab"]
    updates = uft.updates(uft.next_phase(), groups)
    assert [[s.problem_id for s in u.sequences] for u in updates] == [["a"] * 5, ["b"] * 5]


# --- Prefix-RFT -----------------------------------------------------------------------------------------------------


def test_prefix_rft_one_hybrid_of_a_length_between_low_and_high():
    prefix = method("prefix_rft", prefix_decay_steps=10)
    names = [f"q{i}" for i in range(2000)]
    for step, low in [(0, 0.95), (5, 0.5), (10, 0.05), (99, 0.05)]:
        prefix.step = step
        assert prefix.progress() == {"prefix_low": pytest.approx(low)}
        phase = prefix.next_phase()
        rows = [phase.prefixes(name, 1001) for name in names]
        assert all(row[:3] == (0, 0, 0) for row in rows)
        found = [row[3] / 1001 for row in rows]
        assert min(found) >= low - 1 / 1001
        assert max(found) <= 0.95
        assert sum(found) / 2000 == pytest.approx((low + 0.95) / 2, abs=5 * (0.95 - low) / math.sqrt(12 * 2000) + 1e-3)
    assert phase.prefixes("q", 2) == (0, 0, 0, 1)  # never nothing, never all
    assert method("prefix_rft").next_phase().prefixes("q", 40) == (0, 0, 0, 38)


def test_prefix_rft_shares_one_mean_and_one_denominator():
    prefix = method("prefix_rft", rl={"entropy_coefficient": 0.1})
    groups = [begun(group("a", 1, of=4), 0, 0, 0, 2), begun(group("b", 0, of=4), 0, 0, 0, 1)]
    groups[0] = replace(groups[0], rewards=(1.0, 0.0, 0.0, 1.0))
    [update] = prefix.updates(prefix.next_phase(), groups)
    assert weights(update, "pg") == [0.5, -0.5, -0.5, 0.5, 0.0, 0.0, 0.0, 0.0]
    assert [s.prefix_tokens for s in update.sequences] == [0, 0, 0, 2, 0, 0, 0, 1]
    assert update.sequences[3].response_ids == (7, 8) + (5,) * 6
    assert len(update.sequences[3].sampler_logprobs) == 6
    pg, ent = update.terms
    assert (pg.select, pg.span, pg.uses_old_policy) == (TopPrefixEntropy(fraction=0.2), "response", True)
    assert (ent.select, ent.span) == (None, "response")
    assert denominator(update, "pg") == denominator(update, "ent") == 2 * 18 + 3  # prefix tokens with the others
    assert demonstrated([update]) == ["a", "b"]
    quiet = replace(
        update, terms=(pg,), sequences=tuple(replace(s, weights={"pg": s.weights["pg"]}) for s in update.sequences)
    )
    assert live_sequences(quiet) == [0, 1, 2, 3]


@pytest.mark.parametrize(("form", "rest"), [("dr_grpo_prefix", 1.0), ("dr_grpo_prefix_v2", 0.0)])
def test_prefix_rft_with_another_baseline_weighs_the_parts_apart(form, rest):
    prefix = method("prefix_rft", advantage=form)
    made = replace(begun(group("a", 1, of=4), 0, 0, 0, 2), rewards=(1.0, 0.0, 0.0, 1.0))
    [update] = prefix.updates(prefix.next_phase(), [made])
    assert weights(update, "pg")[3] == (pytest.approx(2 / 3),) * 2 + (rest,) * 6


def test_prefix_rft_settings_reach_its_terms():
    prefix = method(
        "prefix_rft", prefix_token_fraction=1.0, entropy_span="continuation", rl={"entropy_coefficient": 0.1}
    )
    [update] = prefix.updates(prefix.next_phase(), [begun(group("a", 1, of=4), 0, 0, 0, 2)])
    pg, ent = update.terms
    assert (pg.select, ent.span) == (None, "continuation")
    assert (denominator(update, "pg"), denominator(update, "ent")) == (20, 18)


# --- BREAD ----------------------------------------------------------------------------------------------------------


def searched(success, *, tokens=21, episodes=10, low=0.0, high=0.8):
    """(prefixes tried in turn, prefix learned from) for a question with this success at each prefix length."""
    search = Search(method("bread", episodes=episodes, success_low=low, success_high=high).search.method, 100)
    base = replace(group("q", 0, of=10), demonstration_ids=tuple(range(100, 100 + tokens)))

    def sampled(prefix):
        correct = round(10 * success(prefix))
        return begun(replace(group("q", correct, of=10), demonstration_ids=base.demonstration_ids), *[prefix] * 10)

    groups, tried = [sampled(0)], []
    while retries := search(groups):
        [retry] = retries
        assert retry.problem_id == "q"
        tried.append(retry.prefix_tokens)
        groups.append(sampled(retry.prefix_tokens))
    [chosen] = search.chosen(groups[:1], groups[1:])
    return tried, chosen.rollouts[0].prefix_tokens


def test_bread_searches_the_shortest_prefix_in_the_band():
    assert searched(lambda prefix: 0.5) == ([], 0)  # in the band from the start
    assert searched(lambda prefix: 1.0) == ([], 0)  # too easy: no worse for it
    assert searched(lambda prefix: 0.3 if prefix else 0.0) == ([10, 4, 2], 2)
    assert searched(lambda prefix: 0.3 if prefix >= 13 else 0.0) == ([10, 14, 12], 14)
    assert searched(lambda prefix: 0.0) == ([10, 14, 16, 18], 0)  # none helps: the failed group stays
    assert searched(lambda prefix: float(prefix >= 7)) == ([10, 4, 6, 8], 0)  # from nothing to everything: no band


def test_bread_prefers_the_shorter_of_two_in_the_band():
    tried, chosen = searched(lambda prefix: {10: 0.7, 4: 0.0, 6: 0.2}.get(prefix, 0.0))
    assert (tried, chosen) == ([10, 4, 6], 6)


def test_bread_bands_and_short_demonstrations():
    assert searched(lambda prefix: 0.2 if prefix < 10 else 0.6, low=0.2)[1] == 10
    assert searched(lambda prefix: 0.9 if prefix else 0.0)[1] == 0
    assert searched(lambda prefix: 0.9 if prefix else 0.0, high=0.9)[1] == 2
    assert searched(lambda prefix: 0.5 if prefix else 0.0, tokens=4) == ([1], 1)  # three pieces of one token
    assert searched(lambda prefix: 0.5 if prefix else 0.0, tokens=2) == ([], 0)  # nothing between nothing and all


def test_bread_learns_from_the_groups_it_found():
    bread = method("bread", rl={"prompts_per_step": 3})
    phase = bread.next_phase()
    assert (phase.name, phase.prompts, phase.rollouts, phase.retries) == ("mixed", 3, 4, bread.search)
    first = [group("a", 2, of=4), group("b", 0, of=4), group("c", 0, of=4)]
    again = [begun(group("b", 1, of=4), 2, 2, 2, 2), begun(group("c", 4, of=4), 2, 2, 2, 2)]
    [update] = bread.updates(phase, first + again)
    assert [s.problem_id for s in update.sequences] == ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    assert weights(update, "pg") == [0.5, 0.5, -0.5, -0.5, 0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    assert [s.hint_tokens for s in update.sequences] == [0] * 4 + [2] * 4 + [0] * 4
    assert update.sequences[4].prompt_ids == (1, 2, 7, 8)
    assert denominator(update, "pg") == 54  # continuations only; groups that lost their place are not there
    assert demonstrated([update]) == ["b"]


def test_bread_one_question_twice_in_a_step_takes_one_group():
    bread = method("bread")
    found = begun(group("a", 1, of=4), 2, 2, 2, 2)
    [update] = bread.updates(bread.next_phase(), [group("a", 0, of=4), group("a", 0, of=4), found])
    assert [s.hint_tokens for s in update.sequences] == [2] * 4 + [0] * 4


# --- SASR -----------------------------------------------------------------------------------------------------------


def taken(*norms):
    """What the engine says of steps with these gradient norms."""
    return [Taken(grad_norm=norm, losses={}) for norm in norms]


def sasr_steps(sasr, count, norm=lambda step: 2.0):
    """The kinds of so many steps; SFT updates have the norm that `norm` gives."""
    seen = ""
    for _ in range(count):
        phase = sasr.next_phase()
        seen += {"sft": "s", "rl": "r"}[phase.name]
        rollouts = [group("a", 1, of=4)] if phase.name == "rl" else [group("a", 0, of=0)]
        step = sasr.step
        assert len(sasr.updates(phase, rollouts)) == 1
        sasr.learned(phase, taken(norm(step)))
    return seen


def test_sasr_warms_up_and_then_draws_by_the_norms():
    sasr = method("sasr", warmup_steps=3, sft_batch_size=5)
    phase = sasr.next_phase()
    assert (phase.name, phase.optimizer, phase.prompts, phase.rollouts, phase.reference) == ("sft", "sft", 5, 0, None)
    assert not phase.metered
    assert sasr_steps(sasr, 3, norm=lambda step: 4.0 - step) == "sss"
    assert sasr.progress() == {"sft_probability": 0.5, "warm_norm": 2.0, "last_norm": 2.0}
    assert sasr.next_phase().reference == "warm"
    seen = sasr_steps(sasr, 400, norm=lambda step: 6.0)
    assert seen.count("s") / 400 == pytest.approx(6 / (6 + 2), abs=0.1)  # G_last = 6, G_warm stays 2
    assert sasr.progress()["warm_norm"] == 2.0
    assert sasr.progress()["sft_probability"] == 0.75


def test_sasr_rl_steps_and_skipped_updates_leave_the_norm():
    sasr = method("sasr", warmup_steps=1, gamma=3.0)
    sasr.learned(sasr.next_phase(), [])  # not taken
    assert sasr.progress() == {"sft_probability": 1.0}
    sasr_steps(sasr, 1)
    rl = replace(sasr.next_phase(), name="rl")
    sasr.learned(rl, taken(99.0))
    assert sasr.progress() == {"sft_probability": 0.25, "warm_norm": 2.0, "last_norm": 2.0}
    sasr.learned(replace(rl, name="sft"), taken(5.0, 4.0))  # of several updates the last
    assert sasr.progress() == {"sft_probability": 0.4, "warm_norm": 2.0, "last_norm": 4.0}


def test_sasr_learns_from_the_first_sft_update_where_the_warm_up_took_none():
    sasr = method("sasr", warmup_steps=1)
    sasr.updates(sasr.next_phase(), [group("a", 0, of=0)])
    assert sasr.next_phase().name == "sft"
    sasr.learned(sasr.next_phase(), taken(3.0))
    assert sasr.progress()["sft_probability"] == 0.5
    sasr.learned(replace(sasr.next_phase(), name="sft"), taken(0.0))
    assert sasr.progress()["sft_probability"] == 0.0


def test_sasr_kinds_depend_on_the_seed_and_survive_a_checkpoint():
    first, second = method("sasr", warmup_steps=2), method("sasr", warmup_steps=2)
    start = sasr_steps(first, 7)
    second.load_state_dict(first.state_dict())
    rest = sasr_steps(first, 30)
    assert sasr_steps(second, 30) == rest
    other = method("sasr", warmup_steps=2)
    other.seed = 1
    assert sasr_steps(other, 37) != start + rest


@pytest.mark.parametrize("name", ["uft", "prefix_rft", "bread"])
def test_a_step_whose_rollouts_failed_has_no_updates(name):
    one = method(name)
    assert one.updates(one.next_phase(), ()) == []


@pytest.mark.parametrize("name", ["uft", "prefix_rft"])
def test_state_is_the_step(name):
    first, second = method(name), method(name)
    for _ in range(3):
        first.updates(first.next_phase(), ())
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict() == {"step": 3}
    assert second.next_phase() == first.next_phase()
