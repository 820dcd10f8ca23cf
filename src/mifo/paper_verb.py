"""Arguments of `mifo paper`; what it does is in `paper_commands`, which loads torch."""

from __future__ import annotations

import argparse

PAPER_HELP = """
Put the findings of the papers to the test: for each the claim, what was measured here with its interval, and a verdict
(reproduces, does not, cannot be told at this scale). Runs are processes of their own; what is finished is not run again.

examples:
  mifo paper --tier smoke                         # minutes: shows that everything runs
  mifo paper --tier mini                          # 40 minutes on two quiet cores, five seeds
  mifo paper --tier small --only magnitude,ablation
  mifo paper --list
"""


def add_paper_verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`mifo paper` with its flags."""
    parser = verbs.add_parser(
        "paper",
        help="put the findings of the papers to the test",
        description=PAPER_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tier",
        choices=("smoke", "mini", "small", "full"),
        default="smoke",
        help="how much is trained (default: smoke)",
    )
    parser.add_argument("--only", metavar="A,B,...", help="these findings alone, in this order")
    parser.add_argument("--list", action="store_true", help="list the findings with their runs, and train nothing")
    parser.add_argument("--folder", help="where it lives (default: runs/paper-TIER)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time, each with its share of the cores")
    parser.add_argument(
        "--arena", metavar="FOLDER", help="a finished arena whose runs stand for those of findings that allow it"
    )
    parser.set_defaults(run=_paper)


def _paper(known: argparse.Namespace) -> int:
    from mifo.paper_commands import paper_command

    return paper_command(known)
