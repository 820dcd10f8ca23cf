"""What an arena is: methods, seeds, a budget, a grid of learning rates. Written in TOML (docs/compare.md), checked here.

Nothing is loaded: a mistake in an arena is found without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mifo.config.bounds import Count, Positive, PositiveShare, Seed, Share
from mifo.config.decode import check_bounds, decode
from mifo.config.load import read_recipe, read_toml
from mifo.errors import ConfigError

BudgetKind = Literal["flops", "tokens", "steps", "minutes"]
BUDGET_KINDS: tuple[BudgetKind, ...] = ("flops", "tokens", "steps", "minutes")
OF_THE_ARENA = (
    ("data", "evaluation", "test.in_distribution and tuning.validation say what is measured on"),
    ("train", "seed", "seeds, first_seed and tuning.seed are the arena's"),
    *(("train", key, "the arena has a [budget]") for key in ("minutes", "max_flops", "max_tokens")),
    ("train", "threads", "--jobs divides the cores"),
    ("run", "*", "run folders are the arena's"),
)
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.+")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What every run may spend: exactly one of the four."""

    flops: Positive | None = None
    """Training FLOPs: 2·N·D of generated tokens (prompts included), 6·N·D of trained ones. Evaluation is free."""
    tokens: Count | None = None
    """Response tokens generated and trained on, together."""
    steps: Count | None = None
    """Steps as train.steps counts them."""
    minutes: Positive | None = None
    """Wall time, evaluation included."""
    tolerance: Share = 0.05
    """A run that spent more or less than the budget by over this share is flagged and not ranked."""

    @property
    def kind(self) -> BudgetKind:
        """What is counted."""
        return next(kind for kind in BUDGET_KINDS if getattr(self, kind) is not None)

    @property
    def amount(self) -> float:
        """How much of it."""
        return float(getattr(self, self.kind))


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """The grid of learning rates that every method is given, as factors of its recipe's rates."""

    enabled: bool = True
    """Off: every method runs with its recipe's rates, and the report says so."""
    one_rate: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Factors for methods with one optimizer."""
    two_rates: tuple[tuple[float, ...], ...] = ((1.0, 1.0), (1.0, 2.0), (2.0, 1.0), (2.0, 2.0))
    """Pairs of factors, of the RL and the SFT rate, for methods with both; as many as `one_rate` has."""
    stages: Literal["all", "last"] = "all"
    """Whose rates a factor multiplies in a list of stages; `last` leaves those before it, for a start that all share."""
    budget_share: PositiveShare = 1.0
    """Share of the budget that a run of the grid may spend."""
    validation: str = "embedded:validation"
    """Problems that the rates are selected on; never those of the final evaluation."""
    validation_problems: Count | None = None
    """How many of them; none: as many as the final evaluation has."""
    seed: Seed = 1000
    """Seed of the runs of the grid; not one of the final runs'."""


@dataclass(frozen=True, kw_only=True)
class FinalTest:
    """What the final runs are measured on."""

    in_distribution: str = "embedded:test"
    """As data.evaluation."""
    out_of_distribution: str = "embedded:ood"
    """The same for problems of other kinds than those trained on; `none` for no such measurement."""
    ood_problems: Count = 200
    """How many of those."""


@dataclass(frozen=True, kw_only=True)
class ArenaSettings:
    """Everything of an arena but its methods and the settings that they share."""

    description: str = ""
    """One line for the report."""
    seeds: Count = 3
    """Final runs of each method."""
    first_seed: Seed = 0
    """Their seeds are this and those after it."""
    reference: str | None = None
    """Differences are to this method; none: the first."""
    allow_different: tuple[str, ...] = ()
    """Settings in which methods may differ though the comparison then mixes two things (`rollout.temperature`, `rollout`)."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    test: FinalTest = field(default_factory=FinalTest)


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One method as it is entered: a recipe, and settings on top of it."""

    name: str
    recipe: str
    tables: Mapping[str, Any]
    """The recipe's, `extends` resolved."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Arena:
    """A comparison that can be run."""

    name: str
    settings: ArenaSettings
    contestants: tuple[Contestant, ...]
    shared: Mapping[str, Any] = field(default_factory=dict)
    """Settings of every run, as tables of a recipe."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the final runs."""
        return tuple(range(self.settings.first_seed, self.settings.first_seed + self.settings.seeds))

    @property
    def reference(self) -> str:
        """The method that others are compared with."""
        return self.settings.reference or self.contestants[0].name


def held_out_place(path: str) -> str:
    """One spelling of what a held-out setting names: `embedded` stands for its test split, a path for the file it leads to."""
    if path == "embedded" or path.startswith("embedded:"):
        return "embedded:test" if path == "embedded" else path
    return str(Path(path).expanduser().resolve())


