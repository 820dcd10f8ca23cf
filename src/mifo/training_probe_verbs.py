"""Arguments of the probes that train: `mifo probe bugs`, `forgetting` and `sparsify --online`."""

from __future__ import annotations

import argparse

from mifo.errors import ConfigError

Probes = argparse._SubParsersAction  # of the parsers of `mifo probe`


def add_bugs(probes: Probes[argparse.ArgumentParser]) -> None:
    """`mifo probe bugs`."""
    parser = probes.add_parser(
        "bugs",
        help="what dropped micro-batches and a mean of means cost an SFT run",
        description="Trains SFT on a recipe's model and data, once right and once with each bug of the corrected-baseline paper "
        "and with both. Each run is a process; the same command goes on where it was left (docs/lab.md).",
    )
    add_training(parser, recipe="sft-smollm2", steps="SFT updates of each run")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="demonstrations an update (default: 16)"
    )
    parser.add_argument("--ranks", type=int, default=2, metavar="W", help="ranks that are simulated (default: 2)")
    parser.add_argument(
        "--micro-batches", type=int, default=8, metavar="G", help="micro-batches of each rank, at least 3 (default: 8)"
    )
    parser.set_defaults(run=_bugs)


def add_training(parser: argparse.ArgumentParser, *, recipe: str, steps: str) -> None:
    """What all of them take."""
    parser.add_argument("--recipe", default=recipe, metavar="NAME", help=f"recipe or TOML file (default: {recipe})")
    parser.add_argument("--steps", type=int, metavar="N", help=f"{steps} (default: the recipe's)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each kind (default: 3)")
    add_place(parser)
    parser.add_argument("--out", default="probes", metavar="FOLDER", help="where to write (default: probes)")


def add_place(parser: argparse.ArgumentParser) -> None:
    """How many processes."""
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one for each core, at most 2)")


def check_steps(known: argparse.Namespace, *names: str) -> None:
    """Numbers that were given are at least one.

    Raises:
        ConfigError: names the flag.
    """
    for name in names:
        value = getattr(known, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: at least 1 is needed. Give a larger number.")


def _bugs(known: argparse.Namespace) -> int:
    from mifo.training_probe_commands import bugs_command

    return bugs_command(known)
