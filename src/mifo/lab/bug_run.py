"""One SFT run with a faulty reduction, in a process of its own: a lab setting.

    python -m mifo.lab.bug_run --dropped first_last --means micro_batch --ranks 2 --micro-batches 4 CONFIG.toml [--resume]

Beside what a run writes, held_out.json has the loss of the trained model on held-out demonstrations: the loss that the run itself
reports is, under a mean of means, not that of its tokens.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial

from mifo.config.schema import Config
from mifo.errors import DataError
from mifo.lab.bug_learner import DROPPED, MEANS, Bug, FaultyLearner
from mifo.lab.child_run import Swaps, child_parser, train_child
from mifo.rewards import Grader
from mifo.train.build import make_chat, verifier
from mifo.train.corpus import NONE, read_corpus
from mifo.train.learner import Learner
from mifo.train.model import load_tokenizer
from mifo.train.run import Run
from mifo.train.storage import replace_file
from mifo.types import Sequence

HELD_OUT = "held_out.json"


def held_out_loss(run: Run, grader: Grader) -> float | None:
    """Mean loss of a token of the held-out problems' demonstrations, in nats; None where they have none."""
    data = run.config.data
    if data.evaluation == NONE:
        return None
    source = "embedded:test" if data.evaluation == "embedded" else data.evaluation
    data = replace(
        data, train=source, train_problems=data.evaluation_problems, split=data.evaluation_split, evaluation=NONE
    )
    config = replace(run.config, data=data)
    chat = make_chat(config, load_tokenizer(config.model))
    try:
        corpus = read_corpus(config, chat, verifier(grader), needs_demonstrations=True)
    except DataError:
        return None
    rows = run.learner.logprobs(
        [
            Sequence(problem_id=name, prompt_ids=e.prompt_ids, response_ids=e.demonstration_ids, weights={"ce": 1.0})
            for name, e in corpus.encoded.items()
            if e.demonstration_ids
        ]
    )
    return -sum(map(sum, rows)) / sum(map(len, rows))


def _measure(run: Run, grader: Grader) -> None:
    record = {"loss": held_out_loss(run, grader)}
    replace_file(run.parts.storage, run.parts.folder / HELD_OUT, json.dumps(record).encode("utf-8"))


def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit status of `mifo train`."""
    parser = child_parser("mifo.lab.bug_run")
    parser.add_argument("--dropped", choices=DROPPED)
    parser.add_argument("--means", choices=MEANS)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=4)
    known = parser.parse_args(arguments)
    bug = Bug(dropped=known.dropped, means=known.means, ranks=known.ranks, micro_batches=known.micro_batches)

    def swaps(config: Config) -> Swaps:
        faulty = bug.dropped is not None or bug.means is not None
        return Swaps(learner_type=partial(FaultyLearner, bug=bug) if faulty else Learner, measure=_measure)

    return train_child(known.file, resume=known.resume, make_swaps=swaps)


if __name__ == "__main__":
    sys.exit(main())
