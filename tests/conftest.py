"""Shared builders: tiny models, sequences and updates, made on the spot."""

from __future__ import annotations

import random

import pytest
import torch

from mifo.train.model import tiny_model
from mifo.types import Sequence


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model():
    """A random two-layer Qwen2 in fp32."""
    return tiny_model(seed=0)


def make_sequences(lengths, *, vocabulary, terms=("pg",), group=1, seed=0, prompt_length=5):
    """Sequences of the given response lengths; `group` neighbours share a prompt; weights are random."""
    draw = random.Random(seed)
    sequences = []
    prompt = ()
    for i, length in enumerate(lengths):
        if i % group == 0:
            prompt = tuple(draw.randrange(vocabulary) for _ in range(prompt_length + i % 3))
        response = tuple(draw.randrange(vocabulary) for _ in range(length))
        sequences.append(
            Sequence(
                problem_id=f"p{i // group}",
                prompt_ids=prompt,
                response_ids=response,
                weights={name: draw.gauss(0, 1) for name in terms},
                sampler_logprobs=tuple(-draw.random() - 0.1 for _ in response),
            )
        )
    return sequences