def read_arena(path: Path) -> Arena:
    """An arena file.

    Raises:
        ConfigError: anything wrong with it.
    """
    if path.suffix != ".toml" or not path.is_file():
        raise ConfigError(
            f"{path} is no arena file. Name an existing .toml (docs/compare.md), or use --recipe and --methods."
        )
    data = read_toml(path)
    methods, shared = data.pop("methods", None), _table(path, "settings", data.pop("settings", {}))
    if not isinstance(methods, dict) or not methods:
        raise ConfigError(
            f'{path} names no methods. Add tables such as [methods.mifo] with recipe = "smollm2-arithmetic".'
        )
    contestants = []
    for name, table in methods.items():
        if not isinstance(table, dict) or not isinstance(table.get("recipe"), str):
            raise ConfigError(f'{path}: methods.{name} needs recipe = "...": the name of a recipe, or a TOML file.')
        extra = sorted(table.keys() - {"recipe", "settings"})
        if extra:
            raise ConfigError(
                f"{path}: methods.{name}.{extra[0]} is not known. Settings go to [methods.{name}.settings]."
            )
        recipe = table["recipe"]
        place = str(path.parent / recipe) if recipe.endswith(".toml") else recipe
        contestants.append(
            Contestant(
                name=name,
                recipe=recipe,
                tables=read_recipe(place).tables,
                settings=_table(path, f"methods.{name}.settings", table.get("settings", {})),
            )
        )
    arena = Arena(name=path.stem, settings=decode(ArenaSettings, data), contestants=tuple(contestants), shared=shared)
    check_arena(arena)
    return arena


def _table(path: Path, place: str, value: object) -> dict[str, Any]:
    """Settings as tables of a recipe, without those that the arena itself decides."""
    tables = isinstance(value, dict) and all(isinstance(table, dict) or key == "stages" for key, table in value.items())
    if not isinstance(value, dict) or not tables:
        raise ConfigError(f"{path}: {place} holds tables of settings, such as [{place}.rollout]; it is {value!r}.")
    for table, key, instead in OF_THE_ARENA:
        if key in value.get(table, {}) or (key == "*" and table in value):
            name = table if key == "*" else f"{table}.{key}"
            raise ConfigError(f"{path}: {place}.{name} would have no effect: {instead}. Leave it out.")
    return value


def check_arena(arena: Arena) -> None:
    """Ranges, and settings that cannot work together.

    Raises:
        ConfigError: names the field, the value, the reason and the remedy.
    """
    settings = arena.settings
    check_bounds(settings)
    names = [contestant.name for contestant in arena.contestants]
    for name in names:
        if name.startswith("tuning-"):
            raise ConfigError(
                f"methods.{name}: names that begin with tuning- are those of the grid's runs. Use another."
            )
        if not name or not set(name) <= NAME_CHARACTERS or name.startswith("."):
            raise ConfigError(
                f"methods.{name!r}: a method's name is part of file names. Use letters, digits, - _ . and +."
            )
    if len(set(names)) != len(names):
        raise ConfigError(f"methods: {', '.join(names)} names one twice. Give each a name of its own.")
    if settings.reference is not None and settings.reference not in names:
        raise ConfigError(f"reference = '{settings.reference}' is no method of the arena: {', '.join(names)}.")
    given = [kind for kind in BUDGET_KINDS if getattr(settings.budget, kind) is not None]
    if len(given) != 1:
        said = f"{' and '.join(given)} are set" if given else "nothing is set"
        raise ConfigError(f"[budget]: {said}; a budget is exactly one of {', '.join(BUDGET_KINDS)}.")
    if settings.test.in_distribution == "none":
        raise ConfigError("test.in_distribution = 'none': methods are ranked by it. Name held-out problems.")
    _check_tuning(settings, arena.seeds)


def _check_tuning(settings: ArenaSettings, seeds: tuple[int, ...]) -> None:
    tuning = settings.tuning
    if not tuning.enabled:
        return
    if len(tuning.one_rate) != len(tuning.two_rates) or not tuning.one_rate:
        raise ConfigError(
            f"tuning.one_rate has {len(tuning.one_rate)} points and tuning.two_rates {len(tuning.two_rates)}: methods would be "
            "tuned with unequal effort. Give both the same number, at least 1."
        )
    if any(len(pair) != 2 for pair in tuning.two_rates):
        raise ConfigError("tuning.two_rates holds pairs: the factor of the RL rate, then that of the SFT rate.")
    if any(factor <= 0 for factor in (*tuning.one_rate, *(f for pair in tuning.two_rates for f in pair))):
        raise ConfigError("tuning: a factor of a learning rate must be above 0.")
    if tuning.seed in seeds:
        raise ConfigError(
            f"tuning.seed = {tuning.seed} is also a seed of the final runs, so rates would be selected on one of them. "
            "Choose another."
        )
    if tuning.validation == "none":
        raise ConfigError(
            "tuning.validation = 'none': rates are selected on it. Name problems, or set tuning.enabled = false."
        )
    measured_on = (settings.test.in_distribution, settings.test.out_of_distribution)
    if held_out_place(tuning.validation) in map(held_out_place, measured_on):
        raise ConfigError(
            f"tuning.validation = '{tuning.validation}' is also what the final runs are measured on. Name other problems, or set "
            "tuning.enabled = false."
        )
