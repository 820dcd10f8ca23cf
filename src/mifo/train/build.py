"""From a checked configuration to a run: everything is made here, once, in the order in which it can fail cheaply."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mifo.config.legacy import warning as legacy_warning
from mifo.config.schema import Config
from mifo.core.surgery import GradientDrop
from mifo.data.chat import Chat
from mifo.data.problems import Verify
from mifo.errors import DataError, ModelError
from mifo.methods import Method, make_method
from mifo.rewards import Answer, Grader
from mifo.rollout.engine import Engine, make_engine
from mifo.rollout.weights import why_unsupported
from mifo.train.checkpoint import load_checkpoint
from mifo.train.corpus import EMBEDDED_SPLITS, Corpus, read_corpus
from mifo.train.device import pick_device, pick_dtype, set_up_cpu
from mifo.train.folder import check_folder, check_never_saved, open_checkpoints, open_folder
from mifo.train.gap import SamplerWatch
from mifo.train.learner import Learner
from mifo.train.manifest import read_manifest
from mifo.train.model import generation_eos, hash_weights, load_model, load_tokenizer
from mifo.train.optim import ScheduledAdamW
from mifo.train.parallel import current_world
from mifo.train.policy import Policy
from mifo.train.rejuvenate import calibration_pairs, check_base
from mifo.train.run import Evaluate, Listener, Parts, Run
from mifo.train.scorer import Scorer, make_scorer
from mifo.train.stop import Stop
from mifo.train.storage import Storage

log = logging.getLogger(__name__)

EvaluatorFactory = Callable[[Config, Chat, Grader], Evaluate]
LearnerFactory = Callable[..., Learner]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What is known before the model's weights are loaded."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    chat: Chat
    methods: tuple[Method, ...]
    """One for each stage."""
    corpus: Corpus


def make_grader(config: Config) -> Grader:
    """The grader of the [reward] table."""
    reward = config.reward
    return Grader(
        workers=reward.workers,
        seconds_per_answer=reward.seconds_per_answer,
        memory_mib=reward.worker_memory_mib,
        unsafe_code=reward.unsafe_code_execution,
    )


def make_chat(config: Config, tokenizer: PreTrainedTokenizerBase) -> Chat:
    """Templates and stop ids of a run; the model's own generation configuration may name further end tokens."""
    data = config.data
    return Chat(
        tokenizer,
        data.template,
        data.system_prompt,
        generation_eos(config.model),
        append_end=config.legacy.append_end,
        stop_texts=config.rollout.stop_texts,
    )


def verifier(grader: Grader) -> Verify:
    """What judges the demonstrations of data files: the same grader that judges responses."""
    return lambda rows: grader.grade([Answer(grader=name, gold=answer, text=text) for name, text, answer in rows])


def prepare(config: Config, grader: Grader) -> Prepared:
    """Tokenizer, templates, method and data: everything that a wrong configuration can break cheaply."""
    if config.legacy.name != "none":
        log.warning(legacy_warning(config.legacy))
    pick_device(config.model.device)
    tokenizer = load_tokenizer(config.model)
    chat = make_chat(config, tokenizer)
    methods = tuple(map(make_method, config.by_stage))
    needs_demonstrations = any(method.needs_demonstrations for method in methods)
    corpus = read_corpus(config, chat, verifier(grader), needs_demonstrations=needs_demonstrations)
    grader.require({problem.grader for problem in (*corpus.train, *corpus.evaluation)})
    for method, stage in zip(methods, config.by_stage, strict=True):
        _check_demonstrations(method, corpus, stage)
    for settings in config.rejuvenations:
        calibration_pairs(corpus, settings)
    return Prepared(config=config, tokenizer=tokenizer, chat=chat, methods=methods, corpus=corpus)


