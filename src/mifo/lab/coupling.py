"""Does the second phase undo the first? SFT→RL and RL→SFT on a classification task (S4).

The first of the given checkpoints is the end of the first phase, p_1; the others lie along the second, p_2. For each:

    L_SFT    E_x −log p(y*|x), the loss of the right label                                            Figure 3a
    KL       E_x KL(p_2(·|x) ‖ p_1(·|x)), from samples y ~ p_2 at temperature 1
    reward   +1 for the right label, −1 otherwise, strict and robust, as the paper samples (T 0.6, top-p 0.95)   Figure 3b
    J        the mean strict reward at temperature 1: what the theorems speak of

What the theorems say of these figures, and when they do not apply: `lab.coupling_bounds`.

Unstated in the paper and chosen here: β = 0.001 and 8 samples a prompt; the wording of the prompt (`lab.labels`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from mifo.config.schema import Config, DataConfig
from mifo.data.chat import Chat
from mifo.data.labelled import COLA, LabelTask, make_task
from mifo.errors import ConfigError
from mifo.lab.coupling_bounds import (
    R_MAX,
    Bound,
    Constant,
    Estimate,
    Texts,
    c1,
    mean_estimate,
    mean_reward,
    rl_sft_bounds,
    sft_rl_bounds,
)
from mifo.lab.labels import (
    Example,
    LabelScores,
    described,
    label_scores,
    read_examples,
    robust_label,
    strict_label,
)
from mifo.lab.samples import load_source, make_policy, run_endings
from mifo.lab.source import Source, Tensors, common_names, find_source, labels_of, model_config
from mifo.rollout.engine import Engine
from mifo.train.build import build_engine, make_chat
from mifo.train.calibration import token_scores
from mifo.train.device import pick_device
from mifo.train.model import load_tokenizer
from mifo.types import Sampling, TokenIds
from mifo.types import Sequence as TokenSequence

log = logging.getLogger(__name__)

Order = Literal["sft-rl", "rl-sft"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CouplingSettings:
    """The task and how it is measured; `task` is that of the first checkpoint's run where it is None, or CoLA's."""

    data: str
    order: Order
    task: LabelTask | None = None
    limit: int | None = 200
    samples: int = 8
    beta: float = 0.001
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 16
    seed: int = 0
    template: str | None = None
    system_prompt: str | None = None
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class CouplingPoint:
    """One checkpoint; `kl` is to the first one, `objective` is J."""

    label: str
    sft_loss: Estimate
    kl: Estimate
    objective: Estimate
    strict: LabelScores
    robust: LabelScores


@dataclass(frozen=True, slots=True, kw_only=True)
class Coupling:
    """All checkpoints and bounds; `c1` is C_1(β) of the first checkpoint, `task` what was asked."""

    models: tuple[str, ...]
    settings: CouplingSettings
    task: LabelTask
    examples: int
    note: str
    c1: Constant
    points: tuple[CouplingPoint, ...]
    bounds: tuple[Bound, ...]

    def record(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each checkpoint."""
        rows = []
        for point in self.points:
            row: dict[str, Any] = {"model": point.label}
            for name, figures in asdict(point).items():
                if isinstance(figures, dict):
                    row |= {f"{name}_{part}": value for part, value in figures.items()}
            rows.append(row)
        return rows


@dataclass(frozen=True, slots=True)
class _Measured:
    """What one checkpoint did: its samples at T = 1 with their own log-probs, and the figures that need no other model.

    `rewards` are of all samples of a text, `others` of those that are not the right label itself.
    """

    sft_loss: list[float]
    samples: list[TokenSequence]
    own: list[float]
    rewards: list[list[float]]
    others: list[list[float]]
    strict: LabelScores
    robust: LabelScores


def coupling(models: Sequence[str], settings: CouplingSettings) -> Coupling:
    """Measure checkpoints of a two-phase run.

    Args:
        models: the end of the first phase, then checkpoints along the second.
        settings: the task and how it is measured.

    Raises:
        ConfigError: a setting is out of range, or there is only one model.
        ModelError: a path is no model, or the architectures differ.
        DataError: the file holds no labelled texts.
    """
    _check(models, settings)
    sources = [find_source(given, "MODEL") for given in models]
    task = settings.task or _task(sources[0])
    examples = read_examples(settings.data, task, settings.limit)
    common_names([Tensors(source) for source in sources])
    config = _config(sources[0], settings)
    chat = make_chat(config, load_tokenizer(config.model))
    prompts = [chat.prompt_ids(example.problem(task, i)) for i, example in enumerate(examples)]
    golds = [chat.demonstration_ids(task.labels[example.label]) for example in examples]
    found = [_one(source, config, chat, task, examples, prompts, golds, settings) for source in sources]
    under_first = _scored(sources[0], [m.samples for m in found], settings)
    texts = [
        _texts(label, m, rows, settings.samples)
        for label, m, rows in zip(labels_of(sources), found, under_first, strict=True)
    ]
    points = tuple(_point(own, m) for own, m in zip(texts, found, strict=True))
    constant = c1([-loss for loss in found[0].sft_loss], found[0].rewards, found[0].others, settings.beta)
    bounds = sft_rl_bounds(constant, texts) if settings.order == "sft-rl" else rl_sft_bounds(texts)
    return Coupling(
        models=tuple(models),
        settings=settings,
        task=task,
        examples=len(examples),
        note=described(examples, task),
        c1=constant,
        points=points,
        bounds=bounds,
    )


