"""What rejuvenation measures on calibration pairs: token entropies, target tokens, and the neurons behind them (S3).

    targets   of each pair, the N response tokens with the largest |H_over − H_base|
    picks     each target keeps its top ρ of all neurons by what they add to its logit             train.attribution
    S         the union over targets and pairs: rows of q, k, v, gate, up, columns of o, down

One implementation for `mifo rejuvenate`, which goes from files to files, and for a run in the middle of training
(`train.rejuvenate`).

Legend: T response tokens of a pair, S neurons of all modules, one after the other.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mifo.core.surgery import target_places, top_neurons
from mifo.data.pack import pack, plan_micro_batches
from mifo.train.attribution import WRITERS, Attribution, Module, Target
from mifo.train.corpus import Corpus
from mifo.train.policy import Policy
from mifo.types import Sequence as TokenSequence
from mifo.types import TokenIds

log = logging.getLogger(__name__)

SHOWN_TOKENS = 30
Masks = Mapping[str, tuple[Tensor, int]]
"""(mask of neurons, dimension of the tensor that counts them) by the tensor's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionRules:
    """How neurons are selected (S3 §3.4): the paper's ρ, N targets a pair, and the switches `signed` and `per_module_quota`."""

    rho: float
    targets: int
    signed: bool
    per_module_quota: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReset:
    """What was reset of one projection: indices of rows (q, k, v, gate, up) or columns (o, down)."""

    name: str
    layer: int
    kind: str
    neurons: int
    reset: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The neurons to reset, and what led to them.

    `modules` is empty where nothing was scored (rho = 0, or no targets). `reconstruction_error` is |z̃ − z| over targets, in
    logits; `gap` is H_over − H_base at the targets, in nats; `tokens` are the commonest targets as text; `picked_by_half`
    counts the neurons that at least half of the targets picked, a measure of how much their choices agree. Figures over
    nothing are empty.
    """

    modules: tuple[ModuleReset, ...]
    targets: int
    reconstruction_error: Mapping[str, float]
    tokens: tuple[tuple[str, int], ...]
    gap: Mapping[str, float]
    picked_by_half: int

    @property
    def reset_neurons(self) -> int:
        """How many are reset."""
        return sum(len(module.reset) for module in self.modules)

    @property
    def all_neurons(self) -> int:
        """How many were ranked."""
        return sum(module.neurons for module in self.modules)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entropies:
    """Token entropies of one model in nats: over all response tokens, and over the targets (empty where there are none)."""

    model: str
    tokens: Mapping[str, float]
    targets: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The selection with what it rests on: entropies and target positions of each pair; `fed_tokens` went through the model,
    forwards or backwards, to score neurons."""

    selection: Selection
    after: list[Tensor]
    places: list[list[int]]
    fed_tokens: int


def demonstrated_pairs(corpus: Corpus) -> list[TokenSequence]:
    """Prompt and demonstration of every training problem that has one, in the order of the data."""
    return [
        TokenSequence(
            problem_id=problem.id, prompt_ids=entry.prompt_ids, response_ids=entry.demonstration_ids, weights={}
        )
        for problem in corpus.train
        if (entry := corpus.encoded[problem.id]).demonstration_ids
    ]


def select_neurons(
    policy: Policy,
    pairs: Sequence[TokenSequence],
    before: Sequence[Tensor],
    rules: SelectionRules,
    decode: Callable[[TokenIds], str],
) -> Calibration:
    """The neurons that made the over-trained model so sure.

    Args:
        policy: the over-trained model, in evaluation mode, its parameters without gradients.
        pairs: what to calibrate on.
        before: entropies of the base on them, [T] a pair.
        rules: the switches.
        decode: text of token ids.

    Raises:
        ModelError: neurons of this architecture cannot be attributed (and rho is not 0).
        NumericsError: a score is not finite.
    """
    after = token_entropies(policy, pairs)
    places = [target_places(b, a, rules.targets, signed=rules.signed) for b, a in zip(before, after, strict=True)]
    modules: tuple[Module, ...] = ()
    picks_S, errors, fed = torch.zeros(0, dtype=torch.int64), torch.zeros(0), 0
    if rules.rho > 0 and any(places):
        with Attribution(policy.model) as attribution:
            modules = attribution.modules
            picks_S, errors, fed = _picks(attribution, pairs, places, rules)
    chosen = [pair.response_ids[p] for pair, some in zip(pairs, places, strict=True) for p in some]
    selection = Selection(
        modules=_module_resets(modules, picks_S),
        targets=len(chosen),
        reconstruction_error=quantiles(errors),
        tokens=tuple((decode((token,)), count) for token, count in Counter(chosen).most_common(SHOWN_TOKENS)),
        gap=quantiles(at_places(after, places) - at_places(before, places)),
        picked_by_half=int((2 * picks_S >= len(chosen)).sum()),
    )
    return Calibration(selection, after, places, fed)


