"""mifo: supervised fine-tuning and reinforcement learning of language models together, without one erasing the other.

The names below are the building blocks of the method, free of this project's configuration and trainer: use them in any
PyTorch loop. They load torch only when they are first touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mifo.core.buffer import QuestionBuffer
    from mifo.core.freeze import ElementFreeze
    from mifo.core.importance import FreezeReport, ImportanceMap
    from mifo.core.logprobs import token_logprobs
    from mifo.core.select import top_entropy_tokens, top_entropy_weights
    from mifo.core.topk import Shards
    from mifo.types import Demonstration

__version__ = "0.1.0"

_HOMES = {
    "Demonstration": "mifo.types",
    "ElementFreeze": "mifo.core.freeze",
    "FreezeReport": "mifo.core.importance",
    "ImportanceMap": "mifo.core.importance",
    "QuestionBuffer": "mifo.core.buffer",
    "Shards": "mifo.core.topk",
    "token_logprobs": "mifo.core.logprobs",
    "top_entropy_tokens": "mifo.core.select",
    "top_entropy_weights": "mifo.core.select",
}

__all__ = [
    "Demonstration",
    "ElementFreeze",
    "FreezeReport",
    "ImportanceMap",
    "QuestionBuffer",
    "Shards",
    "__version__",
    "token_logprobs",
    "top_entropy_tokens",
    "top_entropy_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mifo' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
