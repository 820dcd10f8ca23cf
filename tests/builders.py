"""Sequences made on the spot."""

from __future__ import annotations

import random

from mifo.types import Sequence


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
