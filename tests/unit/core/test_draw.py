"""Random numbers that are functions of what they are for."""

from mifo.core.draw import unit


def test_it_is_the_same_everywhere_and_for_ever():
    assert unit(0, "prefix", 3, "p1") == 0.5612911858669092
    assert unit(0, "prefix", 3, "p1") == unit(0, "prefix", 3, "p1")


def test_every_part_of_the_key_counts():
    keys = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a", "1"), (0, "a1"), ("0", "a", 1)]
    assert len({unit(*key) for key in keys}) == len(keys)


def test_it_is_uniform():
    drawn = sorted(unit(7, "x", i) for i in range(4000))
    assert drawn[0] >= 0.0
    assert drawn[-1] < 1.0
    # Kolmogorov–Smirnov: 1.95/√n is passed by chance once in a thousand keys, and the keys are fixed
    assert max(abs((i + 1) / 4000 - value) for i, value in enumerate(drawn)) < 1.95 / 4000**0.5
