"""A comparison of runs that exist already: `mifo compare --report RUN...`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mifo.config.decode import encode
from mifo.config.schema import Config
from mifo.errors import ConfigError
from mifo.lab.arena_compare import Comparison, compare, median_budget
from mifo.lab.arena_plan import check_fair, flat
from mifo.lab.arena_results import RunResult, read_run

BESIDE_THE_METHOD = ("train.seed", "train.threads", "run.", "reward.workers")


def compare_folders(
    paths: Sequence[Path], *, reference: str | None, allow_different: Sequence[str], tolerance: float
) -> Comparison:
    """Compare finished runs; they are held to the median of their FLOPs.

    Args:
        paths: run folders, and folders of arenas, which stand for their final runs.
        reference: the method that differences are to; None: that of the first run.
        allow_different: settings in which methods may differ beyond the method, or whole tables.
        tolerance: share by which a run's FLOPs may differ from the median.

    Raises:
        MifoError: a run is not finished; two are the same method and seed; they differ in model, data, grading or evaluation.
    """
    runs = _labelled([read_run(folder) for path in paths for folder in run_folders(path)])
    entries = list(dict.fromkeys(run.entry for run in runs))
    if reference is not None and reference not in entries:
        raise ConfigError(f"--reference {reference} is none of the methods found: {', '.join(entries)}.")
    notes = check_fair({run.name: run.config for run in runs}, allow_different)
    notes += _check_data(runs, allow_different)
    return compare(
        runs,
        entries=entries,
        reference=reference or entries[0],
        budget=median_budget(runs, tolerance),
        name="report",
        description=f"{len(runs)} existing runs",
        tuned=None,
        notes=notes,
    )


def run_folders(path: Path) -> list[Path]:
    """A run folder itself, or the final runs in the folder of an arena."""
    if (path / "config.json").is_file():
        return [path]
    found = sorted(
        folder.parent for folder in path.glob("runs/*/config.json") if not folder.parent.name.startswith("tuning-")
    )
    if not found:
        raise ConfigError(f"--report: {path} is neither a run folder nor the folder of an arena.")
    return found


def _labelled(runs: Sequence[RunResult]) -> list[RunResult]:
    """Runs with the names of their methods: what an arena called them, else the method with what sets it apart."""
    configs = [_without_seed(run.config) for run in runs]
    by_tag: dict[str, list[dict[str, Any]]] = {}
    for run, config in zip(runs, configs, strict=True):
        known = by_tag.setdefault(run.config.method_name, [])
        if config not in known:
            known.append(config)
    labelled = []
    for run, config in zip(runs, configs, strict=True):
        suffix = f"-seed{run.seed}"
        name = (
            run.name.removesuffix(suffix)
            if run.name.endswith(suffix)
            else _label(run.config.method_name, config, by_tag[run.config.method_name])
        )
        labelled.append(replace(run, entry=name))
    _check_same(labelled)
    return labelled


def _without_seed(config: Config) -> dict[str, Any]:
    return {key: value for key, value in flat(encode(config)).items() if not key.startswith(BESIDE_THE_METHOD)}


def _label(name: str, config: dict[str, Any], variants: Sequence[dict[str, Any]]) -> str:
    """The method's name, with the settings in which variants of it differ."""
    keys = sorted({key for other in variants for key in other if other.get(key) != config.get(key)})
    settings = ", ".join(f"{key.removeprefix('method.')}={config.get(key)}" for key in keys)
    return f"{name} ({settings})" if settings else name


def _check_same(runs: Sequence[RunResult]) -> None:
    """Runs of one name differ in their seeds alone, and each seed is there once."""
    for entry in dict.fromkeys(run.entry for run in runs):
        own = [run for run in runs if run.entry == entry]
        first = _without_seed(own[0].config)
        for run in own[1:]:
            other = _without_seed(run.config)
            key = next((key for key in sorted(first.keys() | other.keys()) if first.get(key) != other.get(key)), None)
            if key is not None:
                raise ConfigError(
                    f"{own[0].name} and {run.name} are both called {entry}, but differ in {key}: {first.get(key)!r} and "
                    f"{other.get(key)!r}. Report them apart."
                )
        seeds = [run.seed for run in own]
        twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
        if twice is not None:
            names = ", ".join(run.name for run in own if run.seed == twice)
            raise ConfigError(f"{names} are the same method ({entry}) and seed ({twice}). Leave one out.")


def _check_data(runs: Sequence[RunResult], allowed: Sequence[str]) -> list[str]:
    """The same path may hold other problems than it did."""
    other = next((run for run in runs if run.data != runs[0].data), None)
    if other is None:
        return []
    said = f"{runs[0].name} and {other.name} read problems of different content from data.train or data.evaluation"
    if "data" not in allowed:
        raise ConfigError(f"{said}: they cannot be compared. Train them on the same files, or allow 'data' to differ.")
    return [f"allowed to differ: {said}"]
