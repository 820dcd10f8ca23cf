import pytest
from builders import make_sequences
from hypothesis import given
from hypothesis import strategies as st

from mifo.data.pack import pack, plan_micro_batches


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 4), st.integers(1, 120))
def test_each_sequence_goes_exactly_once_and_budgets_hold(lengths, group, budget):
    sequences = make_sequences(lengths, vocabulary=50, group=group)
    plans = plan_micro_batches(sequences, budget)
    assert sorted(i for plan in plans for i in plan) == list(range(len(lengths)))
    for plan in plans:
        batch = pack(sequences, plan)
        assert batch.tokens <= budget or len(plan) == 1
        assert len(batch.target_T) == sum(lengths[i] for i in plan)


def test_a_group_shares_its_prompt():
    sequences = make_sequences([3, 2, 4], vocabulary=50, group=3, prompt_length=5)
    [plan] = plan_micro_batches(sequences, 1000)
    batch = pack(sequences, plan)
    assert batch.tokens == 5 + 1 + 2 + 3  # the prompt once, and of each response all but its last token
    [branch] = batch.branches
    assert branch.prompt_length == 5
    assert len(branch.responses) == 3


def test_layout_by_hand():
    one, two = make_sequences([2, 3], vocabulary=50, group=2, prompt_length=5)
    batch = pack([one, two], [0, 1])
    p, a, b = one.prompt_ids, one.response_ids, two.response_ids
    assert batch.input_N.tolist() == [*p, a[0], b[0], b[1]]
    assert batch.position_N.tolist() == [0, 1, 2, 3, 4, 5, 5, 6]
    assert batch.predictor_T.tolist() == [4, 5, 4, 6, 7]
    assert batch.target_T.tolist() == [*a, *b]
    assert batch.sequence_T.tolist() == [0, 0, 1, 1, 1]


def test_prompts_need_not_be_shared():
    sequences = make_sequences([3, 2], vocabulary=50, group=2, prompt_length=5)
    assert pack(sequences, [0, 1], share_prompts=False).tokens == 5 + 2 + 5 + 1
    with pytest.raises(AssertionError):
        pack(make_sequences([0], vocabulary=50), [0])
