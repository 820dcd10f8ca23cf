"""MIFO's importance map and the exact global top-k that freezes half of it (S0 §3.2, Algorithm 1).

    Δ = |θ_RL,end − θ_RL,start|      C̃ = α C + (1 − α) Δ      I = TopK(C̃, k·d)      C ← 1_I ⊙ C̃

Everything is fp32 whatever the parameters are. The mask is never stored: after the last step C is at least `FROZEN_FROM`
exactly on I, because an element that never moved is never frozen; `fill_ties` lifts that and then keeps the zeros it froze
apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mifo.core.blocks import blocks, count_from
from mifo.core.freeze import FROZEN_FROM
from mifo.core.topk import ONE_SHARD, Shards, check_orderable, find_top_k
from mifo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class FreezeReport:
    """What one selection froze: counts over all ranks, tied weights once."""

    elements: int
    moved: int
    frozen: int
    threshold: float

    @property
    def fraction(self) -> float:
        """Frozen share of all trainable elements."""
        return self.frozen / max(1, self.elements)


class ImportanceMap:
    """Which elements RL moved most, with a history over intervals.

    Call `begin_interval` where RL starts and `end_interval` where it ends; `masks()` then says what SFT must leave alone.
    Tied parameters count once. Works on the local tensors of a sharded model when `shards` says where they stand.

    Args:
        parameters: the trainable parameters.
        top: k, the share of all elements to freeze, in [0, 1].
        history: α, in [0, 1]; 0 keeps no history (the paper's MIFO†), 1 would never learn and is refused by the config.
        scope: "global" ranks all elements together, "tensor" takes the share of every tensor.
        fill_ties: freeze elements that never moved when fewer than k·d did.
        shards: this rank's place among ranks that hold pieces of each tensor.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        top: float = 0.5,
        history: float = 0.5,
        scope: Literal["global", "tensor"] = "global",
        fill_ties: bool = False,
        shards: Shards = ONE_SHARD,
    ) -> None:
        if not (0.0 <= top <= 1.0 and 0.0 <= history < 1.0) or scope not in ("global", "tensor"):
            raise ConfigError(
                f"ImportanceMap(top={top}, history={history}, scope={scope!r}): top is a share in [0, 1], history in [0, 1), "
                "scope 'global' or 'tensor'."
            )
        self.parameters = list(dict.fromkeys(p for p in parameters if p.requires_grad))
        self.top, self.history, self.scope, self.fill_ties, self.shards = top, history, scope, fill_ties, shards
        self.importance = [torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in self.parameters]
        self.start = [p.detach().clone(memory_format=torch.contiguous_format) for p in self.parameters]
        self._frozen_zeros: list[Tensor] | None = None

    @torch.no_grad()
    def begin_interval(self) -> None:
        """θ_RL,start ← θ."""
        for start, parameter in zip(self.start, self.parameters, strict=True):
            start.copy_(parameter)

    @torch.no_grad()
    def end_interval(self, top: float | None = None) -> FreezeReport:
        """Update the map from what moved since `begin_interval` and select the elements to freeze.

        `top` is k from here on, where it changes between intervals.

        The snapshot is overwritten with the parameters as the SFT phase finds them: what its freeze puts back.

        Raises:
            NumericsError: a parameter is not finite. The map is then finite but belongs to no interval: load a state.
        """
        self.top = self.top if top is None else top
        moved = []
        for index, (importance, start, parameter) in enumerate(
            zip(self.importance, self.start, self.parameters, strict=True)
        ):
            wide = torch.float64 if start.dtype == torch.float64 else torch.float32
            moved.append(0)
            for old, before, now in blocks(importance, start, parameter.detach().contiguous()):
                change = (now.to(wide) - before.to(wide)).float().abs_()
                check_orderable(change, index)  # before it enters the map
                old.mul_(self.history).add_(change, alpha=1.0 - self.history)
                before.copy_(now)
                moved[index] += count_from(old, FROZEN_FROM)
        groups = [[i] for i in range(len(self.importance))] if self.scope == "tensor" else [range(len(self.importance))]
        self._frozen_zeros = (
            [torch.zeros_like(c, dtype=torch.bool) for c in self.importance] if self.fill_ties else None
        )
        reports = [self._select(list(group), sum(moved[i] for i in group)) for group in groups]
        return FreezeReport(
            elements=sum(r.elements for r in reports),
            moved=sum(r.moved for r in reports),
            frozen=sum(r.frozen for r in reports),
            threshold=min((r.threshold for r in reports if r.frozen), default=0.0),
        )

    def _select(self, indices: list[int], moved_here: int) -> FreezeReport:
        values = [self.importance[i] for i in indices]
        local = torch.tensor([sum(v.numel() for v in values), moved_here])
        elements, moved = (int(n) for n in self.shards.all_sum(local))
        wanted = math.floor(round(self.top * elements, 6))  # ⌊k·d⌋ of the real number: 0.57 · 100 is 57
        if moved <= wanted and not self.fill_ties:
            return FreezeReport(elements=elements, moved=moved, frozen=moved, threshold=0.0)
        if wanted == 0:
            for importance in values:
                importance.zero_()
            return FreezeReport(elements=elements, moved=moved, frozen=0, threshold=0.0)
        top = find_top_k(values, wanted, self.shards)
        for i, dropped in zip(indices, top.dropped, strict=True):
            self._keep(i, top.threshold, dropped)
        return FreezeReport(elements=elements, moved=moved, frozen=wanted, threshold=top.threshold)

    def _keep(self, index: int, threshold: float, dropped: Tensor) -> None:
        """C ← 1_I ⊙ C of one tensor."""
        importance = self.importance[index]
        if self._frozen_zeros is not None:
            mask = importance >= threshold
            mask.view(-1)[dropped] = False
            self._frozen_zeros[index] = mask & (importance < FROZEN_FROM)
        below = float(torch.nextafter(torch.tensor(threshold), torch.tensor(0.0)))
        for (block,) in blocks(importance):
            torch.threshold_(block, below, 0.0)  # keeps what is greater
        importance.view(-1)[dropped] = 0.0

    def mask(self, index: int) -> Tensor:
        """M of one parameter: bool, True where SFT must not move it."""
        return self.marks(index) >= FROZEN_FROM

    def marks(self, index: int) -> Tensor:
        """M of one parameter as `ElementFreeze` takes it; the map itself unless zeros are frozen, so it is not to be changed."""
        if self._frozen_zeros is None:
            return self.importance[index]
        return self.importance[index] + self._frozen_zeros[index]

    def masks(self) -> dict[nn.Parameter, Tensor]:
        """M of every parameter, all at once (one byte an element); `mask` makes one at a time."""
        return {p: self.mask(i) for i, p in enumerate(self.parameters)}

    def state_dict(self) -> dict[str, Any]:
        """Map, interval start and frozen zeros, in parameter order."""
        return {"importance": self.importance, "start": self.start, "frozen_zeros": self._frozen_zeros or []}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; shapes must match."""
        for name, mine in (("importance", self.importance), ("start", self.start)):
            for target, source in zip(mine, state[name], strict=True):
                target.copy_(source)
        zeros = state["frozen_zeros"]
        self._frozen_zeros = [z.clone() for z in zeros] if zeros else None
