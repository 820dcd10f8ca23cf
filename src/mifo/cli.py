"""The command line: verbs, with heavy imports only where a verb needs them.

mifo train RECIPE_OR_TOML [--method.freeze-top 0.3 ...] [--resume] [--dry-run]
mifo eval MODEL_OR_RUN --data FILE
mifo recipes | mifo methods
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from mifo import __version__
from mifo.errors import MifoError

TRAIN_USAGE = "mifo train RECIPE_OR_TOML [--SECTION.SETTING VALUE ...] [--resume] [--dry-run]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status (0 done, 2 the user's mistake, 130 interrupted)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    if known.verb is None:
        parser.print_help()
        return 0
    if rest and known.verb != "train":
        parser.error(f"unknown arguments: {' '.join(rest)}")
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # before torch: idle threads sleep instead of spinning
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return int(known.run(known, rest))
    except MifoError as error:
        print(f"mifo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mifo: interrupted; continue with --resume", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mifo", description="Train language models with SFT and RL together, without one erasing the other."
    )
    parser.add_argument("--version", action="version", version=f"mifo {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND")
    train = verbs.add_parser("train", help="train by a recipe or TOML file", add_help=False, usage=TRAIN_USAGE)
    train.add_argument("recipe", nargs="?")
    train.add_argument("--resume", action="store_true")
    train.add_argument("--dry-run", action="store_true")
    train.add_argument("-h", "--help", action="store_true")
    train.set_defaults(run=_train)
    evaluate = verbs.add_parser("eval", help="measure a model or a finished run on a file of problems")
    evaluate.add_argument("model", help="a run folder, a Hugging Face folder, a hub id, or the embedded model")
    evaluate.add_argument(
        "--data",
        default="embedded",
        help="a data file, or embedded, embedded:validation, embedded:ood (default: embedded)",
    )
    evaluate.add_argument("--split", default="test", help="split of a datasets folder or hub data set (default: test)")
    evaluate.add_argument("--limit", type=int, default=None, help="measure on the first so many problems")
    evaluate.add_argument("--samples", type=int, default=1, help="responses a problem, averaged (default: 1)")
    evaluate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    evaluate.add_argument("--max-tokens", type=int, default=None, help="longest response (default: of the run, or 512)")
    evaluate.add_argument(
        "--template", default=None, help="tokenizer, luffy, qwen, prime or none (default: of the run)"
    )
    evaluate.add_argument("--system-prompt", default=None, help="system turn for the template tokenizer")
    evaluate.add_argument("--json", default=None, metavar="FILE", help="also write the figures to a file")
    evaluate.set_defaults(run=_eval)
    verbs.add_parser("recipes", help="list the shipped recipes").set_defaults(run=_recipes)
    verbs.add_parser("methods", help="list the methods").set_defaults(run=_methods)
    return parser


def _train(known: argparse.Namespace, flags: list[str]) -> int:
    from mifo.config.load import load_config

    if known.help or known.recipe is None:
        print(f"usage: {TRAIN_USAGE}\n\nRecipes: see `mifo recipes`. Settings, with the defaults of ", end="")
        print(f"{known.recipe or 'the schema'}:\n")
        load_config(known.recipe or "tiny", ["--help"])
        return 0
    recipe, config = load_config(known.recipe, flags)
    _quiet_libraries()
    from mifo.commands import dry_run, train_command

    if known.dry_run:
        return dry_run(recipe, config)
    return train_command(recipe, config, resume=known.resume)


def _eval(known: argparse.Namespace, _: list[str]) -> int:
    _quiet_libraries()
    from mifo.commands import eval_command

    return eval_command(known)


def _recipes(_: argparse.Namespace, __: list[str]) -> int:
    from mifo.config.load import read_recipe, recipe_names

    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {read_recipe(name).description}")
    return 0


def _methods(_: argparse.Namespace, __: list[str]) -> int:
    from mifo.config.describe import method_descriptions

    for name, description in method_descriptions():
        print(f"{name:<6}  {description}")
    return 0


def _quiet_libraries() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "urllib3", "filelock", "datasets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
