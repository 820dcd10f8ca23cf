"""How much further training moved the parameters than a token's margin needed: the ratio of S0 Appendix B.1.

For a context x and its next token y, with the strongest competitor k* under θ_0 held fixed,

    m(θ) = z_y − z_k*,   g = ∇_θ m(θ_0),   β = ε − m(θ_0)
    ‖Δ*‖ = β / ‖g‖       the shortest move that reaches the margin ε, if m is linear            Lemma 1
    PR   = ‖Δθ‖ / ‖Δ*‖ = ‖Δθ‖ ‖g‖ / β                                                           eq. 1

ε is not stated in the paper: here it is the margin that the trained model has, so β is what training gained, and PR is
defined where it gained. Three checks of the assumptions stand beside each ratio: g·Δθ / β, which is 1 where the margin
is linear along the training's own move; (m(θ_0 + Δ*) − m_0) / β, the same along the shortest move; and whether k* is
still the strongest competitor in the trained model. Where they fail, the ratio is a number without the meaning of the
lemma.

Theorem 1 is about one token too: PR^SFT / PR^RL = 1[y = y*] / (r π(y|x)), eq. 6. For a reward r it says that the ratio
is at least 1 where r π(y|x) ≤ 1, which holds for every r ≤ 1: the theorem then has no case in which it could fail. 1/(r
π) is reported under θ_0, and of two trained models the measured ratio of the same tokens beside it.

θ_0 is measured with the configuration of the trained model, under which training began. Norms are over all parameters.
Memory: four copies of the model in fp32.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mifo.errors import ConfigError, NumericsError
from mifo.lab.samples import (
    Pairs,
    PairSettings,
    check_same_settings,
    configuration_note,
    load_source,
    read_pairs,
    stored_names,
)
from mifo.lab.source import Tensors, common_names, find_source, labels_of
from mifo.train.calibration import quantiles

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRedundancy:
    """One token; `ratio` and the checks are None where the margin did not grow (β ≤ 0)."""

    text: str
    pair: int
    position: int
    margin_before: float
    margin_after: float
    gradient_norm: float
    minimal_norm: float | None
    ratio: float | None
    linear_along_training: float | None
    linear_along_minimum: float | None
    same_competitor: bool
    probability: float
    theorem_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Redundancy:
    """All tokens of one trained model."""

    start: str
    model: str
    label: str
    note: str
    reward: float
    change_norm: float
    tokens: tuple[TokenRedundancy, ...]

    def summary(self) -> dict[str, Any]:
        """Distributions over tokens, and the share for which the ratio is defined and its assumptions hold."""
        defined = [t for t in self.tokens if t.ratio is not None]
        columns = ("ratio", "linear_along_training", "linear_along_minimum")
        figures = {name: quantiles(torch.tensor([getattr(t, name) for t in defined])) for name in columns}
        return {
            **figures,
            "theorem_ratio": quantiles(torch.tensor([t.theorem_ratio for t in self.tokens])),
            "margin_grew": len(defined) / len(self.tokens),
            "same_competitor": sum(t.same_competitor for t in self.tokens) / len(self.tokens),
        }

    def record(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"summary": self.summary()}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each token."""
        return [{"model": self.label, **asdict(token)} for token in self.tokens]


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioToken:
    """A token whose margin grew in both models: the ratio of their redundancies, and Theorem 1's 1/(r π)."""

    pair: int
    position: int
    measured: float
    theorem: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """PR of one model over that of another, token by token. The gradient's norm cancels: ‖Δθ‖/β over ‖Δθ'‖/β'."""

    over: str
    under: str
    of: int
    tokens: tuple[RatioToken, ...]

    def summary(self) -> dict[str, Any]:
        """Distributions, the share of tokens with a ratio of at least 1, and the rank correlation with Theorem 1's."""
        measured = torch.tensor([token.measured for token in self.tokens], dtype=torch.float64)
        theorem = torch.tensor([token.theorem for token in self.tokens], dtype=torch.float64)
        return {
            "over": self.over,
            "under": self.under,
            "tokens": len(self.tokens),
            "of": self.of,
            "measured": quantiles(measured),
            "theorem": quantiles(theorem),
            "at_least_one": float((measured >= 1).double().mean()) if self.tokens else None,
            "rank_correlation": _rank_correlation(measured, theorem),
        }

    def record(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"summary": self.summary()}


