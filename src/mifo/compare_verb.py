"""Arguments of `mifo compare`; what it does is in `compare_commands`, which loads torch."""

from __future__ import annotations

import argparse

COMPARE_HELP = """
Train methods from the same checkpoint on the same data at an equal budget, and say which is better, by how much, how sure.
Runs are processes of their own. What is finished is not run again, what was stopped goes on: use the same command.

examples:
  mifo compare --recipe tiny --methods mifo,relift,sft --seeds 2
  mifo compare arenas/embedded.toml --jobs 2
  mifo compare --report runs/compare-embedded runs/mine --folder report
"""


def add_compare_verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`mifo compare` with its flags."""
    parser = verbs.add_parser(
        "compare",
        help="compare methods at an equal budget",
        description=COMPARE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arena", nargs="?", metavar="ARENA.toml", help="an arena file (docs/compare.md)")
    parser.add_argument("--recipe", help="instead of a file: model, data and rollouts of this recipe")
    parser.add_argument("--methods", metavar="A,B,...", help="methods, or recipes that extend the one of --recipe")
    parser.add_argument(
        "--report", nargs="+", metavar="RUN", help="compare existing run folders or arenas; train nothing"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="final runs of each method (default: the file's, or 2)")
    parser.add_argument(
        "--reference", metavar="METHOD", help="what differences are to (default: the file's, or the first)"
    )
    parser.add_argument(
        "--no-tune", action="store_true", help="the recipes' learning rates, no grid; the report says so"
    )
    budget = parser.add_argument_group(
        "budget of a run (one of them; default: the file's, or half of what the recipe would take)"
    )
    budget.add_argument("--flops", type=float, metavar="N", help="training FLOPs: 2ND generated, 6ND trained")
    budget.add_argument("--tokens", type=int, metavar="N", help="response tokens generated and trained on")
    budget.add_argument("--steps", type=int, metavar="N", help="steps")
    budget.add_argument("--minutes", type=float, metavar="N", help="wall time")
    budget.add_argument("--tolerance", type=float, metavar="SHARE", help="deviation that is not ranked (default: 0.05)")
    parser.add_argument(
        "--allow-different", action="append", metavar="SETTING", help="a setting that methods may differ in"
    )
    parser.add_argument("--folder", help="where it lives (default: runs/compare-NAME; for --report nothing is written)")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time, each with its share of the cores (default: 2)"
    )
    parser.add_argument(
        "--keep-models", action="store_true", help="keep checkpoints and exported models of finished runs"
    )
    parser.set_defaults(run=_compare)


def _compare(known: argparse.Namespace) -> int:
    from mifo.compare_commands import compare_command

    return compare_command(known)
