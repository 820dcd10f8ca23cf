"""Accuracy on held-out problems, with an interval.

A problem's score is the mean over its samples (avg@k); the accuracy is the mean over problems. With one sample the interval is
Wilson's; with several it is the normal one of a mean of problem scores.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from mifo.config.schema import Config
from mifo.core.intervals import mean_interval
from mifo.data.chat import Chat
from mifo.errors import ModelError
from mifo.rewards import Answer, Grader
from mifo.rollout.engine import Engine
from mifo.train.run import Evaluate
from mifo.types import Problem, Rollout, Sampling, Score, Verdict

EVALUATION_SEED = 20_240_601  # the same draws at every evaluation, so that a difference is the model's


def evaluate(
    engine: Engine,
    problems: Sequence[Problem],
    *,
    chat: Chat,
    grader: Grader,
    sampling: Sampling,
    samples: int = 1,
    seed: int = EVALUATION_SEED,
) -> Score:
    """Sample and grade.

    Args:
        engine: holds the weights to measure.
        problems: at least one.
        chat: renders prompts.
        grader: gives verdicts; anything but correct counts as not solved, and errors and time-outs are in `verdicts`.
        sampling: temperature 0 is greedy.
        samples: responses for each problem.
        seed: of the sampling.
    """
    start = time.perf_counter()
    groups = engine.generate([chat.prompt_ids(p) for p in problems], samples, sampling, seed)
    answers = [
        Answer(grader=problem.grader, gold=problem.answer, text=chat.decode(rollout.token_ids))
        for problem, group in zip(problems, groups, strict=True)
        for rollout in group
    ]
    verdicts = grader.grade(answers)
    correct = [verdict is Verdict.CORRECT for verdict in verdicts]
    scores = [sum(correct[i : i + samples]) / samples for i in range(0, len(correct), samples)]
    rollouts: list[Rollout] = [rollout for group in groups for rollout in group]
    sources = sorted({p.source for p in problems})
    by_source = {
        source: mean_interval([s for s, p in zip(scores, problems, strict=True) if p.source == source], samples=samples)
        for source in sources
    }
    return Score(
        accuracy=mean_interval(scores, samples=samples),
        by_problem={problem.id: score for problem, score in zip(problems, scores, strict=True)},
        response_length=sum(len(r.token_ids) for r in rollouts) / len(rollouts),
        truncated=sum(r.stop == "length" for r in rollouts) / len(rollouts),
        verdicts={verdict.value: verdicts.count(verdict) for verdict in Verdict},
        by_source=by_source,
        seconds=time.perf_counter() - start,
    )


def check_evaluation_fits(context: int, chat: Chat, problems: Sequence[Problem], config: Config) -> None:
    """Prompts with the longest response must fit the model's context.

    Raises:
        ModelError: names the longest, the context and the remedy.
    """
    longest, name = max((len(chat.prompt_ids(problem)), problem.id) for problem in problems)
    if longest >= context:
        raise ModelError(
            f"the prompt of problem '{name}' has {longest} tokens, and '{config.model.path}' only {context} positions: no answer "
            "fits behind it. Leave such problems out of the data, or measure a model with a longer context."
        )
    if longest + config.evaluation_tokens > context:
        raise ModelError(
            f"the longest prompt ({longest} tokens) and --max-tokens = {config.evaluation_tokens} do not fit the {context} "
            f"positions of '{config.model.path}'. Lower --max-tokens to {context - longest} or less."
        )


def evaluation_sampling(config: Config, chat: Chat) -> Sampling:
    """How the [evaluation] table draws responses."""
    return Sampling(
        temperature=config.evaluation.temperature,
        top_p=config.evaluation.top_p,
        max_tokens=config.evaluation_tokens,
        stop_ids=chat.stop_ids,
        ends_text=chat.ends_text,
    )


def make_evaluate(config: Config, chat: Chat, grader: Grader) -> Evaluate:
    """The evaluation that a run calls: (engine, problems) to a score, with everything else bound."""
    sampling = evaluation_sampling(config, chat)

    def measure(engine: Engine, problems: Sequence[Problem]) -> Score:
        return evaluate(
            engine, problems, chat=chat, grader=grader, sampling=sampling, samples=config.evaluation.samples
        )

    return measure
