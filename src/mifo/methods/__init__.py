"""Methods: one module each, and one line each in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from mifo.config.schema import Config
from mifo.methods.base import Method
from mifo.methods.bread import Bread
from mifo.methods.chord import Chord
from mifo.methods.gated import Hpt, superrl
from mifo.methods.grpo import Grpo
from mifo.methods.luffy import Luffy
from mifo.methods.mifo import Mifo
from mifo.methods.ppo import Ppo
from mifo.methods.prefix_rft import PrefixRft
from mifo.methods.prime import Prime
from mifo.methods.published import AsPublished
from mifo.methods.relift import Relift
from mifo.methods.rl_with_sft import RlWithSft
from mifo.methods.sasr import Sasr
from mifo.methods.sft import Sft
from mifo.methods.srft import Srft
from mifo.methods.stages import Stages
from mifo.methods.uft import Uft

METHODS: dict[str, Callable[[Any, Config], Method]] = {
    "bread": Bread,
    "chord": Chord,
    "grpo": Grpo,
    "hpt": Hpt,
    "luffy": Luffy,
    "mifo": Mifo,
    "multi_stage": Stages,
    "ppo": Ppo,
    "prefix_rft": PrefixRft,
    "prime": Prime,
    "relift": Relift,
    "rl_sft": Stages,
    "rl_with_sft": RlWithSft,
    "sasr": Sasr,
    "sft": Sft,
    "sft_rl": Stages,
    "srft": Srft,
    "superrl": superrl,
    "uft": Uft,
}


def make_method(config: Config) -> Method:
    """The method that a checked configuration asks for."""
    method, legacy = METHODS[config.method.name](config.method, config), config.legacy
    if legacy.reducer == legacy.prefix_ranking == "update" and not legacy.sft_over_gpus:
        return method
    return cast(Method, AsPublished(method, legacy))


__all__ = ["METHODS", "Method", "make_method"]