def build_run(
    prepared: Prepared,
    grader: Grader,
    folder: Path,
    *,
    make_evaluate: EvaluatorFactory,
    listener: Listener,
    resume: bool = False,
    stop: Stop | None = None,
    storage: Storage | None = None,
    learner_type: LearnerFactory = Learner,
) -> Run:
    """Load the model and put a run together in `folder`; resumed from the newest whole checkpoint, if asked, or from its
    beginning where it was killed before it had one.

    `learner_type` is called as `Learner` is; the lab's faulty one is the only other, and no configuration leads to it.

    Raises:
        CheckpointError: the folder holds a run and `resume` is false, or `resume` is true and there is nothing to resume
            or the configuration differs, or no checkpoint is whole.
        ModelError: the model cannot do what the configuration asks.
    """
    config, storage = prepared.config, storage or Storage()
    if any(p.grader == "math" for p in prepared.corpus.train) and config.data.train not in EMBEDDED_SPLITS:
        grader.warm_up()  # loads its libraries beside the model; answers to embedded problems hardly ever need them
    check_folder(folder, config, resume=resume)
    checkpoints = open_checkpoints(folder, config, storage)
    newest, refused = checkpoints.newest_good(verify=config.run.verify_checkpoints) if resume else (None, [])
    if resume and newest is None:
        check_never_saved(folder)
    run = Run(
        parts=_load_parts(
            prepared,
            learner_type,
            folder=folder,
            grader=grader,
            evaluate=make_evaluate(config, prepared.chat, grader) if prepared.corpus.evaluation else None,
            listener=listener,
            stop=stop or Stop(),
            checkpoints=checkpoints,
            storage=storage,
        )
    )
    open_folder(folder, config, storage)
    if resume:
        run.restore(None if newest is None else load_checkpoint(newest))
        run.emit("events", _resumed(run, newest, refused))
    return run


def _resumed(run: Run, newest: Path | None, refused: Sequence[str]) -> dict[str, Any]:
    """The event of going on; `other_code` are the versions that wrote the checkpoint where they are not these."""
    code = run.parts.checkpoints.code
    written = code if newest is None else read_manifest(newest).code
    return {
        "event": "resumed",
        "step": run.steps,
        "iteration": run.iterations,
        "checkpoint": None if newest is None else newest.name,
        "refused": list(refused),
        "other_code": None if written == code else dict(written),
    }


def _load_parts(prepared: Prepared, learner_type: LearnerFactory, **others: Any) -> Parts:
    """The parts that need the model; `others` are passed on."""
    config = prepared.config
    set_up_cpu(config.train.threads)
    device = pick_device(config.model.device)
    dtype = pick_dtype(config.model.compute, device)
    model = load_model(config.model, seed=config.train.seed).to(device)
    check_suitable(model, config, prepared.corpus)
    window = others["stop"].window
    needs_reference = any(method.needs_reference for method in prepared.methods)
    learner = _make_learner(
        model, config, device, dtype, learner_type=learner_type, with_reference=needs_reference, window=window
    )
    goes_back = any(settings.base is None for settings in config.rejuvenations)
    reference_hash = hash_weights(model) if needs_reference or goes_back else None
    first = config.by_stage[0]
    return Parts(
        config=config,
        chat=prepared.chat,
        corpus=prepared.corpus,
        methods=prepared.methods,
        learner=learner,
        engine=build_engine(model, config, device, dtype),
        optimizers={
            "rl": ScheduledAdamW(learner.parameters, first.rl_optimizer),
            "sft": ScheduledAdamW(learner.parameters, first.sft_optimizer),
        },
        scorer=_make_scorer(prepared, learner, window),
        reference_hash=reference_hash,
        **others,
    )


def _make_scorer(
    prepared: Prepared, learner: Learner, window: Callable[[], AbstractContextManager[None]]
) -> Scorer | None:
    name = next((method.scorer for method in prepared.methods if method.scorer is not None), None)
    if name is None:
        return None
    return make_scorer(name, learner.policy, prepared.config, reference=learner.reference, window=window)


def _make_learner(
    model: PreTrainedModel,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    *,
    learner_type: LearnerFactory,
    with_reference: bool,
    window: Callable[[], AbstractContextManager[None]],
) -> Learner:
    policy, reference, train = make_policy(model, config, dtype), None, config.train
    if with_reference:
        reference = make_policy(copy.deepcopy(model).requires_grad_(False), config, dtype)
    return learner_type(
        policy,
        micro_batch_tokens=train.micro_batch_tokens,
        world=current_world(),
        reference=reference,
        sampler_watch=make_sampler_watch(config, device, dtype),
        window=window,
        gradient_drop=GradientDrop(train.gradient_drop, train.seed) if train.gradient_drop > 0 else None,
    )


