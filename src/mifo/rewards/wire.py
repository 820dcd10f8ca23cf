"""Messages between the grader and its workers: a length of four bytes (big-endian), then that many bytes of JSON."""

from __future__ import annotations

import json
import struct
from typing import Any

_LENGTH = struct.Struct(">I")
MAX_BYTES = 1 << 20
"""Longest message; a comparison of two texts of 2,000 characters has 60 kB at most, a reply 100 bytes."""


def pack(message: dict[str, Any]) -> bytes:
    """A message as it travels. ASCII, so that no text, not even a lone surrogate, is beyond it."""
    body = json.dumps(message).encode("ascii")
    return _LENGTH.pack(len(body)) + body


def unpack(buffer: bytearray) -> dict[str, Any] | None:
    """Takes the first whole message out of `buffer`; None while it is incomplete. Raises ValueError on nonsense."""
    if len(buffer) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(buffer)
    if length > MAX_BYTES:
        raise ValueError(f"a message of {length} bytes")
    end = _LENGTH.size + length
    if len(buffer) < end:
        return None
    try:
        message = json.loads(bytes(buffer[_LENGTH.size : end]))
    except RecursionError as error:  # "[" a million times
        raise ValueError("a message nested too deep") from error
    del buffer[:end]
    if not isinstance(message, dict):
        raise ValueError("a message that is no object")
    return message
