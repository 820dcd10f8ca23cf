"""Arguments of the probes that train: `mifo probe bugs`, `forgetting` and `sparsify --online`."""

from __future__ import annotations

import argparse
from typing import Any

from mifo.errors import ConfigError

ONLINE_RECIPE, ONLINE_SEEDS = "smollm2-arithmetic", 3
WARMUP_DEFAULT = "default: 24 for SmolLM2 and 80 for mini, which solve nothing as they ship; else none"
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


def add_forgetting(probes: Probes[argparse.ArgumentParser]) -> None:
    """`mifo probe forgetting`."""
    parser = probes.add_parser(
        "forgetting",
        help="what a few steps of each objective after RL do to its accuracy",
        description="N steps of RL, then M steps of each objective from the same checkpoint. Each run is a process; the same "
        "command goes on where it was left (docs/lab.md).",
    )
    add_training(parser, recipe="smollm2-arithmetic", steps="M: steps of each objective", default=10)
    parser.add_argument("--rl-steps", type=int, default=50, metavar="N", help="steps of RL before them (default: 50)")
    parser.add_argument(
        "--objectives", nargs="+", metavar="NAME",
        help="rl (going on); ce and the other losses of SFT (dft, gem, psft, asft, eaft, chord_phi); es, pf, mifo: SFT on "
        "selected tokens, with freezing, with both; luffy, srft, relift; or recipes (default: rl ce dft es pf mifo luffy srft "
        "relift)",
    )  # fmt: skip
    add_start(parser)
    parser.set_defaults(run=_forgetting)


def add_online(parser: argparse.ArgumentParser) -> None:
    """What `mifo probe sparsify` takes for --online."""
    parser.add_argument(
        "--online", action="store_true", help="train SFT beside RL with shares of each gradient dropped, from a recipe"
    )
    group = parser.add_argument_group("with --online")
    group.add_argument("--recipe", metavar="NAME", help=f"recipe or TOML file (default: {ONLINE_RECIPE})")
    group.add_argument("--steps", type=int, metavar="N", help="steps of each run (default: the recipe's)")
    group.add_argument("--seeds", type=int, metavar="N", help=f"runs of each kind (default: {ONLINE_SEEDS})")
    group.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one for each core, at most 2)")
    group.add_argument("--batch-size", type=int, metavar="N", help="demonstrations an SFT step (default: 16)")
    group.add_argument("--start-model", metavar="MODEL", help="model to begin with (default: the recipe's)")
    group.add_argument("--warmup", type=int, metavar="N", help=f"SFT steps before both ({WARMUP_DEFAULT})")


def add_start(parser: argparse.ArgumentParser) -> None:
    """Where RL gets its signal from."""
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="demonstrations an SFT step (default: 16)"
    )
    parser.add_argument(
        "--start",
        metavar="MODEL",
        help="a Hugging Face folder or finished run to begin with (default: the recipe's model)",
    )
    parser.add_argument("--warmup", type=int, metavar="N", help=f"SFT steps before RL ({WARMUP_DEFAULT})")


def add_training(parser: argparse.ArgumentParser, *, recipe: str, steps: str, default: int | None = None) -> None:
    """What all of them take."""
    parser.add_argument("--recipe", default=recipe, metavar="NAME", help=f"recipe or TOML file (default: {recipe})")
    shown = "the recipe's" if default is None else default
    parser.add_argument("--steps", type=int, default=default, metavar="N", help=f"{steps} (default: {shown})")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each kind (default: 3)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one for each core, at most 2)")
    parser.add_argument("--out", default="probes", metavar="FOLDER", help="where to write (default: probes)")


def check_steps(known: argparse.Namespace, *names: str) -> None:
    """Numbers that were given are at least one; of steps of a warm-up, none will do.

    Raises:
        ConfigError: names the flag.
    """
    for name in names:
        value, least = getattr(known, name), 0 if name == "warmup" else 1
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: at least {least} is needed. Give a larger number.")


def refuse_flags(known: argparse.Namespace, given: str, defaults: dict[str, Any]) -> None:
    """Flags that have no effect beside another.

    Raises:
        ConfigError: one of them was set to something else than its default.
    """
    for name, default in defaults.items():
        if getattr(known, name) != default:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect {given}. Leave it out.")


def _bugs(known: argparse.Namespace) -> int:
    from mifo.training_probe_commands import bugs_command

    return bugs_command(known)


def _forgetting(known: argparse.Namespace) -> int:
    from mifo.training_probe_commands import forgetting_command

    return forgetting_command(known)
