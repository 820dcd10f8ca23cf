"""The sampler of problems: endless, seeded, one permutation an epoch, resumable to the exact problem.

A permutation is the problems sorted by a hash of (seed, epoch, id). It therefore depends on nothing but those: not on a
global random state, on the order of the file, or on the version of a library; and the whole state is one number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from mifo.errors import CheckpointError, DataError
from mifo.types import Problem


class ProblemStream:
    """Endless problems from a finite set. Each epoch is a fresh permutation and shows every problem once."""

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        """Raises DataError when there are no problems or two share an id."""
        if not problems:
            raise DataError("problems = (): a stream needs at least one problem; check the data file or the split")
        self._by_id = {problem.id: problem for problem in problems}
        if len(self._by_id) != len(problems):
            repeated = len(problems) - len(self._by_id)
            raise DataError(f"problems: {repeated} of {len(problems)} repeat an id of another; remove the repetitions")
        self._seed = seed
        self._position = 0  # problems taken since the start
        self._fingerprint = hashlib.sha256("\n".join(sorted(self._by_id)).encode("utf-8")).hexdigest()
        self._cached_epoch = -1
        self._order: list[str] = []

    def __len__(self) -> int:
        """Problems in one epoch."""
        return len(self._by_id)

    @property
    def position(self) -> int:
        """Problems taken since the start, over all epochs."""
        return self._position

    @property
    def epoch(self) -> int:
        """Epochs completed, which is the number of the epoch that the next problem comes from."""
        return self._position // len(self)

    def take(self, count: int) -> tuple[Problem, ...]:
        """The next `count` problems. A batch that spans an epoch's end may hold a problem of each of the two epochs."""
        assert count >= 0, f"count = {count} problems"
        taken = []
        for _ in range(count):
            epoch, index = divmod(self._position, len(self))
            taken.append(self._by_id[self._permutation(epoch)[index]])
            self._position += 1
        return tuple(taken)

    def _permutation(self, epoch: int) -> list[str]:
        if epoch != self._cached_epoch:

            def key(problem_id: str) -> bytes:
                return hashlib.sha256(f"{self._seed}/{epoch}/{problem_id}".encode()).digest()

            self._order, self._cached_epoch = sorted(self._by_id, key=key), epoch
        return self._order

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs, as plain JSON values."""
        return {"seed": self._seed, "position": self._position, "problems": len(self), "fingerprint": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. Raises CheckpointError for other problems, another seed, or a cut state."""
        missing = {"seed", "position", "problems", "fingerprint"} - set(state)
        if missing:
            raise CheckpointError(f"sampler state lacks {', '.join(sorted(missing))}; resume from another checkpoint")
        if state["fingerprint"] != self._fingerprint:
            raise CheckpointError(
                f"sampler state is of {state['problems']} other problems (this run has {len(self)}); resume with the "
                f"data the run started with"
            )
        if state["seed"] != self._seed:
            raise CheckpointError(
                f"sampler state has seed {state['seed']}, this run has {self._seed}; resume with the same seed"
            )
        self._position = int(state["position"])
