"""SFT by low-rank adapters (LoRA) in a phase that ends by merging them into the weights (S0 App. D.4).

    y = W x + (α/r) B (A x)        A [r, in] uniform in ±1/√in, B [out, r] zero: the first forward pass is the base's
    W ← W + (α/r) B A              at the end of the phase

The linear layers below the output layer have adapters, and the weights get no gradients meanwhile; embeddings, norms, biases and
the output layer stay as they are. The layers are hooked, not replaced, so the model keeps its names and structure, and the
rollout engine sees plain weights: between phases there are no adapters, and an evaluation inside a phase sees them merged.

Each phase has new adapters and an optimizer without moments; its schedule goes on over phases unless a phase starts it anew.
Where MIFO freezes, the mask acts on the merged change: frozen elements keep their bits.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from mifo.config.schema import OptimizerConfig
from mifo.train.optim import ScheduledAdamW
from mifo.types import LowRank


def adapted_layers(body: nn.Module) -> dict[str, nn.Linear]:
    """The layers that have adapters, by name: all linear ones of the decoder body."""
    return {name: module for name, module in body.named_modules() if isinstance(module, nn.Linear)}


def adapter_elements(body: nn.Module, rank: int) -> int:
    """Elements of all A and B."""
    return sum(rank * (layer.in_features + layer.out_features) for layer in adapted_layers(body).values())


class Adapters:
    """The adapters of one phase, from their beginning until they are merged.

    Args:
        body: the decoder of the model.
        weights: the model's trainable parameters; they get no gradients while there are adapters.
        shape: rank and α.
        settings: of the optimizer.
        seed: of A; the same on every rank.
    """

    def __init__(
        self, body: nn.Module, weights: Sequence[nn.Parameter], shape: LowRank, settings: OptimizerConfig, *, seed: int
    ) -> None:
        self.shape, self.weights = shape, weights
        self.layers = adapted_layers(body)
        self.down, self.up = _fresh(list(self.layers.values()), shape.rank, seed)
        self.optimizer = ScheduledAdamW(self.parameters, settings)
        self._hooks: list[RemovableHandle] = []
        for weight in weights:
            weight.requires_grad_(False)
        self._hook()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All A, then all B, in the order of the layers."""
        return [*self.down, *self.up]

    @property
    def scale(self) -> float:
        """α/r."""
        return self.shape.alpha / self.shape.rank

    def merge(self, finish: Callable[[], None]) -> None:
        """Add the change to the weights for good; the adapters are done.

        Args:
            finish: called when the change is added: puts frozen elements back.
        """
        self._unhook()
        self._add()
        finish()
        for weight in self.weights:
            weight.requires_grad_(True)

    @contextlib.contextmanager
    def merged(self, finish: Callable[[], None]) -> Iterator[None]:
        """The weights as `merge` would leave them, inside a `with`; afterwards every bit is as before."""
        weights = [layer.weight for layer in self.layers.values()]
        kept = [weight.detach().clone() for weight in weights]
        self._unhook()
        try:
            self._add()
            finish()
            yield
        finally:
            with torch.no_grad():
                for weight, before in zip(weights, kept, strict=True):
                    weight.copy_(before)
            self._hook()

    @torch.no_grad()
    def _add(self) -> None:
        for layer, down, up in zip(self.layers.values(), self.down, self.up, strict=True):
            layer.weight.addmm_(up, down, alpha=self.scale)

    def _hook(self) -> None:
        for layer, down, up in zip(self.layers.values(), self.down, self.up, strict=True):
            self._hooks.append(layer.register_forward_hook(_Adapted(down, up, self.scale)))

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def named_tensors(self) -> dict[str, Tensor]:
        """A, B and their moments by name, for messages."""
        names = [f"{part} of {name}" for part in ("A", "B") for name in self.layers]
        named: dict[str, Tensor] = dict(zip(names, self.parameters, strict=True))
        for key, tensor in self.optimizer.state_tensors().items():
            index, part = key.split(".", 1)
            named[f"{part} of {names[int(index)]}"] = tensor
        return named

    def state_tensors(self) -> dict[str, Tensor]:
        """`parameter.{index}` and `moment.{index}.{name}`."""
        own: dict[str, Tensor] = {f"parameter.{i}": p for i, p in enumerate(self.parameters)}
        return own | {f"moment.{name}": tensor for name, tensor in self.optimizer.state_tensors().items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain data; the tensors are `state_tensors`."""
        return {"rank": self.shape.rank, "alpha": self.shape.alpha, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restore what both gave."""
        for index, parameter in enumerate(self.parameters):
            parameter.copy_(tensors[f"parameter.{index}"])
        moments = {n.removeprefix("moment."): t.clone() for n, t in tensors.items() if n.startswith("moment.")}
        self.optimizer.load(state["optimizer"], moments)


class _Adapted:
    """A forward hook of one linear layer: adds (α/r) B (A x) to its output."""

    def __init__(self, down: Tensor, up: Tensor, scale: float) -> None:
        self.down, self.up, self.scale = down, up, scale

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self.scale * F.linear(F.linear(inputs[0], self.down), self.up)


def _fresh(layers: Sequence[nn.Linear], rank: int, seed: int) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """A and B of every layer; drawn on the CPU, so the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    down, up = [], []
    for layer in layers:
        bound = 1.0 / math.sqrt(layer.in_features)
        drawn = (2.0 * torch.rand(rank, layer.in_features, generator=generator) - 1.0) * bound
        down.append(nn.Parameter(drawn.to(layer.weight)))
        up.append(nn.Parameter(layer.weight.new_zeros(layer.out_features, rank)))
    return down, up
