"""Random numbers without a generator: each is a function of what it is for, so there is no state to save."""

from __future__ import annotations

import hashlib

BITS = 53  # of a double's mantissa


def unit(*key: int | str) -> float:
    """A number in [0, 1), the same for the same key on every platform, and uniform over keys."""
    digest = hashlib.sha256(repr(key).encode("utf-8")).digest()
    return (int.from_bytes(digest[:8], "big") >> (64 - BITS)) / float(1 << BITS)
