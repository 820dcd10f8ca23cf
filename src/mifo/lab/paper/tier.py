"""How much is trained to put a finding to the test: the model, the steps, the seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mifo.data.chat import TemplateName


@dataclass(frozen=True, kw_only=True)
class Tier:
    """Sizes of all runs of a suite.

    The papers begin from models that solve some problems; the models here solve none in the format asked for. Findings about
    RL and about what follows it therefore begin from a `start`: the model after `start_updates` updates of SFT.

    Attributes:
        name: as --tier has it.
        description: one line for the page.
        recipe: model, data, rollouts and optimizers of all runs.
        settings: tables on top of the recipe.
        seeds: of every run.
        rl_steps: RL steps of a phase.
        prompts: questions of one RL step.
        batch: demonstrations of one SFT update.
        buffer: S of interleaved methods.
        start_updates: SFT updates of the start.
        forget_steps: steps of each objective after an RL phase (S0 Table 2 has 10 after 50).
        flops: what runs that are compared as methods may spend each.
        shipped_flops: the same where they begin from the model as it ships.
        few_demonstrations: how many demonstrations an over-trained model sees again and again.
        epochs: over these, of the under-, moderately and over-trained model (S3 has 2 and 32).
        rates: p of post-hoc pruning.
        masks: random masks a rate.
        max_tokens: longest response of measurements that sample.
        problems: held-out problems of measurements beside the runs' own.
        pairs: demonstrations that entropies are measured on.
        templates: other templates to measure with; none that the model cannot spell.
        lora_rank: r of adapters.
    """

    name: str
    description: str
    recipe: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: int
    rl_steps: int
    prompts: int
    batch: int
    buffer: int
    start_updates: int
    forget_steps: int
    flops: float
    shipped_flops: float
    few_demonstrations: int
    epochs: tuple[int, int, int]
    rates: tuple[float, ...]
    masks: int
    max_tokens: int
    problems: int
    pairs: int
    templates: tuple[TemplateName, ...]
    lora_rank: int


SMOKE = Tier(
    name="smoke",
    description="a random two-layer model that copies numbers, 13 held-out problems, two seeds; shows that everything runs",
    recipe="tiny",
    seeds=2,
    rl_steps=6,
    prompts=40,
    batch=8,
    buffer=32,
    start_updates=160,
    forget_steps=3,
    flops=1e10,
    shipped_flops=3e10,
    few_demonstrations=32,
    epochs=(10, 40, 80),
    rates=(0.5, 0.9),
    masks=2,
    max_tokens=12,
    problems=13,
    pairs=32,
    templates=("none",),
    lora_rank=8,
)
MINI = Tier(
    name="mini",
    description="the mini model of 0.2 million weights and four families of tasks, five seeds, runs of some seconds",
    recipe="mini",
    seeds=5,
    rl_steps=40,
    prompts=16,
    batch=16,
    buffer=32,
    start_updates=80,
    forget_steps=20,
    flops=8e10,
    shipped_flops=1.2e11,
    few_demonstrations=256,
    epochs=(2, 6, 24),
    rates=(0.1, 0.3, 0.5, 0.7, 0.9),
    masks=3,
    max_tokens=40,
    problems=160,
    pairs=128,
    templates=("none", "qwen"),  # the others do not fit its 256 positions
    lora_rank=8,
)
SMALL = Tier(
    name="small",
    description="SmolLM2-135M-Instruct and five families of reasoning tasks, three seeds, runs of a few minutes",
    recipe="smollm2-arithmetic",
    seeds=3,
    rl_steps=10,
    prompts=16,
    batch=8,
    buffer=32,
    start_updates=32,
    forget_steps=4,
    flops=1e13,
    shipped_flops=2e13,
    few_demonstrations=128,
    epochs=(1, 2, 8),
    rates=(0.5, 0.9),
    masks=1,
    max_tokens=64,
    problems=100,
    pairs=48,
    templates=("none", "qwen", "prime"),
    lora_rank=64,
)
FULL = Tier(
    name="full",
    description="SmolLM2-135M-Instruct and five families of reasoning tasks, five seeds, runs of tens of minutes",
    recipe="smollm2-arithmetic",
    seeds=5,
    rl_steps=50,
    prompts=32,
    batch=16,
    buffer=64,
    start_updates=24,
    forget_steps=10,
    flops=1e14,
    shipped_flops=1.5e14,
    few_demonstrations=256,
    epochs=(1, 2, 32),
    rates=(0.1, 0.3, 0.5, 0.7, 0.9),
    masks=3,
    max_tokens=64,
    problems=200,
    pairs=128,
    templates=("none", "qwen", "prime"),
    lora_rank=64,
)
TIERS: Mapping[str, Tier] = MappingProxyType({tier.name: tier for tier in (SMOKE, MINI, SMALL, FULL)})
