"""The two bugs against gradients written out one token at a time, and the engine's own reduction beside them."""

import ast
import dataclasses
import os
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import make_sequences

import mifo
from mifo.config.load import load_config, recipe_names
from mifo.config.schema import Config, OptimizerConfig
from mifo.core.losses import CrossEntropy
from mifo.errors import ConfigError
from mifo.lab.bug_learner import DROPPED, MEANS, Bug, FaultyLearner
from mifo.train.build import build_run
from mifo.train.learner import Learner
from mifo.train.model import tiny_model
from mifo.train.optim import ScheduledAdamW
from mifo.train.policy import Policy
from mifo.types import Term, Update

LENGTHS = (2, 9, 5, 1, 7, 3, 12, 4, 6, 8, 1, 10)  # twelve sequences: two ranks of three micro-batches of two
CLOSE = 1e-6  # transformers computes norms of layers in fp32
SOURCE = Path(mifo.__file__).parent


def update_of(lengths=LENGTHS, seed=0):
    made = make_sequences(list(lengths), vocabulary=tiny_model(seed=0).config.vocab_size, seed=seed)
    sequences = tuple(replace(s, weights={"ce": 1.0}, sampler_logprobs=None) for s in made)
    return Update(sequences=sequences, terms=(Term(name="ce", loss=CrossEntropy()),))


def learn(update, bug=None, micro_batch_tokens=40):
    """(gradients by name, reported loss) of the engine's learner, or of the faulty one."""
    policy = Policy(tiny_model(seed=0).double())
    kind = Learner(policy, micro_batch_tokens=micro_batch_tokens)
    if bug is not None:
        kind = FaultyLearner(policy, micro_batch_tokens=micro_batch_tokens, bug=bug)
    tally = kind.accumulate(update)
    grads = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    return grads, tally.loss


def token_losses(model, sequence):
    """−log p of each response token, by the definition."""
    ids = torch.tensor([*sequence.prompt_ids, *sequence.response_ids])
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    begin = len(sequence.prompt_ids)
    return torch.stack([-logits[t - 1].log_softmax(0)[ids[t]] for t in range(begin, len(ids))])


def oracle(update, ranks, micro_batches, *, dropped=None, means=None):
    """The same, micro-batch by micro-batch, as a faulty code would go about it."""
    model = tiny_model(seed=0).double()
    each = len(update.sequences) // (ranks * micro_batches)
    total, rank_tokens = sum(len(s.response_ids) for s in update.sequences), []
    for k in range(ranks):
        own = update.sequences[k * micro_batches * each : (k + 1) * micro_batches * each]
        rank_tokens.append(sum(len(s.response_ids) for s in own))
    kept = {p: torch.zeros_like(p) for p in model.parameters()}
    reported = 0.0
    for k in range(ranks):
        for j in range(micro_batches):
            start = (k * micro_batches + j) * each
            tokens = torch.cat([token_losses(model, s) for s in update.sequences[start : start + each]])
            loss = {
                None: tokens.sum() / total,
                "micro_batch": tokens.mean() / (ranks * micro_batches),
                "rank": tokens.sum() / rank_tokens[k] / ranks,
            }[means]
            reported += float(loss.detach())
            gradient = torch.autograd.grad(loss, list(model.parameters()))
            survives = {None: True, "first": j == 0, "first_last": j in (0, micro_batches - 1)}[dropped]
            for parameter, part in zip(model.parameters(), gradient, strict=True):
                if survives:
                    kept[parameter] += part
    return {name: kept[p] for name, p in model.named_parameters()}, reported


def far(one, other):
    """Distance of two gradients relative to the first."""
    norm = sum(float(g.square().sum()) for g in one.values()) ** 0.5
    return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5 / norm


@pytest.mark.parametrize("dropped", [None, *DROPPED])
@pytest.mark.parametrize("means", [None, *MEANS])
def test_each_faulty_gradient_is_that_of_its_definition(dropped, means):
    update = update_of()
    bug = Bug(dropped=dropped, means=means, ranks=2, micro_batches=3)
    grads, loss = learn(update, bug)
    wanted, reported = oracle(update, 2, 3, dropped=dropped, means=means)
    assert far(wanted, grads) < CLOSE
    assert loss == pytest.approx(reported, rel=CLOSE)
    right, true_loss = learn(update)
    if bug == Bug(ranks=2, micro_batches=3):
        assert far(right, grads) < 1e-9
    else:
        assert far(right, grads) > 1e-2  # the case tells them apart
    assert far(oracle(update, 1, 1)[0], right) < CLOSE  # the engine's own is untouched
    assert (loss == pytest.approx(true_loss, rel=1e-9)) == (
        means is None
    )  # a dropped gradient does not show in the loss


def test_faulty_gradients_do_not_depend_on_the_budget_of_the_engine():
    update, bug = update_of(), Bug(dropped="first_last", means="micro_batch", ranks=1, micro_batches=4)
    assert far(learn(update, bug, 15)[0], learn(update, bug, 10_000)[0]) < 1e-9


