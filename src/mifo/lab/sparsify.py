"""Post-hoc sparsification: how much of a change can be dropped at random before the score falls (S0 §2.2, Figure 3).

    θ_post = θ_0 + m ⊙ (θ_T − θ_0),    m ~ Bernoulli(1 − p),  one mask, no 1/(1 − p)

over a grid of rates p and several masks each (the paper uses one mask and does not state its rates: 0.1 ... 0.9 and
three masks are ours). Every pruned model is measured on held-out problems like any other (`eval`). SFT's checkpoint
beside RL's, from the same start, is the comparison of the paper: what each loses, and how much more one does than the
other, is paired by mask and problem, with intervals over both. Its online counterpart is the training setting
`train.gradient_drop`.

One model is in memory; the start and the end of the change are read from their files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from mifo.config.schema import Config, DataConfig, EvaluationConfig
from mifo.core.surgery import keep_mask, prune
from mifo.data.tasks import INSTRUCTION
from mifo.errors import ConfigError
from mifo.eval.score import evaluate, evaluation_sampling
from mifo.lab.arena_statistics import Estimate
from mifo.lab.claims import contrast
from mifo.lab.samples import EMBEDDED_DATA, configuration_note, load_source, run_endings, stored_names
from mifo.lab.source import Source, Tensors, common_names, find_source, labels_of, model_config
from mifo.train.build import build_engine, make_chat, make_grader, verifier
from mifo.train.corpus import EMBEDDED_SPLITS, embedded_available, read_evaluation
from mifo.train.device import pick_device, pick_dtype
from mifo.train.model import load_tokenizer
from mifo.types import Score

log = logging.getLogger(__name__)

RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
Measure = Callable[[PreTrainedModel], Score]


@dataclass(frozen=True, slots=True, kw_only=True)
class SparsifySettings:
    """The grid, and how a model is scored.

    `data`, `split`, `limit`, `samples`, `temperature`, `max_tokens`, `template` and `system_prompt` as in `mifo eval`.
    """

    rates: tuple[float, ...] = RATES
    masks: int = 3
    seed: int = 0
    data: str = EMBEDDED_DATA
    split: str | None = None
    limit: int | None = 200
    samples: int = 1
    temperature: float = 0.0
    max_tokens: int = 512
    template: str | None = None
    system_prompt: str | None = None
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedScore:
    """The score of one pruned model with its 95 % interval; rate 0 is the trained model, rate 1 the start."""

    model: str
    rate: float
    mask: int
    accuracy: float
    low: float
    high: float
    response_length: float
    problems: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Accuracy lost at one rate: by `model`, or, where `than` is given, by it more than by that one."""

    model: str
    rate: float
    lost: Estimate
    than: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsification:
    """All scores of all models, what each lost, and how much more than the first each other one did."""

    start: str
    models: tuple[str, ...]
    settings: SparsifySettings
    note: str
    scores: tuple[PrunedScore, ...]
    drops: tuple[Drop, ...]

    def curve(self, model: str) -> list[tuple[float, float, float, float]]:
        """(rate, mean accuracy over masks, lowest, highest) along the grid."""
        rates = sorted({s.rate for s in self.scores if s.model == model})
        found = []
        for rate in rates:
            values = [s.accuracy for s in self.scores if s.model == model and s.rate == rate]
            found.append((rate, sum(values) / len(values), min(values), max(values)))
        return found

    def record(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each score."""
        return [asdict(score) for score in self.scores]


def sparsify(start: str, models: Sequence[str], settings: SparsifySettings | None = None) -> Sparsification:
    """Score pruned versions of some models that were trained from one start.

    Args:
        start: θ_0.
        models: θ_T of each run.
        settings: the grid and the evaluation.

    Raises:
        ConfigError: a setting is out of range.
        ModelError: a path is no model, or the architectures differ.
        DataError: the held-out problems cannot be read.
    """
    settings = settings or SparsifySettings()
    curves, note = _curves(start, models, settings)
    return Sparsification(
        start=start,
        models=tuple(models),
        settings=settings,
        note=note,
        scores=tuple(score for curve in curves.values() for score, _ in curve),
        drops=tuple(_drops({label: _by_rate(curve) for label, curve in curves.items()}, settings)),
    )


Solved = Mapping[str, float]
Curve = Sequence[tuple[PrunedScore, Solved]]


def solved_when_pruned(start: str, model: str, settings: SparsifySettings) -> dict[float, dict[int, Solved]]:
    """What a model still solves: by rate (0 is the trained model, 1 the start), mask and problem, the share of right answers.

    Raises:
        As `sparsify`.
    """
    [curve] = _curves(start, [model], settings)[0].values()
    return _by_rate(curve)


def _curves(start: str, models: Sequence[str], settings: SparsifySettings) -> tuple[dict[str, Curve], str]:
    """The curve of each model by its label, and a note on the problems."""
    _check(settings)
    begin = Tensors(find_source(start, "START"))
    ends = [Tensors(find_source(given, "MODEL")) for given in models]
    common_names([begin, *ends])
    labels = labels_of([begin.source, *(end.source for end in ends)])[1:]
    with _evaluation(ends[0].source, settings) as (measure, note):
        note += configuration_note(begin.source, ends[0].source)
        curves = {label: _curve(begin, end, label, measure, settings) for end, label in zip(ends, labels, strict=True)}
    return curves, note


def _by_rate(curve: Curve) -> dict[float, dict[int, Solved]]:
    """rate -> mask -> problem -> share of right answers."""
    found: dict[float, dict[int, Solved]] = {}
    for score, solved in curve:
        found.setdefault(score.rate, {})[score.mask] = solved
    return found


def _drops(solved: Mapping[str, Mapping[float, Mapping[int, Solved]]], settings: SparsifySettings) -> Iterator[Drop]:
    """By masks in place of seeds: the trained model is the same under each."""
    first = next(iter(solved))
    for rate in sorted(set(settings.rates)):
        lost = {}
        for model, rates in solved.items():
            whole = dict.fromkeys(range(settings.masks), rates[0.0][0])
            lost[model] = [(1.0, whole), (-1.0, rates[rate])]
            found = contrast(lost[model])
            assert found is not None
            yield Drop(model=model, rate=rate, lost=found)
        for model in [label for label in solved if label != first]:
            found = contrast([*lost[model], *((-weight, runs) for weight, runs in lost[first])])
            assert found is not None
            yield Drop(model=model, rate=rate, lost=found, than=first)


def _curve(begin: Tensors, end: Tensors, label: str, measure: Measure, settings: SparsifySettings) -> Curve:
    scores = []
    model = load_source(end.source, "float32", settings.device)
    names = stored_names(model, end)
    for rate, mask in _grid(settings):
        _put(model, names, begin, end, rate, mask, settings.seed)
        score = measure(model)
        scores.append((_pruned_score(label, rate, mask, score), dict(score.by_problem)))
        log.info("%s p = %g mask %d: %.3f", label, rate, mask, score.accuracy.value)
    return scores


def _check(settings: SparsifySettings) -> None:
    if not settings.rates or any(not 0.0 < rate < 1.0 for rate in settings.rates):
        listed = ", ".join(f"{rate:g}" for rate in settings.rates)
        raise ConfigError(f"--rates {listed}: each must be more than 0 and less than 1; 0 and 1 are measured anyway.")
    if settings.masks < 1:
        raise ConfigError(f"--masks = {settings.masks} must be at least 1.")
    if settings.limit is not None and settings.limit < 1:
        raise ConfigError(f"--limit = {settings.limit} must be at least 1.")


def _grid(settings: SparsifySettings) -> Iterator[tuple[float, int]]:
    """(rate, mask): the trained model, every pruned one, and the start."""
    yield 0.0, 0
    for rate in sorted(set(settings.rates)):
        for mask in range(settings.masks):
            yield rate, mask
    yield 1.0, 0


@torch.no_grad()
def _put(
    model: PreTrainedModel,
    names: Mapping[str, str],
    begin: Tensors,
    end: Tensors,
    rate: float,
    mask: int,
    seed: int,
) -> None:
    """θ_post into the model; the mask of a number is the same for all models, so that they lose the same elements."""
    for name, parameter in model.named_parameters():
        stored = names[name]
        keep = keep_mask(end.infos[stored].shape, rate, seed=seed, step=mask, name=f"{rate:g}/{stored}")
        parameter.copy_(prune(begin.read(stored), end.read(stored), keep))


@contextmanager
def _evaluation(source: Source, settings: SparsifySettings) -> Iterator[tuple[Measure, str]]:
    """What scores a model, and a note on the problems; with template and tokenizer of `source`."""
    config = _config(source, settings)
    device = pick_device(settings.device)
    with make_grader(config) as grader:
        chat = make_chat(config, load_tokenizer(config.model))
        problems, note = read_evaluation(config.data, verifier(grader))
        grader.require({problem.grader for problem in problems})
        sampling = evaluation_sampling(config, chat)

        def measure(model: PreTrainedModel) -> Score:
            engine = build_engine(model, config, device, pick_dtype("auto", device))
            return evaluate(engine, problems, chat=chat, grader=grader, sampling=sampling, samples=settings.samples)

        yield measure, note


def _config(source: Source, settings: SparsifySettings) -> Config:
    data = source.run.data if source.run is not None else DataConfig()
    template = settings.template or data.template
    prompt = settings.system_prompt if settings.system_prompt is not None else data.system_prompt
    own = settings.data in EMBEDDED_SPLITS
    if own and prompt is None and source.run is None and template == "tokenizer":
        prompt = INSTRUCTION
    held_out = replace(
        DataConfig(),
        evaluation=settings.data,
        evaluation_problems=settings.limit,
        evaluation_split=settings.split or "test",
        families=data.families if own else (),
        levels=data.levels if own else None,
        labels=() if own else data.labels,
        instruction=None if own else data.instruction,
        template=template,
        system_prompt=prompt,
    )
    most = embedded_available(held_out, "evaluation")
    if most is not None and settings.limit is not None:
        held_out = replace(held_out, evaluation_problems=min(settings.limit, most))
    rollout, _ = run_endings(source)
    return Config(
        model=model_config(source),
        data=held_out,
        rollout=replace(rollout, max_response_tokens=settings.max_tokens),
        evaluation=EvaluationConfig(samples=settings.samples, temperature=settings.temperature),
    )


def _pruned_score(label: str, rate: float, mask: int, score: Score) -> PrunedScore:
    return PrunedScore(
        model=label,
        rate=rate,
        mask=mask,
        accuracy=score.accuracy.value,
        low=score.accuracy.low,
        high=score.accuracy.high,
        response_length=score.response_length,
        problems=score.accuracy.count,
    )
