"""The buffer against a plain list, over any sequence of operations."""

from hypothesis import given
from hypothesis import strategies as st

from mifo.core.buffer import QuestionBuffer
from mifo.types import Demonstration

NAMES = st.sampled_from("abcdefgh")
STEPS = st.lists(st.one_of(NAMES, st.none(), st.integers(0, 5)), max_size=40)


def demonstration(name, number):
    return Demonstration(problem_id=name, prompt_ids=(1,), response_ids=(number + 1,))


@given(STEPS, st.integers(1, 6), st.sampled_from(["fifo", "lifo"]), st.booleans())
def test_equals_a_list_without_repetitions(steps, capacity, order, stored):
    """A name adds, a number takes so many, None takes all; the first demonstration of a waiting problem stays."""
    buffer, model = QuestionBuffer(capacity, order), []
    for number, step in enumerate(steps):
        if isinstance(step, str):
            known = step in [d.problem_id for d in model]
            assert buffer.add(demonstration(step, number)) is not known
            if not known:
                model.append(demonstration(step, number))
        else:
            arranged = model if order == "fifo" else model[::-1]
            expected = arranged if step is None else arranged[:step]
            assert buffer.take(step) == expected
            model = [d for d in model if d not in expected]
        if stored:  # through a checkpoint
            state, buffer = buffer.state_dict(), QuestionBuffer(capacity, order)
            buffer.load_state_dict(state)
        assert list(buffer) == model
        assert buffer.full is (len(model) >= capacity)
