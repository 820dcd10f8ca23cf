"""How much each neuron adds to the logit of a target token (S3 §3.4.1).

With the final RMSNorm frozen at its scale s(t), a logit is a sum of what was written into the residual stream:

    z̃_y(t) = b_y + ⟨e(t), d⟩ + Σ_m (Σ_i a_i(t) ⟨W_:,i, d⟩ + ⟨b_m, d⟩)        d = s(t) · (γ ⊙ W_U[y])          eq. 2

over the modules m that write into it, o_proj and down_proj, whose neurons i are columns: their scores are exact (eq.
3). In exact arithmetic z̃ is the model's own logit; `reconstructed` is reported beside it. The neurons of q, k, v, gate
and up are rows: they are scored by gradient × activation of the model's own logit, before RoPE (and before the q/k norm
of Qwen3), with k and v summed over the prefix 0..t and the others taken at t. These are first-order proxies, and so is
the ranking across modules.

With grouped queries a neuron of k or v is an output feature of the projection, shared by the query heads of its group.

Legend: N tokens, K targets, D hidden size, A inputs or outputs of a module, S neurons of all modules, one after the
other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mifo.errors import ModelError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
WRITERS = ("o_proj", "down_proj")
PREFIX = ("k_proj", "v_proj")
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = KINDS[:4]


@dataclass(frozen=True, slots=True)
class Module:
    """A projection: `dimension` is the index of its weight that counts its neurons."""

    name: str
    layer: int
    kind: str
    neurons: int

    @property
    def dimension(self) -> int:
        """1 (columns) for what writes into the residual stream, 0 (rows) for the others."""
        return 1 if self.kind in WRITERS else 0


@dataclass(frozen=True, slots=True)
class Target:
    """A token whose logit is attributed: `position` is that of the hidden state which predicts `token`."""

    position: int
    token: int


@dataclass(frozen=True, slots=True)
class Scores:
    """Contributions to one target's logit: signed, fp32 [S]; the model's logit, and the sum of its parts."""

    scores_S: Tensor
    logit: float
    reconstructed: float


def projections(model: PreTrainedModel) -> tuple[Module, ...]:
    """The seven projections of every layer, in order.

    Raises:
        ModelError: the model is of another family, or its projections are not plain linear layers.
    """
    kind = model.config.model_type
    if kind not in MODEL_TYPES:
        raise ModelError(
            f"model type '{kind}': neurons are attributed in dense models of the families {', '.join(MODEL_TYPES)} only. Use one "
            "of these, or fuse alone (rho = 0)."
        )
    found = []
    for layer, block in enumerate(model.model.layers):
        for name in KINDS:
            part = "self_attn" if name in ATTENTION else "mlp"
            linear = getattr(getattr(block, part), name)
            if not isinstance(linear, nn.Linear):
                raise ModelError(
                    f"model.layers.{layer}.{part}.{name} is a {type(linear).__name__}, not a plain linear layer. Merge adapters "
                    "or name an unquantised version of the model."
                )
            neurons = linear.in_features if name in WRITERS else linear.out_features
            found.append(Module(f"model.layers.{layer}.{part}.{name}", layer, name, neurons))
    return tuple(found)


class Attribution:
    """Attributes logits of one model; use as a context manager, which takes the hooks off again.

    Args:
        model: of a supported family, in evaluation mode, its parameters without gradients.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.modules = projections(model)
        self._linears: list[nn.Linear] = [model.get_submodule(module.name) for module in self.modules]
        self._seen: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Attribution:
        for module, linear in zip(self.modules, self._linears, strict=True):
            keep = self._keep_input if module.kind in WRITERS else self._keep_output
            self._hooks.append(linear.register_forward_hook(keep(module.name)))
        self._hooks.append(self.model.get_input_embeddings().register_forward_hook(self._start))
        self._hooks.append(self.model.model.norm.register_forward_hook(self._keep_norm))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._seen.clear()

    def scores(self, ids: Sequence[int], targets: Sequence[Target]) -> list[Scores]:
        """One `Scores` a target, in order: one forward pass for all, one backward pass through activations for each.

        Args:
            ids: prompt and response, as far as the last target needs them.
            targets: positions in `ids`.
        """
        with torch.enable_grad():
            logits_K = self._forward(ids, targets)
            written, totals_K = self._written(targets)
            found = []
            for k, target in enumerate(targets):
                read = self._read(target, logits_K[k], last=k + 1 == len(targets))
                parts = [written[m.name][k] if m.kind in WRITERS else read[m.name] for m in self.modules]
                scores_S = torch.cat(parts).float().cpu()
                found.append(Scores(scores_S, float(logits_K[k].detach()), float(totals_K[k])))
        self._seen.clear()
        return found

    def _forward(self, ids: Sequence[int], targets: Sequence[Target]) -> Tensor:
        """The model's own logits of the targets, [K], with a graph down to the embeddings."""
        device = next(self.model.parameters()).device
        self.model.model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
        head, normed_ND = self.model.get_output_embeddings(), self._seen["normed"][0]
        rows, tokens = [t.position for t in targets], [t.token for t in targets]
        wide = torch.promote_types(normed_ND.dtype, torch.float32)
        logits_K = (normed_ND[rows].to(wide) * head.weight[tokens].to(wide)).sum(-1)
        return logits_K if head.bias is None else logits_K + head.bias[tokens].to(wide)

    @torch.no_grad()
    def _written(self, targets: Sequence[Target]) -> tuple[dict[str, Tensor], Tensor]:
        """s_i of every input of the writers, [K, A] a module (eq. 3), and z̃ of every target, [K] (eq. 2)."""
        rows, tokens = [t.position for t in targets], [t.token for t in targets]
        direction_KD = self._directions(rows, tokens)
        total_K = (self._seen["embedded"][0, rows].to(direction_KD) * direction_KD).sum(-1)
        written = {}
        for module, linear in zip(self.modules, self._linears, strict=True):
            if module.kind in WRITERS:
                active_KA = self._seen[module.name][0, rows].to(direction_KD)
                written[module.name] = active_KA * (direction_KD @ linear.weight.to(direction_KD))
                total_K = total_K + written[module.name].sum(-1)
                if linear.bias is not None:
                    total_K = total_K + direction_KD @ linear.bias.to(direction_KD)
        bias = self.model.get_output_embeddings().bias
        return written, total_K if bias is None else total_K + bias[tokens].to(total_K)

    def _read(self, target: Target, logit: Tensor, *, last: bool) -> dict[str, Tensor]:
        """Gradient × activation of every output of the readers, [A] a module."""
        readers = [m for m in self.modules if m.kind not in WRITERS]
        slopes = torch.autograd.grad(logit, [self._seen[m.name] for m in readers], retain_graph=not last)
        t, read = target.position, {}
        for module, slope in zip(readers, slopes, strict=True):
            first = 0 if module.kind in PREFIX else t
            wide = torch.promote_types(slope.dtype, torch.float32)
            active_NA = self._seen[module.name].detach()[0, first : t + 1].to(wide)
            read[module.name] = (slope[0, first : t + 1].to(wide) * active_NA).sum(0)
        return read

    def _directions(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """d = s(t) · (γ ⊙ W_U[y]), in fp32 (fp64 for fp64), [K, D]."""
        norm, residual_KD = self.model.model.norm, self._seen["residual"][0, rows]
        residual_KD = residual_KD.to(torch.promote_types(residual_KD.dtype, torch.float32))
        scale_K1 = torch.rsqrt(residual_KD.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        rows_KD = self.model.get_output_embeddings().weight[tokens].to(residual_KD)
        return scale_K1 * norm.weight.to(residual_KD) * rows_KD

    def _keep_input(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
            self._seen[name] = inputs[0].detach()

        return hook

    def _keep_output(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            self._seen[name] = output

        return hook

    def _start(self, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Gradients begin here: those of activations are wanted, none of parameters."""
        self._seen["embedded"] = output.detach()
        return output.detach().requires_grad_()

    def _keep_norm(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._seen["residual"], self._seen["normed"] = inputs[0].detach(), output