def _check(models: Sequence[str], settings: CouplingSettings) -> None:
    if len(models) < 2:
        raise ConfigError(
            "coupling of one model: name the end of the first phase and one or more checkpoints of the second."
        )
    if settings.samples < 2:
        raise ConfigError(
            f"--samples = {settings.samples} must be at least 2: KL and Z are means over samples of a prompt."
        )
    if not settings.beta > 0:
        raise ConfigError(f"--beta = {settings.beta:g} must be more than 0.")
    if settings.limit is not None and settings.limit < 1:
        raise ConfigError(f"--limit = {settings.limit} must be at least 1.")


def _task(first: Source) -> LabelTask:
    """What a run was trained on; CoLA's question where there is no run, or none with labels."""
    data = first.run.data if first.run is not None else DataConfig()
    return make_task(data.labels, data.instruction) if data.labels else COLA


def _config(source: Source, settings: CouplingSettings) -> Config:
    run = source.run.data if source.run is not None else DataConfig()
    prompt = settings.system_prompt if settings.system_prompt is not None else run.system_prompt
    rollout, legacy = run_endings(source)
    return Config(
        model=model_config(source),
        data=DataConfig(template=settings.template or run.template, system_prompt=prompt),
        rollout=rollout,
        legacy=legacy,
    )


def _one(
    source: Source,
    config: Config,
    chat: Chat,
    task: LabelTask,
    examples: Sequence[Example],
    prompts: Sequence[TokenIds],
    golds: Sequence[TokenIds],
    settings: CouplingSettings,
) -> _Measured:
    device = pick_device(settings.device)
    model = load_source(source, "float32", settings.device)
    engine: Engine = build_engine(model, config, device, torch.float32)
    policy = make_policy(model)
    pairs = [_sequence(p, g) for p, g in zip(prompts, golds, strict=True)]
    losses = [-float(logp_T.double().sum()) for logp_T, _ in token_scores(policy, pairs)]
    shown = engine.generate(prompts, 1, _sampling(chat, settings, settings.temperature, settings.top_p), settings.seed)
    drawn = engine.generate(prompts, settings.samples, _sampling(chat, settings, 1.0, 1.0), settings.seed + 1)
    samples = [_sequence(prompt, r.token_ids) for prompt, group in zip(prompts, drawn, strict=True) for r in group]
    own = [float(logp_T.double().sum()) for logp_T, _ in token_scores(policy, samples)]
    gold = [example.label for example in examples]
    texts = [chat.decode(group[0].token_ids) for group in shown]
    rewards = [
        [R_MAX if strict_label(chat.decode(r.token_ids), task) == label else -R_MAX for r in group]
        for group, label in zip(drawn, gold, strict=True)
    ]
    strict = label_scores(gold, [strict_label(text, task) for text in texts])
    loss = sum(losses) / len(losses)
    log.info("%s: SFT loss %.3g, strict reward %.3g, accuracy %.3f", source.given, loss, strict.reward, strict.accuracy)
    return _Measured(
        sft_loss=losses,
        samples=samples,
        own=own,
        rewards=rewards,
        others=[
            [reward for r, reward in zip(group, row, strict=True) if r.token_ids != right]
            for group, row, right in zip(drawn, rewards, golds, strict=True)
        ],
        strict=strict,
        robust=label_scores(gold, [robust_label(text, task) for text in texts]),
    )


def _sampling(chat: Chat, settings: CouplingSettings, temperature: float, top_p: float) -> Sampling:
    return Sampling(
        temperature=temperature,
        top_p=top_p,
        max_tokens=settings.max_tokens,
        stop_ids=chat.stop_ids,
        ends_text=chat.ends_text,
    )


def _sequence(prompt: TokenIds, response: TokenIds) -> TokenSequence:
    return TokenSequence(problem_id="", prompt_ids=prompt, response_ids=response, weights={})


def _scored(first: Source, samples: Sequence[Sequence[TokenSequence]], settings: CouplingSettings) -> list[list[float]]:
    """log p_1 of the samples of every checkpoint."""
    model = load_source(first, "float32", settings.device)
    policy = make_policy(model)
    return [[float(logp_T.double().sum()) for logp_T, _ in token_scores(policy, rows)] for rows in samples]


def _texts(label: str, measured: _Measured, under_first: Sequence[float], samples: int) -> Texts:
    gaps = [own - other for own, other in zip(measured.own, under_first, strict=True)]
    return Texts(
        label=label,
        sft_loss=measured.sft_loss,
        objective=[sum(row) / len(row) for row in measured.rewards],
        kl=[sum(gaps[i : i + samples]) / samples for i in range(0, len(gaps), samples)],
    )


def _point(texts: Texts, measured: _Measured) -> CouplingPoint:
    return CouplingPoint(
        label=texts.label,
        sft_loss=mean_estimate(texts.sft_loss),
        kl=mean_estimate(texts.kl),
        objective=mean_reward(texts.objective),
        strict=measured.strict,
        robust=measured.robust,
    )
