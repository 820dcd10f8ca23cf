"""SFT after RL with MIFO's freeze, as a run of its own: what RL moved most does not move (S0 §3.2, Algorithm 1).

    python -m mifo.lab.frozen_run --top 0.5 CONFIG.toml [--resume]

CONFIG is an SFT run whose model.path is the export of an RL run. That run's folder says what it began with, θ_0; the importance
map is |θ_RL − θ_0|, as after MIFO's first interval, and its top share is frozen bit for bit during the whole run.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from mifo.config.decode import decode
from mifo.config.schema import Config, SftMethod
from mifo.errors import ConfigError
from mifo.lab.child_run import Swaps, child_parser, train_child
from mifo.methods.sft import Sft
from mifo.train.build import Prepared
from mifo.train.checkpoint import read_json
from mifo.train.folder import CONFIG
from mifo.train.metrics import freeze_record
from mifo.train.model import load_model
from mifo.train.run import Run
from mifo.types import Freeze, Phase


class FrozenSft(Sft):
    """SFT alone, with a share of the elements frozen."""

    def __init__(self, method: SftMethod, config: Config, top: float) -> None:
        super().__init__(method, config)
        self.freeze: Freeze | None = Freeze(top=top, history=0.0)

    def next_phase(self) -> Phase:
        """As in SFT, with what does not move."""
        return replace(super().next_phase(), freeze=self.freeze)


def _prepared(prepared: Prepared, top: float) -> Prepared:
    method = prepared.config.method
    assert isinstance(method, SftMethod)
    return replace(prepared, methods=(FrozenSft(method, prepared.config, top),))


@torch.no_grad()
def select(run: Run, top: float) -> None:
    """Make the importance map of a run that begins: |θ − θ_0| with θ_0 from the run that exported its model.

    Raises:
        ConfigError: the model is no export of a run.
    """
    file = Path(run.config.model.path).parent / CONFIG
    if not file.is_file():
        raise ConfigError(
            f"model.path = '{run.config.model.path}' is no export of a run: there is no {file}, which says what RL began with. "
            "Name the export of an RL run."
        )
    before = decode(Config, read_json(file))
    start = dict(load_model(before.model, seed=before.train.seed).named_parameters())
    names = {id(p): name for name, p in run.learner.policy.model.named_parameters()}
    assert run.importance is not None
    for held, parameter in zip(run.importance.start, run.importance.parameters, strict=True):
        held.copy_(start[names[id(parameter)]])
    report = run.importance.end_interval(top)
    run.emit("events", {"event": "frozen", **freeze_record(report)})
    run.mark()


def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit status of `mifo train`."""
    parser = child_parser("mifo.lab.frozen_run")
    parser.add_argument("--top", type=float, required=True)
    known = parser.parse_args(arguments)

    def swaps(config: Config) -> Swaps:
        if not isinstance(config.method, SftMethod) or not 0.0 < known.top <= 1.0:
            raise ConfigError(
                f"--top {known.top}, method.name = '{config.method.name}': a share of 1 and SFT are needed."
            )
        return Swaps(prepared=lambda prepared: _prepared(prepared, known.top), begin=lambda run: select(run, known.top))

    return train_child(known.file, resume=known.resume, make_swaps=swaps)


if __name__ == "__main__":
    sys.exit(main())
