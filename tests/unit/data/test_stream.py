"""The sampler: every problem once an epoch, exact resume, nothing taken from a global random state."""

import json
import random

import pytest

from mifo.data.stream import ProblemStream
from mifo.errors import CheckpointError, DataError
from mifo.types import Message, Problem


def some(count, prefix="p"):
    return [Problem(id=f"{prefix}{i}", messages=(Message("user", str(i)),), answer=str(i)) for i in range(count)]


def ids(problems):
    return [p.id for p in problems]


def test_an_epoch_shows_every_problem_once_whatever_the_batch_size():
    whole = ids(ProblemStream(some(7), seed=0).take(21))
    for epoch in range(3):
        assert sorted(whole[7 * epoch : 7 * epoch + 7]) == sorted(ids(some(7)))
    stream, pieces = ProblemStream(some(7), seed=0), []
    for size in (3, 5, 1, 12):  # batches that straddle the end of an epoch
        pieces += ids(stream.take(size))
    assert pieces == whole


def test_epochs_and_seeds_differ():
    stream = ProblemStream(some(30), seed=0)
    first, second = ids(stream.take(30)), ids(stream.take(30))
    assert first != second
    assert first != ids(ProblemStream(some(30), seed=1).take(30))
    assert first != ids(some(30))


def test_the_epoch_property_counts_completed_epochs():
    stream = ProblemStream(some(4), seed=0)
    seen = []
    for _ in range(9):
        seen.append(stream.epoch)
        stream.take(1)
    assert seen == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert stream.position == 9


@pytest.mark.parametrize("before", [0, 3, 5, 6, 11])
def test_resume_is_exact_and_passes_through_json(before):
    stream = ProblemStream(some(5), seed=4)
    stream.take(before)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = ids(stream.take(13))
    resumed = ProblemStream(some(5), seed=4)
    resumed.take(2)
    resumed.load_state_dict(state)
    assert ids(resumed.take(13)) == expected


def test_independent_of_the_global_generator_and_of_the_order_of_the_file():
    random.seed(1)
    first = ids(ProblemStream(some(20), seed=0).take(20))
    random.seed(2)
    before = random.getstate()
    assert ids(ProblemStream(some(20)[::-1], seed=0).take(20)) == first
    assert random.getstate() == before


def test_a_state_of_other_problems_or_another_seed_is_refused():
    state = ProblemStream(some(5), seed=4).state_dict()
    with pytest.raises(CheckpointError, match="5 other problems"):
        ProblemStream(some(5, "q"), seed=4).load_state_dict(state)
    with pytest.raises(CheckpointError, match="seed 4, this run has 5"):
        ProblemStream(some(5), seed=5).load_state_dict(state)
    with pytest.raises(CheckpointError, match="lacks position"):
        ProblemStream(some(5), seed=4).load_state_dict({k: v for k, v in state.items() if k != "position"})


def test_no_problems_and_repeated_ids_are_errors():
    with pytest.raises(DataError, match="at least one"):
        ProblemStream([], seed=0)
    with pytest.raises(DataError, match="1 of 4 repeat"):
        ProblemStream([*some(3), some(1)[0]], seed=0)
