"""Sequences of an update into micro-batches of a token budget, prompts shared by a group held once.

A micro-batch is one row of tokens. Responses to the same prompt stand behind one copy of it and attend to it and to
themselves (`Branch`), so a group of eight costs one prompt, not eight; in exact arithmetic nothing else changes. The last
id of a response predicts nothing and is not fed.

Legend: N tokens fed, T response tokens (what is predicted), S sequences of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from mifo.types import Sequence


@dataclass(frozen=True, slots=True)
class Branch:
    """One prompt and the responses that continue it, as places in the row: (start, length) of what is fed."""

    prompt_start: int
    prompt_length: int
    responses: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward pass.

    `predictor_T[t]` is the row position whose hidden state predicts `target_T[t]`; `sequence_T[t]` numbers its sequence
    within `indices`, which holds positions in the update.
    """

    indices: tuple[int, ...]
    input_N: Tensor
    position_N: Tensor
    branches: tuple[Branch, ...]
    predictor_T: Tensor
    target_T: Tensor
    sequence_T: Tensor

    @property
    def tokens(self) -> int:
        """Tokens fed."""
        return int(self.input_N.numel())

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_N", "position_N", "predictor_T", "target_T", "sequence_T")
        }
        return MicroBatch(indices=self.indices, branches=self.branches, **moved)


def plan_micro_batches(
    sequences: SequenceOf[Sequence], budget_tokens: int, *, share_prompts: bool = True
) -> list[list[int]]:
    """Which sequences go together: groups stay together while they fit, in order of first appearance.

    Args:
        sequences: those of one update.
        budget_tokens: most tokens fed at once; a single longer sequence goes alone.
        share_prompts: count (and later feed) a prompt once for neighbours that have the same one.

    Returns:
        Positions in `sequences`, each exactly once.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, sequence in enumerate(sequences):
        by_prompt.setdefault(sequence.prompt_ids, []).append(index)
    batches: list[list[int]] = []
    current: list[int] = []
    used = 0
    for prompt, members in by_prompt.items():
        held = False
        for index in sorted(members, key=lambda i: len(sequences[i].response_ids)):
            own = len(sequences[index].response_ids) - 1
            cost = own if held and share_prompts else own + len(prompt)
            if current and used + cost > budget_tokens:
                batches.append(current)
                current, used, cost = [], 0, own + len(prompt)
            current.append(index)
            used += cost
            held = True
    if current:
        batches.append(current)
    return batches


def pack(sequences: SequenceOf[Sequence], indices: SequenceOf[int], *, share_prompts: bool = True) -> MicroBatch:
    """Lay the chosen sequences out in one row; neighbours in `indices` with the same prompt share it."""
    ids: list[int] = []
    positions: list[int] = []
    branches: list[Branch] = []
    predictors: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    place = 0
    while place < len(indices):
        prompt = sequences[indices[place]].prompt_ids
        end = place + 1
        while share_prompts and end < len(indices) and sequences[indices[end]].prompt_ids == prompt:
            end += 1
        prompt_start = len(ids)
        ids += prompt
        positions += range(len(prompt))
        responses = []
        for local in range(place, end):
            response = sequences[indices[local]].response_ids
            assert response
            assert prompt
            start = len(ids)
            ids += response[:-1]
            positions += range(len(prompt), len(prompt) + len(response) - 1)
            responses.append((start, len(response) - 1))
            predictors += [prompt_start + len(prompt) - 1, *range(start, start + len(response) - 1)]
            targets += response
            owners += [local] * len(response)
        branches.append(Branch(prompt_start, len(prompt), tuple(responses)))
        place = end
    return MicroBatch(
        indices=tuple(indices),
        input_N=torch.tensor(ids),
        position_N=torch.tensor(positions),
        branches=tuple(branches),
        predictor_T=torch.tensor(predictors),
        target_T=torch.tensor(targets),
        sequence_T=torch.tensor(owners),
    )
