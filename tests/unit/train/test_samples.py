"""Which rollouts are shown of a step."""

import pytest

from mifo.train.samples import chosen_places, sample_records
from mifo.types import Group, Message, Problem, Rollout, Verdict


def groups_of(*prefixes):
    """A group for each tuple, a rollout for each length of a prefix."""
    return [
        Group(
            problem=Problem(id=f"p{number}", messages=(Message("user", "1+1?"),), answer="2"),
            prompt_ids=(1,),
            rollouts=tuple(
                Rollout(token_ids=(7,) * 4, logprobs=(-1.0,) * (4 - n), stop="stop", weight_version=0, prefix_tokens=n)
                for n in lengths
            ),
            verdicts=(Verdict.WRONG,) * len(lengths),
            rewards=(0.0,) * len(lengths),
        )
        for number, lengths in enumerate(prefixes)
    ]


def shown(groups, wanted):
    return [(group.problem.id, i, group.rollouts[i].prefix_tokens > 0) for group, i in chosen_places(groups, wanted)]


def test_an_even_spread_by_hand():
    assert shown(groups_of((0,) * 4, (0,) * 4), 4) == [
        ("p0", 0, False),
        ("p0", 2, False),
        ("p1", 0, False),
        ("p1", 2, False),
    ]
    assert shown(groups_of((0,) * 3), 9) == [("p0", 0, False), ("p0", 1, False), ("p0", 2, False)]
    assert shown(groups_of((0,) * 3), 0) == []
    assert shown(groups_of((), ()), 4) == []


def test_the_stride_of_a_group_misses_no_kind():
    """The hybrid is the last of each group of four: a stride of four would never show one."""
    groups = groups_of(*[(0, 0, 0, 2)] * 4)
    assert [hybrid for *_, hybrid in shown(groups, 4)] == [False, False, False, True]
    assert {group for group, *_ in shown(groups, 4)} == {"p0", "p1", "p2"}
    assert {hybrid for *_, hybrid in shown(groups_of(*[(2, 2, 2, 0)] * 4), 4)} == {False, True}


@pytest.mark.parametrize("wanted", [1, 2, 3, 5, 16, 40])
@pytest.mark.parametrize("place", range(3))
def test_both_kinds_wherever_they_are(wanted, place):
    """One rollout in twelve is of the other kind, either way round; never fewer than wanted, and more only of two kinds."""
    for one, other in ((0, 1), (1, 0)):
        lengths = [[one] * 3 for _ in range(4)]
        lengths[2][place] = other
        chosen = shown(groups_of(*map(tuple, lengths)), wanted)
        assert {hybrid for *_, hybrid in chosen} == {False, True}
        assert len(chosen) == len(set(chosen)) == max(2, min(wanted, 12))
        assert chosen == sorted(chosen)


def test_a_record_says_where_its_prefix_ends():
    [record, _] = sample_records(groups_of((0, 3)), 4, lambda ids: "x" * len(ids))
    assert record["prefix_tokens"] == 0
    [_, record] = sample_records(groups_of((0, 3)), 4, lambda ids: "x" * len(ids))
    assert (record["prefix_tokens"], record["response"], record["tokens"], record["problem"]) == (3, "xxxx", 4, "p0")
