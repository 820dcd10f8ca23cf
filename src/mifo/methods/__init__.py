"""Methods: one module each, and one line each in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mifo.config.schema import Config
from mifo.methods.base import Method
from mifo.methods.grpo import Grpo
from mifo.methods.mifo import Mifo
from mifo.methods.sft import Sft

METHODS: dict[str, Callable[[Any, Config], Method]] = {
    "grpo": Grpo,
    "mifo": Mifo,
    "sft": Sft,
}


def make_method(config: Config) -> Method:
    """The method that a checked configuration asks for."""
    return METHODS[config.method.name](config.method, config)


__all__ = ["METHODS", "Method", "make_method"]
