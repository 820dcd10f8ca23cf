"""Rejuvenation in the middle of a run (S3): as a stage of its own, and between intervals.

    read the base          from its folder; it is in memory until the weights are made, and not before or after
    calibrate              on the first demonstrations of the training data, in fp32: targets, scores, S      train.calibration
    θ ← α θ + (1 − α) θ_base;  rows and columns of S ← θ_base                                                  core.surgery

The weights get a new version, so the rollout engine takes them before it samples again. Momentum (the first moment of AdamW) of
reset elements is zero again: it was gathered where they no longer are. Their second moment stays: it says how large gradients
are, and with v = 0 under a step count that their tensor shares, AdamW's next steps would be up to 6.6 times the rate (β 0.9 and
0.999). What is only fused keeps both. A stage begins with optimizers without moments anyway. MIFO's snapshot is taken again and
its map stays, since a rejuvenation is nothing that RL did. No rollback goes back behind it.

Calibration changes nothing and may be broken off; what follows is finished first. A run that is resumed in between calibrates
again, and a finished rejuvenation is part of the state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mifo.config.schema import Config, ModelConfig, RejuvenationConfig
from mifo.core.surgery import rejuvenated
from mifo.errors import DataError, ModelError
from mifo.train.attribution import projections
from mifo.train.calibration import (
    Calibration,
    Masks,
    ModuleReset,
    SelectionRules,
    demonstrated_pairs,
    entropies_of,
    reset_elements,
    reset_masks,
    select_neurons,
    token_entropies,
)
from mifo.train.corpus import Corpus
from mifo.train.estimate import empty_model
from mifo.train.kept_phases import keep_phase
from mifo.train.metrics import score_record
from mifo.train.model import hash_weights, load_model, read_model_config, resolve_model_path
from mifo.train.policy import Policy
from mifo.types import Sequence

if TYPE_CHECKING:
    from mifo.train.run import Run


def rejuvenate_before_stage(run: Run) -> None:
    """The rejuvenation that stands before the stage about to begin, if one does and is not done; then accuracy, as after a
    stage that trains."""
    settings = run.config.rejuvenation_before[run.stage]
    if settings is None or run.steps > run.stage_began:
        return
    number = run.config.stage_numbers[run.stage] - 1
    if not any(done.get("stage") == number for done in run.rejuvenations):
        _rejuvenate(run, settings, {"stage": number})
    name = f"after stage {number}"
    if name not in run.scores:
        score = run.evaluate(name)
        run.scores[name] = None if score is None else score_record(score)
        run.mark()


def rejuvenate_between_intervals(run: Run) -> None:
    """Called where an SFT phase has ended and RL goes on: rejuvenate if it is time, and not done."""
    settings = run.config.rejuvenation
    if settings.every_intervals is None or run.sft_phases % settings.every_intervals:
        return
    place = {"in_stage": run.stage + 1, "sft_phase": run.sft_phases}
    if any(place.items() <= done.items() for done in run.rejuvenations):
        return
    run.mark()  # accuracy after the SFT phase is not measured again
    _rejuvenate(run, settings, place)
    if run.importance is not None:
        with run.ledger.timed("freeze"):
            run.importance.begin_interval()


def _rejuvenate(run: Run, settings: RejuvenationConfig, place: Mapping[str, int]) -> None:
    keep_phase(run)
    policy = run.learner.policy
    pairs = calibration_pairs(run.parts.corpus, settings)
    with run.ledger.timed("rejuvenation"):
        with run.stop.window(), _measuring(policy.model):
            base = read_base(run, settings)
            before = token_entropies(Policy(base, layout=policy.layout), pairs)
            found = select_neurons(policy, pairs, before, _rules(settings), run.parts.chat.decode)
        masks = _take(run, base, settings.alpha, found.selection.modules)
        del base
        with _measuring(policy.model):
            values = {"base": before, "over": found.after, "rejuvenated": token_entropies(policy, pairs)}
    fed = 3 * sum(len(pair.prompt_ids) + len(pair.response_ids) for pair in pairs) + found.fed_tokens
    run.ledger.calibration_fed_tokens += fed
    run.version += 1
    keep_phase(run, "rejuvenation")
    run.guard.good.forget()
    record = {"step": run.steps, **place, **_figures(found, masks, policy.model)}
    entropies = [entropies_of(name, rows, found.places) for name, rows in values.items()]
    run.rejuvenations.append(record | {"entropy": {e.model: e.tokens["mean"] for e in entropies}})
    selection = found.selection
    run.emit(
        "events",
        {
            "event": "rejuvenation",
            **record,
            "alpha": settings.alpha,
            "rho": settings.rho,
            "pairs": len(pairs),
            "fed_tokens": fed,
            "targets": selection.targets,
            "shares": reset_shares(selection.modules),
            "picked_by_half": selection.picked_by_half,
            "reconstruction_error": dict(selection.reconstruction_error),
            "gap": dict(selection.gap),
            "tokens": [list(entry) for entry in selection.tokens],
            "entropies": [asdict(e) for e in entropies],
        },
    )
    run.mark()


def _rules(settings: RejuvenationConfig) -> SelectionRules:
    return SelectionRules(
        rho=settings.rho,
        targets=settings.targets,
        signed=settings.signed,
        per_module_quota=settings.per_module_quota,
    )


@contextlib.contextmanager
def _measuring(model: PreTrainedModel) -> Iterator[None]:
    """The model as something to measure: no gradients of its own, and no activations that are made again."""
    training, wanted = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in wanted:
            parameter.requires_grad_(True)


@torch.no_grad()
def _take(run: Run, base: PreTrainedModel, alpha: float, modules: tuple[ModuleReset, ...]) -> Masks:
    """Put the rejuvenated weights into the policy, tensor by tensor, and take the momentum from what was reset."""
    own = dict(run.learner.policy.model.named_parameters())
    masks = {
        name: (mask.to(own[name].device), dimension) for name, (mask, dimension) in reset_masks(modules, own).items()
    }
    originals = dict(base.named_parameters())
    for name, parameter in own.items():
        reset = masks.get(name)
        parameter.copy_(rejuvenated(parameter, originals[name], alpha, reset))
        if reset is not None:
            for optimizer in run.parts.optimizers.values():
                optimizer.forget(parameter, *reset)
    return masks


def _figures(found: Calibration, masks: Masks, model: nn.Module) -> dict[str, Any]:
    selection = found.selection
    elements = {name: parameter.numel() for name, parameter in model.named_parameters()}
    every = selection.all_neurons
    return {
        "reset_neurons": selection.reset_neurons,
        "neuron_share": selection.reset_neurons / every if every else 0.0,
        "element_share": reset_elements(masks, elements) / sum(elements.values()),
    }


def reset_shares(modules: tuple[ModuleReset, ...]) -> dict[str, list[float]]:
    """Share of neurons reset, by kind of module, one number a layer in order."""
    shares: dict[str, list[float]] = {}
    for module in modules:
        shares.setdefault(module.kind, []).append(len(module.reset) / module.neurons)
    return shares


# --- what it needs ---------------------------------------------------------------------------------------------------


def calibration_pairs(corpus: Corpus, settings: RejuvenationConfig) -> list[Sequence]:
    """The first demonstrations of the training data with at most `max_tokens` tokens, prompt included.

    Raises:
        DataError: there is none.
    """
    pairs = demonstrated_pairs(corpus)
    fitting = [pair for pair in pairs if len(pair.prompt_ids) + len(pair.response_ids) <= settings.max_tokens]
    if not fitting:
        raise DataError(
            f"rejuvenation calibrates on demonstrations, and none of {len(pairs)} in data.train has at most max_tokens = "
            f"{settings.max_tokens} tokens together with its prompt. Raise max_tokens, or bring demonstrations that are right "
            "and short enough."
        )
    return fitting[: settings.samples]


def base_config(config: Config, settings: RejuvenationConfig) -> ModelConfig:
    """The [model] table of the base."""
    if settings.base is None:
        return config.model
    return replace(config.model, path=settings.base, revision=None)


def read_base(run: Run, settings: RejuvenationConfig) -> PreTrainedModel:
    """The base in fp32 on the policy's device, under the policy's configuration (its RoPE base, say) wherever it is from.

    Raises:
        ModelError: it cannot be read, has other tensors than the policy, or, where it is the model as it was loaded, its folder
            holds other weights by now.
    """
    config, policy = run.config, run.learner.policy
    configured = read_model_config(config.model)
    base = load_model(base_config(config, settings), seed=config.train.seed, configured=configured)
    base.requires_grad_(False).eval()
    check_same_shapes(base, policy.model, base_config(config, settings).path)
    broken = next((name for name, p in base.named_parameters() if not torch.isfinite(p).all()), None)
    if broken is not None:
        raise ModelError(
            f"the base of the rejuvenation, '{base_config(config, settings).path}', has weights that are NaN or infinite "
            f"({broken}). Fetch it again or name another base, then --resume; what was trained is sound."
        )
    if settings.base is None and hash_weights(base) != run.parts.reference_hash:
        raise ModelError(
            f"model.path = '{config.model.path}' holds other weights than when {run.parts.folder} was started, and rejuvenation "
            "goes back to those. Put the model back as it was, then --resume."
        )
    return base.to(policy.device)


def check_base(config: Config, model: nn.Module) -> None:
    """What shows of every rejuvenation of a run without weights: its base exists and fits, and neurons can be attributed.

    Args:
        config: the run's.
        model: the policy, or its architecture on the meta device.

    Raises:
        ModelError: names the base or the architecture, and the remedy.
    """
    for settings in config.rejuvenations:
        if settings.base is not None:
            resolve_model_path(settings.base)
            shapes = empty_model(replace(config, model=base_config(config, settings)))
            check_same_shapes(shapes, model, settings.base)
        if settings.rho > 0:
            projections(model)  # type: ignore[arg-type]


def check_same_shapes(base: nn.Module, model: nn.Module, path: str) -> None:
    """The base has the tensors of the model that is rejuvenated.

    Raises:
        ModelError: names the first tensor that differs.
    """
    own, others = _shapes(model), _shapes(base)
    differing = sorted(name for name in own.keys() | others.keys() if own.get(name) != others.get(name))
    if differing:
        name = differing[0]
        raise ModelError(
            f"the base of a rejuvenation, '{path}', is another architecture than model.path: {name} has shape "
            f"{others.get(name, 'none')} in it and {own.get(name, 'none')} in the model. Name the checkpoint that SFT began with."
        )


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}
