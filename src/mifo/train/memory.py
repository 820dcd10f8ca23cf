"""Out of memory: how to tell, and how small the pieces of an update become after it.

The gradient does not depend on how an update is cut, so an update that did not fit is done again in smaller pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mifo.errors import DeviceError

# What torch says where it raises a plain RuntimeError: the CPU allocator, and cuBLAS when it makes its workspace.
_MESSAGES = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


class DoesNotFit(Exception):
    """Memory ran out on a micro-batch of `sequences` sequences that feeds `tokens` tokens."""

    def __init__(self, tokens: int, sequences: int) -> None:
        super().__init__(f"{tokens} tokens in {sequences} sequences")
        self.tokens = tokens
        self.sequences = sequences


@contextmanager
def fitting(tokens: int, sequences: int) -> Iterator[None]:
    """Around the passes of one micro-batch: running out of memory becomes `DoesNotFit`, other errors stay what they are."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFit(tokens, sequences) from error


def smaller_budget(budget: int, tokens: int, sequences: int) -> int:
    """The token budget after a micro-batch did not fit: half of what was tried.

    Args:
        budget: most tokens of a micro-batch so far.
        tokens: of the micro-batch that failed.
        sequences: in it.

    Raises:
        DeviceError: it held one sequence, which cannot be cut.
    """
    if sequences == 1:
        raise DeviceError(
            f"out of memory on a micro-batch of a single sequence of {tokens} tokens, which cannot be cut further "
            f"(train.micro_batch_tokens is down to {budget}). Set model.activation_checkpointing = true or model.compute = "
            "'bfloat16', lower rollout.max_response_tokens and data.max_demonstration_tokens, or use a device with more memory."
        )
    return max(1, min(budget, tokens) // 2)
