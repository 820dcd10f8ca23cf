"""Measurements of exported models that findings share; each is made once and kept as plain data.

They are made one after another while nothing is trained, so each has all cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from mifo.config.schema import Config
from mifo.data.chat import TemplateName
from mifo.lab.arena_measure import for_problems, verdicts
from mifo.lab.magnitude import magnitude
from mifo.lab.paper.finding import Evidence
from mifo.lab.samples import make_policy
from mifo.lab.sparsify import SparsifySettings, solved_when_pruned
from mifo.train.build import make_chat
from mifo.train.calibration import token_scores
from mifo.train.corpus import read_corpus
from mifo.train.device import set_up_cpu
from mifo.train.model import load_model, load_tokenizer
from mifo.types import Sequence as TokenSequence
from mifo.types import Verdict

Norms = Mapping[str, float]
"""‖Δ‖₂ of "total" and of "layer N" for every layer."""


def norms(evidence: Evidence, seed: int, before: str, after: str) -> Norms:
    """How far the weights moved between the ends of two runs.

    Args:
        evidence: holds both.
        seed: of both.
        before: the run that ends with θ_0; "shipped" is the model as it ships.
        after: the run that ends with θ_T.
    """

    def measure() -> Norms:
        found = magnitude(_begin(evidence, before, seed), evidence.export(after, seed), largest=1)
        return {"total": found.total().norm} | {f"layer {group.layer}": group.norm for group in found.layers()}

    runs = [f"{name}-seed{seed}" for name in (before, after)]
    return cast(Norms, evidence.once(f"norms-{before}-{after}-seed{seed}", runs, measure))


def _begin(evidence: Evidence, name: str, seed: int) -> str:
    return evidence.plan.shipped(seed) if name == "shipped" else evidence.export(name, seed)


def total_norms(evidence: Evidence, before: str, after: str) -> dict[int, float]:
    """Of the whole model, by seed, for seeds that have the runs."""
    seeds = evidence.runs(after).keys() & (evidence.runs(before).keys() if before != "shipped" else evidence.plan.seeds)
    return {seed: norms(evidence, seed, before, after)["total"] for seed in sorted(seeds)}


def smallest_layer_ratio(evidence: Evidence, before: str, larger: str, smaller: str) -> dict[int, float]:
    """By seed, the least ratio over layers of what moved in one run to what moved in another from the same start."""
    found = {}
    for seed in sorted(evidence.runs(larger).keys() & evidence.runs(smaller).keys()):
        more, less = norms(evidence, seed, before, larger), norms(evidence, seed, before, smaller)
        ratios = [more[key] / less[key] for key in more if key != "total" and less[key] > 0]
        if ratios:
            found[seed] = min(ratios)
    return found


def demonstrations(evidence: Evidence, name: str, part: str) -> dict[str, dict[int, float]]:
    """How a model reads demonstrations, teacher-forced: mean "loss" and mean token "entropy", in nats, by seed.

    Args:
        evidence: holds the run.
        name: of the run; "shipped" is the model as it ships.
        part: split of the embedded problems: train, validation or test.
    """
    found: dict[str, dict[int, float]] = {"loss": {}, "entropy": {}}
    configs = {seed: result.config for seed, result in evidence.runs(name).items()}
    if name == "shipped":
        configs = {seed: result.config for seed, result in evidence.runs("start").items()}
    for seed, config in configs.items():
        model = config.model if name == "shipped" else replace(config.model, path=evidence.export(name, seed))
        own = replace(config, model=model)

        def measure(own: Config = own) -> dict[str, float]:
            return _read_demonstrations(own, part, evidence)

        read = evidence.once(f"demonstrations-{part}-{name}-seed{seed}", [f"{name}-seed{seed}"], measure)
        for figure, value in read.items():
            found[figure][seed] = value
    return found


def _read_demonstrations(config: Config, part: str, evidence: Evidence) -> dict[str, float]:
    set_up_cpu(None)
    data = replace(
        config.data,
        train=f"embedded:{part}",
        train_problems=min(evidence.plan.tier.pairs, evidence.plan.available(part)),
        evaluation="none",
        verify_demonstrations=False,
    )
    config = replace(config, data=data)
    chat = make_chat(config, load_tokenizer(config.model))
    corpus = read_corpus(config, chat, lambda rows: [Verdict.CORRECT] * len(rows), needs_demonstrations=True)
    pairs = [
        TokenSequence(
            problem_id=problem.id,
            prompt_ids=corpus.encoded[problem.id].prompt_ids,
            response_ids=corpus.encoded[problem.id].demonstration_ids or (),
            weights={},
        )
        for problem in corpus.train
    ]
    model = load_model(config.model, seed=config.train.seed)
    model.requires_grad_(False).eval()
    scores = token_scores(make_policy(model), pairs)
    return {
        "loss": -float(torch.cat([logp_T for logp_T, _ in scores]).double().mean()),
        "entropy": float(torch.cat([entropy_T for _, entropy_T in scores]).double().mean()),
    }


def solved_pruned(evidence: Evidence, seed: int, before: str, after: str) -> dict[str, Mapping[str, float]]:
    """What a run still solves when a random share of its change is taken back: means over masks, by the share as text ("0" is the
    run itself) and by held-out problem."""
    tier = evidence.plan.tier

    def measure() -> dict[str, dict[str, float]]:
        set_up_cpu(None)
        result = evidence.results[f"{after}-seed{seed}"]
        data = result.config.data
        settings = SparsifySettings(
            rates=tier.rates,
            masks=tier.masks,
            seed=seed,
            data=data.evaluation,
            limit=data.evaluation_problems,
            max_tokens=tier.max_tokens,
            template=data.template,
            system_prompt=data.system_prompt,
        )
        solved = solved_when_pruned(evidence.export(before, seed), str(result.folder), settings)
        return {
            f"{rate:g}": {problem: sum(mask[problem] for mask in masks.values()) / len(masks) for problem in masks[0]}
            for rate, masks in solved.items()
        }

    runs = [f"{name}-seed{seed}" for name in (before, after)]
    found = evidence.once(f"pruned-{before}-{after}-seed{seed}", runs, measure)
    return cast("dict[str, Mapping[str, float]]", found)


PASS_SAMPLES, PASS_TEMPERATURE = 8, 0.6  # S3 samples at 0.6; its K is not stated


def pass_gaps(evidence: Evidence, name: str) -> dict[int, Mapping[str, float]]:
    """Pass@K − Pass@1 of every held-out problem by seed: whether one of K responses is right, less the share of them that is."""
    found = {}
    for seed, result in evidence.runs(name).items():

        def measure(seed: int = seed, config: Config = result.config) -> Mapping[str, float]:
            set_up_cpu(None)
            problems = config.data.evaluation_problems or evidence.plan.tier.problems
            own = for_problems(config, Path(evidence.export(name, seed)), config.data.evaluation, problems)
            sampled = replace(own.evaluation, samples=PASS_SAMPLES, temperature=PASS_TEMPERATURE)
            shares = verdicts(replace(own, evaluation=sampled))
            return {problem: float(share > 0) - share for problem, share in shares.items()}

        measured = evidence.once(f"pass-gap-{name}-seed{seed}", [result.name], measure)
        found[seed] = cast("Mapping[str, float]", measured)
    return found


def solved_with_template(evidence: Evidence, name: str, template: TemplateName) -> dict[int, Mapping[str, float]]:
    """Verdicts on held-out problems by seed and problem when another template makes the prompts."""
    found = {}
    for seed, result in evidence.runs(name).items():

        def measure(seed: int = seed, config: Config = result.config) -> Mapping[str, float]:
            set_up_cpu(None)
            data = config.data
            own = for_problems(
                config,
                Path(evidence.export(name, seed)),
                data.evaluation,
                data.evaluation_problems or evidence.plan.tier.problems,
            )
            prompt = data.system_prompt if template == "tokenizer" else None
            return dict(verdicts(replace(own, data=replace(own.data, template=template, system_prompt=prompt))))

        measured = evidence.once(f"template-{template}-{name}-seed{seed}", [result.name], measure)
        found[seed] = cast("Mapping[str, float]", measured)
    return found