@dataclass(frozen=True, slots=True)
class _Point:
    """A token to measure: the ids up to it, and its id."""

    pair: int
    position: int
    ids: tuple[int, ...]
    token: int


def ratios(over: Redundancy, under: Redundancy) -> Ratios:
    """PR of `over` divided by PR of `under`, for the tokens that were measured in both.

    Raises:
        ConfigError: they were measured on other tokens.
    """
    places = [[(t.pair, t.position, t.text, t.probability) for t in one.tokens] for one in (over, under)]
    if places[0] != places[1]:
        raise ConfigError(f"{over.label} and {under.label} were measured on different tokens. Measure them together.")
    both = [
        (a, b) for a, b in zip(over.tokens, under.tokens, strict=True) if a.ratio is not None and b.ratio is not None
    ]
    tokens = tuple(
        RatioToken(
            pair=a.pair, position=a.position, measured=(a.ratio or 0.0) / (b.ratio or 1.0), theorem=a.theorem_ratio
        )
        for a, b in both
    )
    return Ratios(over=over.label, under=under.label, of=len(over.tokens), tokens=tokens)


def _rank_correlation(first: Tensor, second: Tensor) -> float | None:
    """Spearman's, ties in order of place; None of fewer than three, or where one does not vary."""
    if len(first) < 3:
        return None
    ranks = torch.stack([column.argsort(stable=True).argsort().double() for column in (first, second)])
    varies = all(len(column.unique()) > 1 for column in (first, second))
    return float(torch.corrcoef(ranks)[0, 1]) if varies else None


def redundancy(
    start: str,
    models: Sequence[str],
    *,
    pairs: PairSettings | None = None,
    tokens: int = 64,
    reward: float = 1.0,
    seed: int = 0,
    device: str = "auto",
) -> list[Redundancy]:
    """Measure the redundancy ratio on a random sample of demonstrated tokens, the same for every model.

    Args:
        start: θ_0.
        models: θ_T of each, trained from it; the first says how texts become tokens.
        pairs: where the tokens are from.
        tokens: how many.
        reward: r of Theorem 1.
        seed: of the sample.
        device: as in `model.device`.

    Raises:
        ConfigError: an argument is out of range.
        ModelError: a path is no model, or the architectures differ.
        NumericsError: a weight is not finite.
        DataError: the file holds no pair that can be used.
    """
    if tokens < 1:
        raise ConfigError(f"--tokens = {tokens} must be at least 1.")
    if not 0 < reward < math.inf:
        raise ConfigError(f"--reward = {reward:g} must be more than 0 and finite: Theorem 1 divides by it.")
    begin, ends = Tensors(find_source(start, "START")), [Tensors(find_source(model, "MODEL")) for model in models]
    common_names([begin, *ends])
    check_same_settings([end.source for end in ends])
    read = read_pairs(ends[0].source, pairs or PairSettings())
    read = replace(read, note=read.note + configuration_note(begin.source, ends[0].source))
    points = _sample(read, tokens, seed)
    net = load_source(ends[0].source, "float32", device)
    labels = labels_of([begin.source, *(end.source for end in ends)])[1:]
    return [_measure(net, begin, end, label, read, points, reward) for end, label in zip(ends, labels, strict=True)]


def _sample(pairs: Pairs, count: int, seed: int) -> list[_Point]:
    every = [(i, t) for i, pair in enumerate(pairs.sequences) for t in range(len(pair.response_ids))]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    points = []
    for i, t in sorted(every[place] for place in order):
        pair = pairs.sequences[i]
        points.append(_Point(i, t, (*pair.prompt_ids, *pair.response_ids[:t]), pair.response_ids[t]))
    return points


