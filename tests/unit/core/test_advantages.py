import pytest

from mifo.core.advantages import group_advantages


def test_centred_by_hand():
    assert group_advantages([1, 0, 0, 0], divide_by_std=False) == [0.75, -0.25, -0.25, -0.25]


def test_std_is_the_unbiased_one():
    assert group_advantages([1, 0, 0, 0], divide_by_std=True) == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    biased = 0.75 / 0.4330127
    assert group_advantages([1, 0, 0, 0], divide_by_std=True)[0] != pytest.approx(biased, rel=1e-2)


@pytest.mark.parametrize("rewards", [[0, 0, 0], [1, 1, 1], [0.1, 0.1, 0.1]])
def test_all_equal_groups_are_exact_zeros(rewards):
    for divide in (False, True):
        assert group_advantages(rewards, divide_by_std=divide) == [0.0, 0.0, 0.0]


def test_group_of_one_has_no_baseline():
    assert group_advantages([0.5], divide_by_std=True) == [0.5]
