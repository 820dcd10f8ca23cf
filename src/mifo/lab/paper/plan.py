"""The runs of findings: whole configurations from a tier, shared between findings by their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError

from mifo.config.decode import decode
from mifo.config.load import read_recipe
from mifo.config.schema import Config
from mifo.config.stages import merge, with_stages
from mifo.data import tasks
from mifo.errors import CheckpointError, ConfigError
from mifo.lab.arena_jobs import Command
from mifo.lab.paper.tier import Tier
from mifo.lab.trials import TRAIN, Trial
from mifo.train.model import TINY, load_model, load_tokenizer

Tables = Mapping[str, Any]
UNBOUNDED = 1_000_000  # steps of a run that FLOPs end
SHIPPED = "shipped"
LATER_SEED = 1000  # what a run that begins from another adds to its seed, so that its data come in another order
MEASURED_AT_THE_ENDS: Tables = {
    "evaluation": {"every_steps": None, "every_flops": None, "around_sft": False, "meter_problems": None},
    "run": {"samples_per_step": 0},
}


@dataclass(kw_only=True)
class Plan:
    """Makes the trials of one tier; asked twice for the same one it gives the same object.

    Attributes:
        tier: the sizes.
        folder: of the suite.
    """

    tier: Tier
    folder: Path
    made: dict[str, Trial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base = merge(read_recipe(self.tier.recipe).tables, self.tier.settings)

    @property
    def seeds(self) -> range:
        """Of every finding."""
        return range(self.tier.seeds)

    def trial(
        self,
        name: str,
        seed: int,
        method: Tables,
        *,
        after: Trial | None = None,
        steps: int | None = None,
        flops: float | None = None,
        keep: bool = False,
        command: Command = TRAIN,
        tables: Tables | None = None,
    ) -> Trial:
        """One run of one seed.

        Args:
            name: without the seed; the same name must always stand for the same settings.
            seed: of the finding; a later stage of it draws other data.
            method: the whole [method] table.
            after: the trial whose model it begins from.
            steps: train.steps; or
            flops: until so many are spent.
            keep: keep the export for a measurement.
            command: what trains it in place of `mifo train`.
            tables: other tables, on top of the recipe's.

        Raises:
            ConfigError: the settings are wrong, or the name stands for another run already.
        """
        full = f"{name}-seed{seed}"
        length = {"steps": steps or UNBOUNDED, "minutes": None, "max_flops": flops}
        config = merge({**self.base, "method": method}, MEASURED_AT_THE_ENDS)
        config = merge(config, {"train": {**length, "seed": self._seed(seed, after)}, **self._problems})
        trial = Trial(
            name=full,
            config=decode(Config, with_stages(merge(config, tables or {}))),
            after=after,
            keep_export=keep,
            command=command,
        )
        known = self.made.setdefault(full, trial)
        if known != trial:
            raise ConfigError(f"two findings mean different runs by '{full}'. Rename one.")
        return known

    @property
    def _problems(self) -> Tables:
        return {"data": {"evaluation_problems": self.tier.problems}}

    def recipe(self) -> Config:
        """The tier's recipe itself, for probes that make configurations of their own."""
        return decode(Config, merge(merge(self.base, MEASURED_AT_THE_ENDS), self._problems))

    @staticmethod
    def _seed(seed: int, after: Trial | None) -> int:
        return seed + LATER_SEED * (0 if after is None else len(after.lineage))

    # --- methods -----------------------------------------------------------------------------------------------------

    @property
    def rl(self) -> dict[str, Any]:
        """[method.rl] of every method: the recipe's, with the tier's number of questions."""
        return dict(merge(self.base["method"]["rl"], {"prompts_per_step": self.tier.prompts}))

    def mifo(self, **over: Any) -> dict[str, Any]:
        """MIFO with the paper's ρ, k and α; ablations and variants by their settings."""
        table = {
            "name": "mifo",
            "buffer_size": self.tier.buffer,
            "sft_batch_size": self.tier.batch,
            "token_fraction": 0.2,
            "freeze_top": 0.5,
            "rl": self.rl,
        }
        return dict(merge(table, over))

    def grpo(self, **rl: Any) -> dict[str, Any]:
        """RL alone."""
        return {"name": "grpo", "rl": {**self.rl, **rl}}

    def sft(self, **over: Any) -> dict[str, Any]:
        """SFT alone."""
        return {"name": "sft", "batch_size": self.tier.batch, **over}

    def other(self, name: str, **over: Any) -> dict[str, Any]:
        """A method that mixes both, by its name: luffy, srft, relift, prefix_rft, hpt, sft_rl."""
        rl = self.rl
        tables: dict[str, dict[str, Any]] = {
            "luffy": {"rl": rl},
            "srft": {key: rl[key] for key in ("prompts_per_step", "rollouts_per_prompt", "updates_per_step")},
            "relift": {"rl": rl, "buffer_size": self.tier.batch},
            "prefix_rft": {"rl": rl, "prefix_decay_steps": 3 * self.tier.rl_steps // 2},  # about what the budget gives
            "hpt": {"rl": rl},
            "sft_rl": {"rl": rl, "sft_batch_size": self.tier.batch, "sft_steps": self.tier.start_updates},
        }
        return dict(merge({"name": name, **tables[name]}, over))

    def shipped(self, seed: int) -> str:
        """The model that a seed begins with, as the lab names models; a random one is written to a folder by `write_shipped`."""
        path = str(self.base["model"]["path"])
        return str(self.folder / SHIPPED / f"seed{seed}") if path == TINY else path

    def write_shipped(self, seed: int) -> None:
        """Write the random model of a seed where there is one and it is not there yet."""
        place = Path(self.shipped(seed))
        if self.base["model"]["path"] != TINY or place.is_dir():
            return
        config = self.recipe().model
        staging = place.with_name(f"{place.name}.part")
        try:
            load_model(config, seed=seed).save_pretrained(staging)
            load_tokenizer(config).save_pretrained(staging)
            staging.rename(place)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"--folder: {place} cannot be written ({error}). Free space, or name another."
            ) from error

    # --- runs that several findings share ----------------------------------------------------------------------------

    def start(self, seed: int) -> Trial:
        """The model as it ships, made able by a little SFT."""
        return self.trial("start", seed, self.sft(), steps=self.tier.start_updates, keep=True)

    def rl_phase(self, seed: int) -> Trial:
        """RL from the start."""
        return self.trial("rl", seed, self.grpo(), after=self.start(seed), steps=self.tier.rl_steps, keep=True)

    def sft_like_rl(self, seed: int, name: str = "sft", **over: Any) -> Trial:
        """SFT from the start with RL's rate, as many updates as RL, and as many problems in each."""
        rate = self.base["rl_optimizer"]["learning_rate"]
        method = self.sft(batch_size=self.tier.prompts, **over)
        optimizer = {"learning_rate": rate}
        return self.trial(
            name,
            seed,
            method,
            after=self.start(seed),
            steps=self.tier.rl_steps,
            keep=True,
            tables={"sft_optimizer": optimizer},
        )

    def available(self, part: str) -> int:
        """How many embedded problems a split has for the recipe's families and levels."""
        data = self.base["data"]
        families = tuple(data.get("families", ())) or None
        return tasks.available(cast(tasks.Split, part), families=families, max_level=data.get("levels"))