def _measure(
    net: PreTrainedModel,
    begin: Tensors,
    end: Tensors,
    label: str,
    pairs: Pairs,
    points: Sequence[_Point],
    reward: float,
) -> Redundancy:
    parameters, names = dict(net.named_parameters()), stored_names(net, begin)
    with torch.no_grad():
        _put(parameters, {name: _finite(end, names[name]).to(p) for name, p in parameters.items()})
        after = [_logits(net, point) for point in points]
        start = {name: _finite(begin, names[name]).to(p) for name, p in parameters.items()}
        change = {name: p - start[name] for name, p in parameters.items()}
        _put(parameters, start)
        before = [_logits(net, point) for point in points]
    total = _norm(change.values())
    net.requires_grad_(True)
    found = []
    for number, (point, old, new) in enumerate(zip(points, before, after, strict=True), 1):
        rival = _rival(old, point.token)
        margins = float(old[point.token] - old[rival]), float(new[point.token] - new[rival])
        gradient = _gradient(net, parameters, point, rival)
        slope = _norm(gradient.values())
        gained = margins[1] - margins[0]
        defined = gained > 0 and slope > 0
        along = sum(float(torch.sum(gradient[n].double() * change[n].double())) for n in gradient)
        reached = _reach(net, parameters, start, gradient, gained / slope**2, point, rival) if defined else 0.0
        probability = math.exp(float(old[point.token].double() - old.double().logsumexp(0)))
        found.append(
            TokenRedundancy(
                text=str(pairs.chat.tokenizer.decode([point.token])),
                pair=point.pair,
                position=point.position,
                margin_before=margins[0],
                margin_after=margins[1],
                gradient_norm=slope,
                minimal_norm=gained / slope if defined else None,
                ratio=total * slope / gained if defined else None,
                linear_along_training=along / gained if defined else None,
                linear_along_minimum=(reached - margins[0]) / gained if defined else None,
                same_competitor=_rival(new, point.token) == rival,
                probability=probability,
                theorem_ratio=1.0 / (reward * probability) if probability > 0 else math.inf,
            )
        )
        log.info("measured %d of %d tokens", number, len(points))
    return Redundancy(
        start=begin.source.given,
        model=end.source.given,
        label=label,
        note=pairs.note,
        reward=reward,
        change_norm=total,
        tokens=tuple(found),
    )


def _finite(tensors: Tensors, name: str) -> Tensor:
    """A stored tensor, all of it finite."""
    values = tensors.read(name)
    if not bool(torch.isfinite(values).all()):
        raise NumericsError(
            f"{name} holds numbers that are not finite in '{tensors.source.given}', so there is no margin. Name an earlier "
            "checkpoint."
        )
    return values


def _logits(net: PreTrainedModel, point: _Point) -> Tensor:
    """Logits of the token after `point.ids`, [V]."""
    ids = torch.tensor([point.ids], device=next(net.parameters()).device)
    logits_V: Tensor = net(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    return logits_V.float()


def _rival(logits_V: Tensor, token: int) -> int:
    """k*: the largest logit but that of the token; the smaller id where two are equal."""
    others_V = logits_V.clone()
    others_V[token] = -math.inf
    return int(others_V.argmax())


def _gradient(
    net: PreTrainedModel, parameters: dict[str, nn.Parameter], point: _Point, rival: int
) -> dict[str, Tensor]:
    """g = ∇_θ (z_y − z_k*), by name."""
    logits_V = _logits(net, point)
    wanted = list(parameters.values())
    slopes = torch.autograd.grad(logits_V[point.token] - logits_V[rival], wanted)
    return dict(zip(parameters, slopes, strict=True))


@torch.no_grad()
def _reach(
    net: PreTrainedModel,
    parameters: dict[str, nn.Parameter],
    start: dict[str, Tensor],
    gradient: dict[str, Tensor],
    scale: float,
    point: _Point,
    rival: int,
) -> float:
    """m(θ_0 + Δ*), Δ* = (β/‖g‖²) g; the parameters are θ_0 again afterwards."""
    for name, parameter in parameters.items():
        parameter.add_(gradient[name], alpha=scale)
    logits_V = _logits(net, point)
    _put(parameters, start)
    return float(logits_V[point.token] - logits_V[rival])


@torch.no_grad()
def _put(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _norm(tensors: Any) -> float:
    return math.sqrt(sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors))