def test_two_micro_batches_hide_the_dropped_ones():
    update = update_of()
    assert far(learn(update)[0], learn(update, Bug(dropped="first_last", micro_batches=2))[0]) < 1e-9
    assert far(learn(update)[0], learn(update, Bug(dropped="first", micro_batches=2))[0]) > 1e-2


def test_equal_micro_batches_give_their_share_where_most_are_lost():
    one = update_of((5,)).sequences
    update = replace(update_of(), sequences=one * 6)
    right, _ = learn(update)
    lost, _ = learn(update, Bug(dropped="first_last", micro_batches=6))
    assert far({name: g / 3 for name, g in right.items()}, lost) < 1e-9  # 2/G
    mean, _ = learn(update, Bug(means="micro_batch", micro_batches=6))
    assert far(right, mean) < 1e-9  # equal lengths: nothing shows


def test_the_example_of_a_mean_of_means():
    bug = Bug(means="micro_batch", ranks=1, micro_batches=2)
    scales = bug.scales([10, 1000])
    assert 30.0 * scales[0] + 500.0 * scales[1] == 1.75  # 0.52475 is right


def test_the_step_after_a_faulty_gradient_is_the_engines():
    update = update_of()
    policy = Policy(tiny_model(seed=0).double())
    learner = FaultyLearner(policy, micro_batch_tokens=40, bug=Bug(dropped="first", micro_batches=3))
    report = learner.apply(update, ScheduledAdamW(policy.parameters, OptimizerConfig(clip_norm=0.5)))
    wanted, _ = oracle(update, 1, 3, dropped="first")
    assert report.grad_norm == pytest.approx(sum(float(g.square().sum()) for g in wanted.values()) ** 0.5, rel=CLOSE)
    assert report.taken
    assert all(p.grad is None for p in policy.parameters)


def test_more_micro_batches_than_sequences_are_refused():
    with pytest.raises(ConfigError, match=r"--ranks 2 --micro-batches 8: 16 micro-batches .* has 12"):
        learn(update_of(), Bug(ranks=2, micro_batches=8, dropped="first"))


# --- nothing that trains leads to them -----------------------------------------------------------------------------------


def importers_of(*modules):
    """Modules of the package that import one of these, anywhere in their source."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text if "mifo.lab.bug" in text else "")):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name in modules for name in names):
                found.add(str(path.relative_to(SOURCE)))
    return found


def test_only_the_lab_imports_the_bugs():
    assert importers_of("mifo.lab.bug_learner") == {"lab/bug_run.py", "lab/bugs.py"}
    assert importers_of("mifo.lab.bug_run") == {"lab/bugs.py"}
    named = {p.name for p in SOURCE.rglob("*.py") if "FaultyLearner" in p.read_text(encoding="utf-8")}
    assert named == {"bug_learner.py", "bug_run.py"}  # what makes one
    givers = {p.name for p in SOURCE.rglob("*.py") if "learner_type=" in p.read_text(encoding="utf-8")}
    assert givers == {"build.py", "bug_run.py", "child_run.py"}


def words_of(kind, seen):
    """Names of all settings below a type of the schema, and every word that one of them may be set to."""
    if kind in seen:
        return set()
    seen.add(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return set(hints) | set().union(*(words_of(hint, seen) for hint in hints.values()))
    if typing.get_origin(kind) is typing.Literal:
        return {str(value) for value in typing.get_args(kind)}
    return set().union(*(words_of(part, seen) for part in typing.get_args(kind)))


def test_no_setting_method_recipe_or_variable_leads_to_the_bugs():
    words = words_of(Config, set())
    assert {"mifo", "first", "gradient_drop"} - words == {"first"}  # methods, values and fields are among them
    assert not words & {*DROPPED, *MEANS, "dropped", "means", "bug", "learner_type"}
    assert not [name for name in recipe_names() if "bug" in name]
    with pytest.raises(SystemExit):
        load_config("tiny", ["--train.dropped", "first_last"])
    for name in ("bug_learner.py", "bug_run.py", "bugs.py", "child_run.py"):
        text = (SOURCE / "lab" / name).read_text(encoding="utf-8")
        assert "os.environ" not in text
        assert "getenv" not in text


def test_a_run_is_built_with_the_engines_learner_whatever_the_environment_says(tmp_path, monkeypatch):
    from mifo.eval.score import make_evaluate
    from mifo.train.build import make_grader, prepare

    monkeypatch.setitem(os.environ, "MIFO_BUG", "first_last")
    _, config = load_config("tiny")
    with make_grader(config) as grader:
        run = build_run(
            prepare(config, grader),
            grader,
            tmp_path / "run",
            make_evaluate=make_evaluate,
            listener=lambda kind, record: None,
        )
    assert type(run.learner) is Learner
    run.close()
