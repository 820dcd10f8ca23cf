"""Embedded problems: verifiable, generated, each with a short step-by-step demonstration that ends in a box.

Every family has a fixed pool of problems. A problem belongs to train, validation or test by a hash of its content
alone, so no seed or size makes two splits share one; a seed chooses which problems of the pool are taken and in which
order. Families with `in_training=False` are the "ood" split and nothing else.

    generate("train", 400, seed=1)                        every default training family, all levels
    generate("test", 60, families=("gcd",), max_level=2)
    generate("train", 100, families=("tiny",))            for a character-level model

The text of a problem does not ask for a box; put `INSTRUCTION` into the system turn for a model that has not learned
to give one. This module imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from types import MappingProxyType
from typing import Literal

from mifo.data.tasks import arithmetic, letters, tiny
from mifo.data.tasks.base import LEVELS, Draw, Family, Item, digest
from mifo.errors import DataError
from mifo.types import Message, Problem

__all__ = ["FAMILIES", "INSTRUCTION", "Family", "Split", "available", "generate"]

Split = Literal["train", "validation", "test", "ood"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test", "ood")
INSTRUCTION = "Solve the problem step by step. Give the final answer as \\boxed{answer}."
FAMILIES = MappingProxyType({f.name: f for f in (*arithmetic.FAMILIES, *letters.FAMILIES, *tiny.FAMILIES)})

_POOL_PER_LEVEL = 2000
_DRAWS_PER_LEVEL = 4 * _POOL_PER_LEVEL  # small levels are exhausted long before this


def generate(
    split: Split,
    count: int,
    *,
    seed: int = 0,
    families: tuple[str, ...] | None = None,
    max_level: int | None = None,
) -> list[Problem]:
    """`count` distinct problems of a split, dealt in turn over the families and, within one, over its levels.

    The result is a function of the arguments on every platform, and a longer list starts with the shorter one. Problem
    i is of family i mod len(families). `max_level` (1 to 3) leaves the harder levels out. Raises DataError for an
    unknown split, family or level, and when a family has fewer problems than its share of `count`.
    """
    chosen = _chosen_families(split, families)
    if count < 1:
        raise DataError(f"count = {count}: at least one problem is needed; ask for 1 or more")
    if max_level is not None and not 1 <= max_level <= LEVELS:
        raise DataError(
            f"max_level = {max_level} (data.levels): families have levels 1 to {LEVELS}; give one of them or none"
        )
    queues = [_ordered(family, split, seed, max_level or LEVELS) for family in chosen]
    most = _in_equal_shares(queues)
    if count > most:
        sizes = ", ".join(f"{family.name} {len(queue)}" for family, queue in zip(chosen, queues, strict=True))
        raise DataError(
            f"count = {count}: split {split!r} gives at most {most} problems in equal shares (there are {sizes}); "
            f"ask for {most} or fewer, or name other families"
        )
    return [queues[i % len(chosen)][i // len(chosen)] for i in range(count)]


def available(split: Split, *, families: tuple[str, ...] | None = None, max_level: int | None = None) -> int:
    """The largest `count` that `generate` accepts with these arguments."""
    return _in_equal_shares([_ordered(f, split, 0, max_level or LEVELS) for f in _chosen_families(split, families)])


def _in_equal_shares(queues: Sequence[Sequence[Problem]]) -> int:
    """How many problems can be dealt in turn until one family has none left."""
    return min(len(queue) * len(queues) + i for i, queue in enumerate(queues))


def _chosen_families(split: str, names: tuple[str, ...] | None) -> list[Family]:
    if split not in SPLITS:
        raise DataError(f"split = {split!r}: unknown; give one of {', '.join(SPLITS)}")
    fitting = [f for f in FAMILIES.values() if f.in_training == (split != "ood")]
    if names is None:
        return [f for f in fitting if f.default]
    allowed = ", ".join(f.name for f in fitting)
    if not names or len(set(names)) != len(names):
        raise DataError(f"families = {names!r}: empty, or a name is given twice; choose among {allowed}")
    for name in names:
        if name not in FAMILIES:
            raise DataError(f"families = {names!r}: {name!r} is unknown; split {split!r} has {allowed}")
        if FAMILIES[name] not in fitting:
            side = "kept out of training" if split != "ood" else "a training family, so not out of distribution"
            raise DataError(f"families = {names!r}: {name!r} is {side}; split {split!r} has {allowed}")
    return [FAMILIES[name] for name in names]


def _split_of(family: Family, canonical: str) -> Split:
    """80 % train, 10 % validation, 10 % test, by content alone."""
    if not family.in_training:
        return "ood"
    tenth = digest(f"split/{family.name}/{canonical}") % 10
    return "train" if tenth < 8 else "validation" if tenth == 8 else "test"


@cache
def _pool(name: str) -> dict[Split, tuple[tuple[Problem, ...], ...]]:
    """All problems of a family: split -> level -> problems. A text that two levels make belongs to the easier one."""
    family = FAMILIES[name]
    levels: dict[Split, list[list[Problem]]] = {split: [[] for _ in range(LEVELS)] for split in SPLITS}
    seen: set[str] = set()
    for level in range(1, LEVELS + 1):
        draw, kept = Draw(digest(f"pool/{name}/{level}")), 0
        for _ in range(_DRAWS_PER_LEVEL):
            item = family.draw(draw, level)
            if item.text in seen:
                continue
            seen.add(item.text)
            levels[_split_of(family, item.canonical)][level - 1].append(_problem(family, item))
            kept += 1
            if kept == _POOL_PER_LEVEL:
                break
    return {split: tuple(tuple(problems) for problems in by_level) for split, by_level in levels.items()}


def _problem(family: Family, item: Item) -> Problem:
    content = hashlib.sha256(f"{family.name}/{item.text}".encode()).hexdigest()
    return Problem(
        id=f"{family.name}-{content[:12]}",
        messages=(Message("user", item.text),),
        answer=item.answer,
        demonstration=item.demonstration,
        source=f"embedded/{family.name}",
        grader=family.grader,
    )


def _ordered(family: Family, split: Split, seed: int, max_level: int) -> list[Problem]:
    """A family's problems of a split in the order of this seed: levels in turn, each sorted by a seeded hash."""
    by_level = (
        sorted(problems, key=lambda problem: (digest(f"{seed}/{problem.id}"), problem.id))
        for problems in _pool(family.name)[split][:max_level]
    )
    return [problem for row in zip_longest(*by_level) for problem in row if problem is not None]
