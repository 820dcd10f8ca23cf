"""The command line: verbs, with heavy imports only where a verb needs them.

    mifo train RECIPE_OR_TOML [--method.freeze-top 0.3 ...] [--resume] [--dry-run]
    mifo eval MODEL_OR_RUN --data FILE
    mifo probe magnitude|overlap|entropy|sparsify|redundancy|coupling ...
    mifo rejuvenate --base MODEL --over MODEL --data FILE --out FOLDER
    mifo compare ARENA.toml | --recipe RECIPE --methods A,B | --report RUN...
    mifo recipes | mifo methods

Help, lists and every mistake in a configuration are answered without torch. `train` reads its own arguments, since its
flags are the settings of the schema; the other verbs are argparse's.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace

from mifo import __version__
from mifo.compare_verb import add_compare_verb
from mifo.errors import ConfigError, MifoError
from mifo.lab_verbs import add_lab_verbs
from mifo.paper_verb import add_paper_verb
from mifo.printable import PrintableFormatter, printable

TRAIN_USAGE = "usage: mifo train RECIPE_OR_TOML [--SECTION.SETTING VALUE ...] [--resume [--no-verify]] [--dry-run]"
TRAIN_HELP = """
Train a model as a recipe or a TOML file says. Flags come after it and override its settings.

  --dry-run   read the data, show a prompt, estimate memory and time; train nothing
  --resume    continue the run from its newest whole checkpoint; with --dry-run, say which
  --no-verify resume without comparing the hashes of the checkpoint's files
  --unsafe-code-execution
              run programs that the model writes without a sandbox where bubblewrap is missing
  -h, --help  this text; after a recipe, with the recipe's values

exit status:
  0  done                  2  a mistake, or an error that names its remedy
  3  Ctrl-C (SIGINT)       4  SIGTERM: what is under way is broken off, the run saved
  A second signal ends at once (130, 143 in a shell). --resume goes on in the same bits.

examples:
  mifo train tiny
  mifo train smollm2-arithmetic --dry-run
  mifo train smollm2-arithmetic --method.freeze-top 0.3 --run.name freeze-30
  mifo train gsm8k-smollm2 --data.train train.jsonl --data.evaluation test.jsonl
