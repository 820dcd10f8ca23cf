"""The element mask around an optimizer's steps.

Setting a gradient to zero does not freeze a parameter: AdamW still moves it by its momentum and by weight decay. The hard freeze
therefore puts the bits of masked elements back: those of the parameter after every step, those of the optimizer's per-element
state (Adam's moments) when the phase ends, since nothing reads them in between. `grad_zero` is the literal reading of S0 §3.2,
kept for comparison.

A mask is given as marks: an fp32 tensor that is at least `FROZEN_FROM` where an element is frozen, and smaller but not negative
elsewhere. An importance map is one as it stands. Clearing what is frozen and taking it out are then one elementwise kernel
each, which makes no mask on the way; what was taken out comes back by a bitwise or. Exact whatever the value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mifo.errors import ConfigError

FreezeMode = Literal["hard", "grad_zero"]
MarkSource = Callable[[int], Tensor]
"""The marks of the parameter of an index."""
FROZEN_FROM = 2.0**-126
"""The smallest normal fp32: smaller marks read as zero where a library made the processor flush them."""
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class ElementFreeze:
    """Keeps masked elements of some parameters as they are while an optimizer moves the rest.

        with ElementFreeze(masks) as freeze:       # {parameter: bool tensor, True = frozen}
            for batch in sft_phase:
                loss(batch).backward()
                freeze.mask_gradients()            # before clipping: the clipped norm is that of what may move
                clip_grad_norm_(...)
                freeze.step(optimizer)             # instead of optimizer.step()
                optimizer.zero_grad()

    Works around any `torch.optim` optimizer whose step needs no closure. Parameters without a mask are stepped as usual. The
    parameters are taken as they are at the first step, unless `snapshot` already holds them.

    Args:
        masks: for each parameter a bool tensor of its shape, True where it must not move; or, with `parameters`, a
            function from a parameter's index to its marks (`ImportanceMap.marks`), so that no mask need exist.
        parameters: what the indices of such a function refer to.
        mode: "hard" or "grad_zero".
        snapshot: with `parameters`, copies of them as they are now; left as they are. Saves the memory of another copy.
    """

    def __init__(
        self,
        masks: Mapping[nn.Parameter, Tensor] | MarkSource,
        parameters: Sequence[nn.Parameter] | None = None,
        *,
        mode: FreezeMode = "hard",
        snapshot: Sequence[Tensor] | None = None,
    ) -> None:
        if mode not in ("hard", "grad_zero"):
            raise ConfigError(f"ElementFreeze(mode={mode!r}): use 'hard' or 'grad_zero'.")
        if isinstance(masks, Mapping):
            self.parameters = list(masks)
            tensors = list(masks.values())
            for parameter, mask in masks.items():
                if mask.shape != parameter.shape or mask.dtype != torch.bool:
                    raise ConfigError(
                        f"ElementFreeze: a mask of {mask.dtype} {tuple(mask.shape)} for a parameter of shape "
                        f"{tuple(parameter.shape)}. Give a bool tensor of the parameter's shape."
                    )
            self._marks: MarkSource = lambda index: tensors[index].float()
        else:
            assert parameters is not None
            self.parameters = list(parameters)
            self._marks = masks
        self.mode: FreezeMode = mode
        self._kept = snapshot
        self._optimizer: Optimizer | None = None
        self._states: list[dict[str, Tensor]] = []
        self._masked = False  # gradients were masked for the coming step
        self._rests = False  # frozen elements stay by themselves, see `_begin`

    def __enter__(self) -> ElementFreeze:
        return self

    def __exit__(self, *_: object) -> None:
        self.settle()

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """g ← (1 − M) ⊙ g, also where a masked gradient is not finite."""
        self._masked = True
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                _clear_frozen(parameter.grad, self._marks(index))

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> None:
        """One step of `optimizer` after which masked elements have the bits they had before (mode "hard").

        Raises:
            ConfigError: the optimizer mixes parameters and needs a closure (LBFGS).
        """
        if self.mode == "grad_zero":
            optimizer.step()
            return
        if self._optimizer is None:
            self._begin(optimizer)
        assert self._optimizer is optimizer, "one freeze serves one optimizer"
        assert self._kept is not None
        rests = self._rests and self._masked and _decay_rounds_to_nothing(optimizer)
        optimizer.step()
        self._rests, self._masked = rests, False
        for index, parameter in enumerate([] if rests else self.parameters):
            if parameter.grad is not None:
                marks = self._marks(index)
                _put_back(parameter.data, _frozen_part(self._kept[index], marks), marks)

    @torch.no_grad()
    def settle(self) -> None:
        """Put back the optimizer's state of masked elements; at the end of the phase, or before it is saved half-way."""
        for index, (parameter, before) in enumerate(zip(self.parameters, self._states, strict=False)):
            assert self._optimizer is not None
            for name, now in _per_element(self._optimizer, parameter).items():
                if name not in before:  # made during this phase, and optimizers start from zeros
                    _clear_frozen(now, self._marks(index))
                elif self._rests:  # still zero
                    _or_bits(now, before[name])
                else:
                    _put_back(now, before[name], self._marks(index))
        self._optimizer, self._states = None, []  # a further step begins again

    def _begin(self, optimizer: Optimizer) -> None:
        """Take the optimizer's state of frozen elements out.

        With both moments and the gradient zero Adam's step is exactly zero (0/ε), so only weight decay could move a frozen
        element.
        """
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError(
                "freeze = 'hard' with the optimizer LBFGS: it needs a closure and mixes parameters. Use AdamW or SGD."
            )
        self._optimizer = optimizer
        if self._kept is None:
            self._kept = [p.detach().clone() for p in self.parameters]
        self._rests = _rests_at_zero(optimizer) and self._masked
        for index, parameter in enumerate(self.parameters):
            marks = self._marks(index)
            state = _per_element(optimizer, parameter)
            self._states.append({name: _frozen_part(value, marks) for name, value in state.items()})
            for value in state.values() if self._rests else ():
                _clear_frozen(value, marks)


