"""The turn of the loop under way, as far as a stop in its middle must not lose it.

Rollouts are the dearest part of a turn, and once an optimizer step of it is taken the turn can no longer be begun again. Both are
therefore part of the state: a run that is resumed in the middle of a turn takes the stored rollouts, lets the method make its
updates from them again, skips those already applied, and gives the others the old log-probs they had.

Where a second model scores the rollouts, its scores and the updates it has made are part of the turn too.

Token ids and log-probs go to tensors (log-probs as doubles, so that every bit stays); the rest is plain data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from mifo.train.faults import Fault, Sample
from mifo.train.tally import UpdateReport
from mifo.types import Group, Rollout, Update, Verdict

OldLogprobs = tuple[tuple[float, ...], ...]
MakeGroup = Callable[[str, Sequence[Rollout], Sequence[Verdict]], Group]


@dataclass(slots=True)
class Turn:
    """A turn whose groups are collected.

    `method` is the state of the method before it saw them. `old_logprobs` are those of each update, None before they are
    known; `reports` those of the updates applied. `scored`: the groups have their scores; `lessons`: reports of the scorer's
    updates applied.
    """

    groups: tuple[Group, ...]
    method: Mapping[str, Any]
    old_logprobs: tuple[OldLogprobs | None, ...] | None = None
    reports: list[UpdateReport] = field(default_factory=list)
    scored: bool = False
    lessons: list[UpdateReport] = field(default_factory=list)

    def prepared(self, updates: Sequence[Update], with_old_policy: Callable[[Update], Update]) -> list[Update]:
        """The updates with their old log-probs; those of the first are its own current ones. π_old is the policy before any."""
        if self.old_logprobs is None:
            ready = [update if i == 0 else with_old_policy(update) for i, update in enumerate(updates)]
            self.old_logprobs = tuple(update.old_logprobs for update in ready)
            return ready
        return [replace(u, old_logprobs=old) for u, old in zip(updates, self.old_logprobs, strict=True)]

    def tensors(self) -> dict[str, Tensor]:
        """Token ids, log-probs, lengths, prefixes and scores of all rollouts, and old log-probs of each update that has them."""
        rollouts = [r for group in self.groups for r in group.rollouts]
        stored = {
            "tokens": torch.tensor(list(chain.from_iterable(r.token_ids for r in rollouts)), dtype=torch.int64),
            "logprobs": torch.tensor(list(chain.from_iterable(r.logprobs for r in rollouts)), dtype=torch.float64),
            "lengths": torch.tensor([len(r.token_ids) for r in rollouts], dtype=torch.int64),
            "prefixes": torch.tensor([r.prefix_tokens for r in rollouts], dtype=torch.int64),
        }
        if self.scored:
            scores = (row for group in self.groups for row in group.scores or ())
            stored["scores"] = torch.tensor(list(chain.from_iterable(scores)), dtype=torch.float64)
        for i, old in enumerate(self.old_logprobs or ()):
            if old is not None:
                stored[f"old.{i}"] = torch.tensor(list(chain.from_iterable(old)), dtype=torch.float64)
                stored[f"old_lengths.{i}"] = torch.tensor([len(row) for row in old], dtype=torch.int64)
        return stored

    def state_dict(self) -> dict[str, Any]:
        """Everything but the tensors."""
        return {
            "groups": [
                {
                    "problem": group.problem.id,
                    "verdicts": [v.value for v in group.verdicts],
                    "stops": [r.stop for r in group.rollouts],
                    "versions": [r.weight_version for r in group.rollouts],
                }
                for group in self.groups
            ],
            "updates": None if self.old_logprobs is None else len(self.old_logprobs),
            "reports": [asdict(report) for report in self.reports],
            "scored": self.scored,
            "lessons": [asdict(report) for report in self.lessons],
        }


def load_turn(
    state: Mapping[str, Any], tensors: Mapping[str, Tensor], method: Mapping[str, Any], make_group: MakeGroup
) -> Turn:
    """What `state_dict` and `tensors` gave.

    Args:
        state: plain data.
        tensors: the tensors.
        method: state of the method before the turn.
        make_group: a group from a problem's id, its rollouts and their verdicts.
    """
    tokens = _rows(tensors["tokens"], tensors["lengths"])
    logprobs = _rows(tensors["logprobs"], tensors["lengths"] - tensors["prefixes"])
    prefixes = iter(tensors["prefixes"].tolist())
    scores = _rows(tensors["scores"], tensors["lengths"]) if state["scored"] else None
    groups = []
    for entry in state["groups"]:
        rollouts = [
            Rollout(
                token_ids=next(tokens),
                logprobs=next(logprobs),
                stop=stop,
                weight_version=version,
                prefix_tokens=next(prefixes),
            )
            for stop, version in zip(entry["stops"], entry["versions"], strict=True)
        ]
        group = make_group(entry["problem"], rollouts, [Verdict(v) for v in entry["verdicts"]])
        groups.append(group if scores is None else replace(group, scores=tuple(next(scores) for _ in rollouts)))
    old: tuple[OldLogprobs | None, ...] | None = None
    if state["updates"] is not None:
        old = tuple(
            tuple(_rows(tensors[f"old.{i}"], tensors[f"old_lengths.{i}"])) if f"old.{i}" in tensors else None
            for i in range(state["updates"])
        )
    reports, lessons = ([_report(report) for report in state[name]] for name in ("reports", "lessons"))
    return Turn(tuple(groups), method, old, reports, bool(state["scored"]), lessons)


def _report(plain: Mapping[str, Any]) -> UpdateReport:
    fault = plain["fault"]
    if fault is not None:
        fault = Fault(**{**fault, "samples": tuple(Sample(**sample) for sample in fault["samples"])})
    return UpdateReport(**{**plain, "fault": fault})


def _rows(values: Tensor, lengths: Tensor) -> Iterator[tuple[Any, ...]]:
    flat, ends = values.tolist(), list(accumulate(lengths.tolist()))
    return (tuple(flat[start:end]) for start, end in zip([0, *ends], ends, strict=False))
