import pytest

from mifo.core.buffer import QuestionBuffer
from mifo.errors import ConfigError
from mifo.types import Demonstration


def demo(name):
    return Demonstration(problem_id=name, prompt_ids=(1, 2), response_ids=(3, 4))


def ids(demonstrations):
    return [d.problem_id for d in demonstrations]


def test_first_in_first_out_without_repetitions():
    buffer = QuestionBuffer(3)
    assert [buffer.add(demo(n)) for n in "abab"] == [True, True, False, False]
    assert not buffer.full
    for name in "cd":
        buffer.add(demo(name))
    assert buffer.full
    assert ids(buffer.take(3)) == ["a", "b", "c"]
    assert ids(buffer.take()) == ["d"]
    assert buffer.take() == []
    assert buffer.add(demo("a"))  # consumed questions may come again


def test_lifo_takes_the_newest():
    buffer = QuestionBuffer(2, "lifo")
    for name in "abc":
        buffer.add(demo(name))
    assert ids(buffer.take(2)) == ["c", "b"]
    assert ids(buffer.take()) == ["a"]


def test_state_keeps_order():
    buffer = QuestionBuffer(5)
    for name in "zya":
        buffer.add(demo(name))
    other = QuestionBuffer(5)
    other.load_state_dict(buffer.state_dict())
    assert list(other) == list(buffer)


@pytest.mark.parametrize("wrong", [(0, "fifo"), (4, "newest")])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match="QuestionBuffer"):
        QuestionBuffer(*wrong)