@torch.no_grad()
def restore_frozen(parameters: Sequence[Tensor], kept: Sequence[Tensor], marks: MarkSource) -> None:
    """Give marked elements the bits that they have in `kept`, whatever moved them."""
    for index, (parameter, before) in enumerate(zip(parameters, kept, strict=True)):
        _put_back(parameter.data, _frozen_part(before, marks(index)), marks(index))


def _rests_at_zero(optimizer: Optimizer) -> bool:
    """Whether an element whose gradient and moments are zero has a step of zero; with ε = 0 it would be 0/0."""
    adam = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
    return adam and all(float(group["eps"]) > 0.0 for group in optimizer.param_groups)


def _decay_rounds_to_nothing(optimizer: Optimizer) -> bool:
    """Whether decoupled decay leaves fp32 weights as they are: p − lr·wd·p rounds to p when lr·wd is below 2⁻²⁵."""
    return all(
        (
            group["weight_decay"] == 0.0
            or (isinstance(optimizer, torch.optim.AdamW) and group["lr"] * group["weight_decay"] < 2**-26)
        )
        and all(p.dtype == torch.float32 for p in group["params"])
        for group in optimizer.param_groups
    )


def _clear_frozen(values: Tensor, marks: Tensor) -> None:
    """+0.0 where marked."""
    if values.dtype == torch.float32:  # the gradient of hardtanh on (−1, FROZEN_FROM): `values` inside, 0 outside
        torch.ops.aten.hardtanh_backward.grad_input(values, marks, -1.0, FROZEN_FROM, grad_input=values)
    else:
        values.masked_fill_(marks >= FROZEN_FROM, 0.0)


def _frozen_part(values: Tensor, marks: Tensor) -> Tensor:
    """`values` where marked, +0.0 elsewhere."""
    if values.dtype == torch.float32:  # the gradient of a threshold: `values` where the marks exceed it
        part: Tensor = torch.ops.aten.threshold_backward(values, marks, FROZEN_FROM - 2.0**-149)
        return part
    return torch.where(marks >= FROZEN_FROM, values, torch.zeros_like(values))


def _put_back(values: Tensor, frozen_part: Tensor, marks: Tensor) -> None:
    """Make `values` those of `frozen_part` where marked."""
    _clear_frozen(values, marks)
    _or_bits(values, frozen_part)


def _or_bits(values: Tensor, frozen_part: Tensor) -> None:
    """Add `frozen_part` to `values` where one of both is +0.0; unlike a sum it keeps −0.0."""
    integer = _INTEGERS[values.element_size()]
    values.view(integer).bitwise_or_(frozen_part.view(integer))


def _per_element(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's state tensors of the parameter's shape."""
    state = optimizer.state.get(parameter, {})
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0
    }
