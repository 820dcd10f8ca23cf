"""Packing is a partition that keeps every token: what the row, its positions and its branches say is the update itself."""

from hypothesis import given
from hypothesis import strategies as st

from mifo.data.pack import pack, plan_micro_batches
from mifo.types import Sequence

IDS = st.integers(0, 9)
PROMPTS = st.lists(st.lists(IDS, min_size=1, max_size=6).map(tuple), min_size=1, max_size=3)
RESPONSE = st.lists(IDS, min_size=1, max_size=12).map(tuple)


@st.composite
def updates(draw):
    """Sequences of a few prompts in any order, so that a group may come back after another."""
    prompts = draw(PROMPTS)
    rows = draw(st.lists(st.tuples(st.sampled_from(prompts), RESPONSE), min_size=1, max_size=12))
    return [Sequence(problem_id=str(i), prompt_ids=p, response_ids=r, weights={}) for i, (p, r) in enumerate(rows)]


@given(updates(), st.integers(1, 80), st.booleans())
def test_every_sequence_can_be_read_back_from_its_row(sequences, budget, share):
    plans = plan_micro_batches(sequences, budget, share_prompts=share)
    assert sorted(i for plan in plans for i in plan) == list(range(len(sequences)))
    for plan in plans:
        batch = pack(sequences, plan, share_prompts=share)
        assert batch.tokens <= budget or len(plan) == 1
        read = list(read_back(batch))
        assert read == [(sequences[i].prompt_ids, sequences[i].response_ids) for i in plan]
        assert batch.sequence_T.tolist() == [n for n, i in enumerate(plan) for _ in sequences[i].response_ids]


def read_back(batch):
    """(prompt, response) of each sequence, from the row; every predictor stands one position before what it predicts."""
    row, positions = batch.input_N.tolist(), batch.position_N.tolist()
    targets, predictors, place, used = batch.target_T.tolist(), batch.predictor_T.tolist(), 0, []
    for branch in batch.branches:
        span = range(branch.prompt_start, branch.prompt_start + branch.prompt_length)
        used += span
        assert [positions[i] for i in span] == list(range(branch.prompt_length))
        for start, fed in branch.responses:
            own = range(start, start + fed)
            used += own
            assert [positions[i] for i in own] == list(range(branch.prompt_length, branch.prompt_length + fed))
            response = targets[place : place + fed + 1]
            assert predictors[place : place + fed + 1] == [span[-1], *own]
            assert [row[i] for i in own] == response[:-1]
            yield tuple(row[i] for i in span), tuple(response)
            place += fed + 1
    assert sorted(used) == list(range(len(row)))  # the row is cut into these pieces, each once
    assert place == len(targets)


@given(updates(), st.integers(1, 80))
def test_sharing_prompts_saves_tokens_and_changes_no_target(sequences, budget):
    plan = [i for plan in plan_micro_batches(sequences, budget) for i in plan]
    shared, apart = pack(sequences, plan), pack(sequences, plan, share_prompts=False)
    assert shared.tokens <= apart.tokens
    assert shared.target_T.tolist() == apart.target_T.tolist()
    assert shared.position_N[shared.predictor_T].tolist() == apart.position_N[apart.predictor_T].tolist()