"""
UNSAFE = "--unsafe-code-execution"
SHOWN_OF_A_NAME = 120
EXIT_USER_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 2, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status (0 done, 2 the user's mistake, 3 and 4 stopped and saved, 130 interrupted).

    Raises:
        SystemExit: help was printed, or a flag has the wrong form (status 2).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # before torch: idle threads sleep instead of spinning
    os.environ.setdefault(
        "THP_MEM_ALLOC_ENABLE", "1"
    )  # huge pages for large tensors, where the kernel has them on request
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return _run(arguments)
    except MifoError as error:
        print(f"mifo: {printable(str(error))}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("mifo: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        print(f"mifo: {printable(_refused(error))}", file=sys.stderr)
        return EXIT_USER_ERROR


def _refused(error: OSError) -> str:
    """What the system refused: the file, the reason, the remedy."""
    remedies = {
        errno.ENOSPC: "Free some space",
        errno.EDQUOT: "Free some space",
        errno.EROFS: "Choose a folder that can be written to",
        errno.EACCES: "Choose another folder, or mend the rights",
        errno.EPERM: "Choose another folder, or mend the rights",
        errno.ENAMETOOLONG: "Give a shorter name",
        errno.EMFILE: "Close other programs, or raise the limit on open files (ulimit -n)",
    }
    name = str(error.filename or "a file")
    shown = name if len(name) <= SHOWN_OF_A_NAME else f"{name[:SHOWN_OF_A_NAME]}..."
    remedy = remedies.get(error.errno or 0, "Mend that")
    return f"{shown}: {error.strerror or error}. {remedy}, then use the same command again: what is finished stays."


def _run(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["train"]:
        return _train(arguments[1:])
    parser = _parser()
    known = parser.parse_args(arguments)
    if known.verb is None:
        parser.print_help()
        return 0
    return int(known.run(known))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mifo", description="Train language models with SFT and RL together, without one erasing the other."
    )
    parser.add_argument("--version", action="version", version=f"mifo {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", title="commands (mifo COMMAND --help says more)")
    verbs.add_parser("train", help="train by a recipe or TOML file", add_help=False)
    _add_eval_arguments(verbs.add_parser("eval", help="measure a model or a finished run on held-out problems"))
    add_lab_verbs(verbs)
    add_compare_verb(verbs)
    add_paper_verb(verbs)
    verbs.add_parser("recipes", help="list the shipped recipes").set_defaults(run=_recipes)
    verbs.add_parser("methods", help="list the methods").set_defaults(run=_methods)
    return parser


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="a run folder, a Hugging Face folder, a hub id, or smollm2-135m-instruct (embedded)"
    )
    parser.add_argument(
        "--data",
        help="a data file or hub id, or embedded, embedded:validation, embedded:ood (default: the held-out problems of the "
        "run, or embedded)",
    )
    parser.add_argument("--split", help="split of a datasets folder or hub data set (default: as in the run, or test)")
    parser.add_argument("--limit", type=int, metavar="N", help="measure on the first N problems")
    parser.add_argument(
        "--samples", type=int, default=1, metavar="N", help="responses a problem, averaged (default: 1)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="of the sampling; 0 is greedy (default: 0)"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest response (default: as in the run, or 512)")
    parser.add_argument(
        "--template",
        choices=("tokenizer", "luffy", "qwen", "prime", "none"),
        help="how a problem becomes a prompt (default: as in the run, or tokenizer)",
    )
    parser.add_argument(
        "--system-prompt",
        metavar="TEXT",
        help="system turn (default: as in the run; else the template's own, and a request for a boxed answer on embedded data)",
    )
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: as in the run, or auto)")
    parser.add_argument(
        UNSAFE,
        action="store_true",
        help="run programs that the model writes without a sandbox where bubblewrap is missing; they can delete your files",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to a file")
    parser.set_defaults(run=_eval)


def _train(arguments: Sequence[str]) -> int:
    arguments = ["--reward.unsafe-code-execution" if word == UNSAFE else word for word in arguments]
    switches = {"--resume", "--no-verify", "--dry-run", "-h", "--help"}
    chosen, rest = switches.intersection(arguments), [word for word in arguments if word not in switches]
    if chosen & {"-h", "--help"}:
        _train_help(rest)
        return 0
    if not rest or rest[0].startswith("-"):
        from mifo.config.load import recipe_names

        raise ConfigError(
            f"train needs a recipe or a TOML file first, then flags.\n{TRAIN_USAGE}\nRecipes: {', '.join(recipe_names())}."
        )
    from mifo.config.load import load_config

    recipe, config = load_config(rest[0], rest[1:])
    resume = "--resume" in chosen
    if "--no-verify" in chosen:
        if not resume:
            raise ConfigError("--no-verify has no effect without --resume: nothing is read back. Leave it out.")
        config = replace(config, run=replace(config.run, verify_checkpoints=False))
    quiet_libraries()
    from mifo.commands import dry_run, train_command

    if "--dry-run" in chosen:
        return dry_run(recipe, config, resume=resume)
    return train_command(recipe, config, flags=rest[1:], resume=resume)


def _train_help(rest: Sequence[str]) -> None:
    """Usage, recipes and settings; with the values of a recipe where one is named."""
    from mifo.config.help import settings_help
    from mifo.config.load import load_config
    from mifo.config.schema import Config

    width = shutil.get_terminal_size().columns
    print(f"{TRAIN_USAGE}\n{TRAIN_HELP}")
    named = bool(rest) and not rest[0].startswith("-")
    if named:
        recipe, config = load_config(rest[0], rest[1:])
        print(printable(f"settings, with the values of {recipe.name}:"))
    else:
        config = Config()
        print("recipes:")
        _print_recipes(width, indent="  ")
        print("\nsettings, with the defaults of the schema (mifo train RECIPE --help shows a recipe's values):")
    print(printable(settings_help(config, width=width, all_methods=not named)))


def _eval(known: argparse.Namespace) -> int:
    quiet_libraries()
    from mifo.commands import eval_command

    return eval_command(known)


def _recipes(_: argparse.Namespace) -> int:
    _print_recipes(shutil.get_terminal_size().columns)
    return 0


def _print_recipes(width: int, indent: str = "") -> None:
    from mifo.config.load import recipe_descriptions

    _print_columns(recipe_descriptions(), width, indent)


def _print_columns(rows: Sequence[tuple[str, str]], width: int, indent: str = "") -> None:
    """Names on the left, texts wrapped beside them."""
    left = len(indent) + max(len(name) for name, _ in rows) + 2
    for name, text in rows:
        lines = textwrap.wrap(text, max(20, width - left))
        print(f"{indent + name:<{left}}" + f"\n{' ' * left}".join(lines))


def _methods(_: argparse.Namespace) -> int:
    from mifo.config.describe import method_descriptions

    _print_columns(method_descriptions(), shutil.get_terminal_size().columns)
    return 0


def quiet_libraries() -> None:
    """Logs that are fit for a terminal, and none of the libraries' own progress."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in ("httpx", "urllib3", "filelock", "datasets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