def _picks(
    attribution: Attribution,
    pairs: Sequence[TokenSequence],
    places: Sequence[Sequence[int]],
    rules: SelectionRules,
) -> tuple[Tensor, Tensor, int]:
    """How many targets picked each neuron, int64 [S]; |z̃ − z| of every target; tokens fed, each pass counted."""
    sizes = [module.neurons for module in attribution.modules]
    picks_S = torch.zeros(sum(sizes), dtype=torch.int64)
    errors: list[float] = []
    fed = 0
    for number, (pair, chosen) in enumerate(zip(pairs, places, strict=True), 1):
        if chosen:
            first = len(pair.prompt_ids) - 1
            targets = [Target(first + place, pair.response_ids[place]) for place in chosen]
            ids = (*pair.prompt_ids, *pair.response_ids)[: first + chosen[-1] + 1]
            for scores in attribution.scores(ids, targets):
                errors.append(abs(scores.reconstructed - scores.logit))
                picks_S += top_neurons(scores.scores_S, sizes, rules.rho, per_module=rules.per_module_quota)
            fed += len(ids) * (1 + len(targets))
        log.info("attributed %d of %d pairs", number, len(pairs))
    return picks_S, torch.tensor(errors), fed


def _module_resets(modules: Sequence[Module], picks_S: Tensor) -> tuple[ModuleReset, ...]:
    pieces = picks_S.split([module.neurons for module in modules])
    return tuple(
        ModuleReset(
            name=module.name,
            layer=module.layer,
            kind=module.kind,
            neurons=module.neurons,
            reset=tuple(piece.nonzero()[:, 0].tolist()),
        )
        for module, piece in zip(modules, pieces, strict=True)
    )


def reset_masks(modules: Sequence[ModuleReset], stored: Container[str]) -> dict[str, tuple[Tensor, int]]:
    """(mask of neurons, dimension of the tensor that counts them) for each tensor of `stored` with some to reset.

    The bias of a row goes with it; the bias of a writer belongs to no neuron and stays.
    """
    masks: dict[str, tuple[Tensor, int]] = {}
    for module in modules:
        if not module.reset:
            continue
        mask = torch.zeros(module.neurons, dtype=torch.bool)
        mask[list(module.reset)] = True
        dimension = 1 if module.kind in WRITERS else 0
        masks[f"{module.name}.weight"] = (mask, dimension)
        if dimension == 0 and f"{module.name}.bias" in stored:
            masks[f"{module.name}.bias"] = (mask, 0)
    return masks


def reset_elements(masks: Masks, elements: Mapping[str, int]) -> int:
    """Elements that the masks reset, from the number of elements of every tensor."""
    return sum(elements[name] // len(mask) * int(mask.sum()) for name, (mask, _) in masks.items())


def entropies_of(name: str, values: Sequence[Tensor], places: Sequence[Sequence[int]]) -> Entropies:
    """The entropies of one model in short."""
    return Entropies(
        model=name, tokens=quantiles(torch.cat(list(values))), targets=quantiles(at_places(values, places))
    )


def at_places(values: Sequence[Tensor], places: Sequence[Sequence[int]]) -> Tensor:
    """The values of each pair at its chosen positions, end to end."""
    return torch.cat([row[torch.tensor(chosen, dtype=torch.int64)] for row, chosen in zip(values, places, strict=True)])


def token_entropies(policy: Policy, pairs: Sequence[TokenSequence], *, micro_batch_tokens: int = 4096) -> list[Tensor]:
    """H(t) = −Σ_v π log π at T = 1 before each response token of each pair, in nats; fp32 on the CPU, [T] a pair."""
    return [entropy_T for _, entropy_T in token_scores(policy, pairs, micro_batch_tokens=micro_batch_tokens)]


@torch.no_grad()
def token_scores(
    policy: Policy, pairs: Sequence[TokenSequence], *, micro_batch_tokens: int = 4096
) -> list[tuple[Tensor, Tensor]]:
    """(log-probs, entropies) of the response tokens of each pair, in nats; fp32 on the CPU, [T] each."""
    rows: dict[int, tuple[Tensor, Tensor]] = {}
    for plan in plan_micro_batches(pairs, micro_batch_tokens):
        batch = pack(pairs, plan)
        lengths = [len(pairs[i].response_ids) for i in batch.indices]
        logp_T, entropy_T = (values_T.float().cpu().split(lengths) for values_T in policy.token_stats(batch))
        rows |= dict(zip(batch.indices, zip(logp_T, entropy_T, strict=True), strict=True))
    return [rows[i] for i in range(len(pairs))]


def quantiles(values: Tensor) -> Mapping[str, float]:
    """Minimum, quartiles, 90 % and 99 % points, maximum and mean of some numbers; empty where there are none."""
    if not len(values):
        return {}
    points = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}
    ordered = values.double().sort().values
    at = {name: float(ordered[round(share * (len(ordered) - 1))]) for name, share in points.items()}
    return {"mean": float(ordered.mean()), **at}
