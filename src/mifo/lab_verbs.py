"""Arguments of `mifo probe` and `mifo rejuvenate`; what they do is in `lab_commands`, which loads torch."""

from __future__ import annotations

import argparse

from mifo.training_probe_verbs import add_bugs, add_forgetting, add_online

MODEL_HELP = "a Hugging Face folder, a finished run, a checkpoint of a run, or smollm2-135m-instruct (embedded)"
TEMPLATES = ("tokenizer", "luffy", "qwen", "prime", "none")
OUT = "probes"


def add_lab_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both verbs to the command line."""
    _add_rejuvenate(
        verbs.add_parser(
            "rejuvenate",
            help="make an over-trained SFT model plastic again before RL",
            description="Fuse an over-trained model with its base and reset the neurons behind its over-confident tokens, before "
            "RL. Writes a plain Hugging Face folder with a record of what was reset (docs/rejuvenate.md).",
        )
    )
    probe = verbs.add_parser(
        "probe",
        help="measure what training did to a model",
        description="Measurements on checkpoints. Each writes NAME.json, NAME.csv and NAME.png to --out (docs/lab.md).",
    )
    probes = probe.add_subparsers(dest="probe", metavar="PROBE", required=True, title="probes")
    _add_magnitude(probes)
    _add_overlap(probes)
    _add_entropy(probes)
    _add_sparsify(probes)
    _add_redundancy(probes)
    _add_coupling(probes)
    add_bugs(probes)
    add_forgetting(probes)


def _add_rejuvenate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, metavar="MODEL", help="the model before SFT")
    parser.add_argument(
        "--over", required=True, metavar="MODEL", help="the over-trained model, a folder or a finished run"
    )
    parser.add_argument("--data", required=True, help="calibration pairs: a data file with demonstrations, or embedded")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write; must not exist yet")
    parser.add_argument(
        "--alpha", type=float, default=0.5, help="share of the over-trained model in the fusion (default: 0.5)"
    )
    parser.add_argument(
        "--rho",
        type=float,
        default=0.01,
        help="share of all neurons that each target keeps (default: 0.01; 0 fuses alone)",
    )
    parser.add_argument(
        "--targets", type=int, default=16, metavar="N", help="tokens of each pair that are attributed (default: 16)"
    )
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="calibration pairs (default: 64)")
    parser.add_argument(
        "--signed", action="store_true", help="take only tokens whose entropy fell, not those where it rose"
    )
    parser.add_argument(
        "--per-module-quota", action="store_true", help="keep the share of every module instead of ranking all together"
    )
    _add_pair_arguments(parser)
    parser.set_defaults(run=_rejuvenate)


def _add_magnitude(probes: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = probes.add_parser("magnitude", help="how far each layer and module moved between two checkpoints")
    parser.add_argument("before", metavar="BEFORE", help=MODEL_HELP)
    parser.add_argument("after", metavar="AFTER", nargs="+", help="one or more models trained from it, SFT beside RL")
    parser.add_argument(
        "--largest", type=int, default=5, metavar="N", help="largest changes listed a tensor (default: 5)"
    )
    _add_out(parser)
    parser.set_defaults(run=_magnitude)


def _add_overlap(probes: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = probes.add_parser("overlap", help="how much of what one phase moved the next moves again")
    parser.add_argument(
        "checkpoints",
        metavar="MODEL",
        nargs="+",
        help=f"three or more along a run, or one run with run.keep_phases: {MODEL_HELP}",
    )
    parser.add_argument(
        "--top", type=float, default=0.5, metavar="K", help="share of elements in a mask (default: 0.5)"
    )
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="of the phases between them (default: where they end)"
    )
    _add_out(parser)
    parser.set_defaults(run=_overlap)


def _add_entropy(probes: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = probes.add_parser("entropy", help="token entropies of models on a file, and what top-rho selects")
    parser.add_argument("models", metavar="MODEL", nargs="+", help=f"{MODEL_HELP}; gaps are taken against the first")
    parser.add_argument("--data", required=True, help="a data file with demonstrations, or embedded")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="pairs to read (default: 64)")
    parser.add_argument(
        "--token-fraction", type=float, default=0.2, metavar="RHO", help="share of tokens selected (default: 0.2)"
    )
    _add_pair_arguments(parser)
    _add_out(parser)
    parser.set_defaults(run=_entropy)


def _add_sparsify(probes: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = probes.add_parser(
        "sparsify", help="accuracy after dropping random shares of a change, or of each gradient"
    )
    parser.add_argument("start", metavar="START", nargs="?", help=f"{MODEL_HELP}; not with --online")
    parser.add_argument("models", metavar="MODEL", nargs="*", help="models trained from it, SFT beside RL")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        metavar="P",
        help="shares of the change to drop (default: 0.1 0.3 0.5 0.7 0.9), or of each gradient with --online (default: 0.5)",
    )
    parser.add_argument("--masks", type=int, default=3, metavar="N", help="random masks for each rate (default: 3)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the masks (default: 0)")
    parser.add_argument("--data", default="embedded", help="held-out problems, as in mifo eval (default: embedded)")
    parser.add_argument("--split", help="split of a datasets folder or hub data set (default: test)")
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="problems to measure on (default: 200)")
    parser.add_argument(
        "--samples", type=int, default=1, metavar="N", help="responses a problem, averaged (default: 1)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="of the sampling (default: 0, greedy)"
    )
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="longest response (default: 512)")
    _add_template(parser)
    _add_out(parser)
    add_online(parser)
    parser.set_defaults(run=_sparsify)


def _add_redundancy(probes: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = probes.add_parser("redundancy", help="how much further training moved than a token's margin needed")
    parser.add_argument("start", metavar="START", help=MODEL_HELP)
    parser.add_argument("models", metavar="MODEL", nargs="+", help="models trained from it, SFT beside RL")
    parser.add_argument("--data", required=True, help="a data file with demonstrations, or embedded")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="pairs to take tokens from (default: 64)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="random tokens to measure (default: 64)")
    parser.add_argument("--reward", type=float, default=1.0, metavar="R", help="r of Theorem 1 (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample of tokens (default: 0)")
    _add_pair_arguments(parser, compute=False)
    _add_out(parser)
    parser.set_defaults(run=_redundancy)


def _add_coupling(probes: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = probes.add_parser("coupling", help="whether a second phase undoes the first, on a classification task")
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="the end of the first phase, then checkpoints of the second"
    )
    parser.add_argument("--order", choices=("sft-rl", "rl-sft"), required=True, help="which phase came first")
    parser.add_argument(
        "--data", required=True, help="labelled texts: JSONL with sentence or text and label, or CoLA's TSV"
    )
    parser.add_argument(
        "--labels", nargs="+", metavar="LABEL", help="by their numbers in the file (default: unacceptable acceptable)"
    )
    parser.add_argument("--instruction", metavar="TEXT", help="the question, with {text} in it (default: CoLA's)")
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="texts to measure on (default: 200)")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="samples a text for KL and Z (default: 8)")
    parser.add_argument(
        "--beta", type=float, default=0.001, metavar="B", help="weight of RL's KL term (default: 0.001)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.6, metavar="T", help="of the scored response (default: 0.6)"
    )
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="nucleus of the scored response (default: 0.95)"
    )
    parser.add_argument("--max-tokens", type=int, default=16, metavar="N", help="longest response (default: 16)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples (default: 0)")
    _add_template(parser)
    _add_out(parser)
    parser.set_defaults(run=_coupling)


def _add_pair_arguments(parser: argparse.ArgumentParser, *, compute: bool = True) -> None:
    parser.add_argument("--split", help="split of a datasets folder or hub data set (default: train)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=2048,
        metavar="N",
        help="longest prompt and demonstration together (default: 2048)",
    )
    if compute:
        parser.add_argument(
            "--compute",
            choices=("stored", "float32", "bfloat16"),
            default="stored",
            help="type of weights and arithmetic; stored keeps that of the files (default)",
        )
    _add_template(parser)


def _add_template(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--template", choices=TEMPLATES, help="how a problem becomes a prompt (default: as in the run, or tokenizer)"
    )
    parser.add_argument(
        "--system-prompt", metavar="TEXT", help="system turn (default: as in the run, or the template's own)"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default=OUT, metavar="FOLDER", help=f"where to write (default: {OUT})")


def _rejuvenate(known: argparse.Namespace) -> int:
    from mifo.lab_commands import rejuvenate_command

    return rejuvenate_command(known)


def _magnitude(known: argparse.Namespace) -> int:
    from mifo.lab_commands import magnitude_command

    return magnitude_command(known)


def _overlap(known: argparse.Namespace) -> int:
    from mifo.lab_commands import overlap_command

    return overlap_command(known)


def _entropy(known: argparse.Namespace) -> int:
    from mifo.lab_commands import entropy_command

    return entropy_command(known)


def _sparsify(known: argparse.Namespace) -> int:
    if known.online:
        from mifo.training_probe_commands import sparsify_online_command

        return sparsify_online_command(known)
    from mifo.lab_commands import sparsify_command

    return sparsify_command(known)


def _redundancy(known: argparse.Namespace) -> int:
    from mifo.lab_commands import redundancy_command

    return redundancy_command(known)


def _coupling(known: argparse.Namespace) -> int:
    from mifo.lab_commands import coupling_command

    return coupling_command(known)
