"""The element mask around an optimizer step.

Setting a gradient to zero does not freeze a parameter: AdamW still moves it by its momentum and by weight decay (METHODS 7,
resolution 7). The hard freeze therefore puts back, after the step, the bits that the masked elements of the parameter and
of every per-element optimizer state had before it. `grad_zero` is the literal reading of S0 §3.2, kept for comparison.

The step is taken over slices of the parameters (the others' gradients are set aside), so that the copies needed to put
things back stay small: a slice of parameters and moments instead of a second model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mifo.errors import ConfigError

FreezeMode = Literal["hard", "grad_zero"]
SLICE_ELEMENTS = 1 << 25  # elements stepped together under the hard freeze: 384 MiB of copies with Adam's two moments
MaskSource = Callable[[int], Tensor]


class ElementFreeze:
    """Keeps masked elements of some parameters as they are while an optimizer moves the rest.

        freeze = ElementFreeze(masks)          # {parameter: bool tensor, True = frozen}
        loss.backward()
        freeze.mask_gradients()                # before clipping: the clipped norm is that of what may move
        clip_grad_norm_(...)
        freeze.step(optimizer)                 # instead of optimizer.step()

    Works around any `torch.optim` optimizer whose step needs no closure. Parameters without a mask are stepped as usual.

    Args:
        masks: for each parameter a bool tensor of its shape, True where it must not move; or, with `parameters`, a
            function from the parameter's index to its mask, so that masks need not all exist at once.
        parameters: what the indices of a mask function refer to.
        mode: "hard" or "grad_zero".
    """

    def __init__(
        self,
        masks: Mapping[nn.Parameter, Tensor] | MaskSource,
        parameters: Sequence[nn.Parameter] | None = None,
        *,
        mode: FreezeMode = "hard",
    ) -> None:
        if isinstance(masks, Mapping):
            self.parameters = list(masks)
            tensors = list(masks.values())
            for parameter, mask in masks.items():
                assert mask.shape == parameter.shape
                assert mask.dtype == torch.bool
            self._mask: MaskSource = tensors.__getitem__
        else:
            assert parameters is not None
            self.parameters = list(parameters)
            self._mask = masks
        self.mode: FreezeMode = mode

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """g ← (1 − M) ⊙ g, also where a masked gradient is not finite."""
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                parameter.grad.masked_fill_(self._mask(index), 0.0)

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> None:
        """One step of `optimizer` after which masked elements have the bits they had before (mode "hard").

        Raises:
            ConfigError: the optimizer keeps state over several parameters (LBFGS), which cannot be stepped in slices.
        """
        if self.mode == "grad_zero":
            optimizer.step()
            return
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError(
                "freeze = 'hard' with the optimizer LBFGS: it needs a closure and mixes parameters. Use AdamW or SGD."
            )
        index_of = {parameter: index for index, parameter in enumerate(self.parameters)}
        grads = {p: p.grad for group in optimizer.param_groups for p in group["params"]}
        for parameter in grads:
            parameter.grad = None
        for piece in _slices([p for p in grads if grads[p] is not None]):
            for parameter in piece:
                parameter.grad = grads[parameter]
            kept = [(p, index_of[p], _per_element_copies(optimizer, p)) for p in piece if p in index_of]
            optimizer.step()
            for parameter, index, copies in kept:
                self._put_back(optimizer, parameter, index, copies)
            for parameter in piece:
                parameter.grad = None
        for parameter, grad in grads.items():
            parameter.grad = grad

    def _put_back(self, optimizer: Optimizer, parameter: nn.Parameter, index: int, copies: dict[str, Tensor]) -> None:
        mask = self._mask(index)
        for name, before in copies.items():
            now = parameter if name == "" else optimizer.state[parameter][name]
            torch.where(mask, before, now, out=now.data)
        for name, value in optimizer.state[parameter].items():
            if name not in copies and _is_per_element(
                value, parameter
            ):  # made by this very step: it started from zeros
                value.masked_fill_(mask, 0.0)


def _is_per_element(value: object, parameter: nn.Parameter) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0


def _per_element_copies(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Copies of the parameter (under "") and of its optimizer state of the same shape."""
    state = optimizer.state.get(parameter, {})
    copies = {name: value.clone() for name, value in state.items() if _is_per_element(value, parameter)}
    copies[""] = parameter.detach().clone()
    return copies


def _slices(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    piece: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if piece and size + parameter.numel() > SLICE_ELEMENTS:
            yield piece
            piece, size = [], 0
        piece.append(parameter)
        size += parameter.numel()
    if piece:
        yield piece