def make_policy(model: PreTrainedModel, config: Config, dtype: torch.dtype) -> Policy:
    """The policy as the [model] table asks for it."""
    return Policy(
        model,
        compute_dtype=dtype,
        layout=config.model.layout,
        activation_checkpointing=config.model.activation_checkpointing,
    )


def build_engine(model: PreTrainedModel, config: Config, device: torch.device, dtype: torch.dtype) -> Engine:
    """The rollout engine of the [rollout] table, holding the model's weights as version 0."""
    rollout = config.rollout
    return make_engine(
        model,
        kind=rollout.engine,
        dtype=_sampler_dtype(config, device, dtype),
        device=device,
        max_batch_rows=rollout.batch_rows,
    )


def make_sampler_watch(config: Config, device: torch.device, dtype: torch.dtype) -> SamplerWatch | None:
    """What judges the gap between sampler and trainer. None where sampling is not plain (temperature, top-p): the sampler's
    log-probs are then those of another distribution."""
    rollout = config.rollout
    if rollout.temperature != 1.0 or rollout.top_p != 1.0:
        return None
    low = [d for d in (dtype, _sampler_dtype(config, device, dtype)) if d != torch.float32]
    return SamplerWatch(rollout.gap_alarm, low[0] if low else torch.float32)


def _sampler_dtype(config: Config, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    return dtype if config.rollout.compute == "auto" else pick_dtype(config.rollout.compute, device)


def _check_demonstrations(method: Method, corpus: Corpus, config: Config) -> None:
    held, least = corpus.with_demonstration, method.least_demonstrations
    if held >= least:
        return
    if held:
        raise DataError(
            f"data.train = '{config.data.train}': {held} problems have a verified demonstration, but method.buffer_size = "
            f"{least} different ones would have to wait before an SFT phase begins, so there would never be one. Lower "
            f"method.buffer_size to at most {held}, or bring more data. {corpus.notes[0]}"
        )
    raise DataError(
        f"data.train = '{config.data.train}': no problem has a verified demonstration, so method.name = "
        f"'{config.method.name}' would never learn from one. {corpus.notes[0]} Solutions that are right but end without "
        "a boxed answer can be used with data.box_answers = true; for RL alone use method.name = 'grpo'."
    )


def check_suitable(model: torch.nn.Module, config: Config, corpus: Corpus) -> None:
    """What shows of a model without its weights: its context, its vocabulary, and whether the engine asked for can run it.

    Raises:
        ModelError: names the setting, what the model has, and the remedy.
    """
    check_base(config, model)
    check_context(model.config.max_position_embeddings, config, corpus)
    words = model.get_input_embeddings().num_embeddings
    highest = max(max(e.prompt_ids + (e.demonstration_ids or ())) for e in corpus.encoded.values())
    if highest >= words:
        raise ModelError(
            f"model.path = '{config.model.path}': its tokenizer gives token {highest}, but the model has embeddings for {words} "
            "tokens only. The tokenizer belongs to another model: put the right one into the folder."
        )
    reason = why_unsupported(model) if config.rollout.engine == "local" else None
    if reason is not None:
        raise ModelError(f"rollout.engine = 'local': {reason}. Use rollout.engine = 'auto' or 'generate'.")


def check_context(context: int, config: Config, corpus: Corpus) -> None:
    """Prompts with responses, and prompts with demonstrations, must fit the model's context.

    Raises:
        ModelError: names the longest, the context and the remedy.
    """
    response = max(config.rollout.max_response_tokens, config.evaluation_tokens)
    if corpus.longest_prompt + response > context:
        raise ModelError(
            f"the longest prompt ({corpus.longest_prompt} tokens) and rollout.max_response_tokens = "
            f"{config.rollout.max_response_tokens} need {corpus.longest_prompt + response} positions; '{config.model.path}' has "
            f"{context}. Lower max_response_tokens or data.max_prompt_tokens, or raise model.context (and model.rope_theta)."
        )
    if corpus.longest_demonstrated > context:
        raise ModelError(
            f"the longest prompt with its demonstration has {corpus.longest_demonstrated} tokens; '{config.model.path}' has "
            f"{context} positions. Lower data.max_demonstration_tokens = {config.data.max_demonstration_tokens}, or raise "
            "model.context (and model.rope_theta)."
        )
