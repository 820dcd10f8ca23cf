"""What an arena reads, looked for before its first run: a file that is missing would else be found hours later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mifo.data.readers import is_hub_id
from mifo.errors import ConfigError
from mifo.lab.arena_file import Arena, held_out_place
from mifo.lab.arena_plan import Entry
from mifo.train.corpus import EMBEDDED_SPLITS, NONE
from mifo.train.model import TINY, resolve_model_path


def check_inputs(arena: Arena, entries: Sequence[Entry]) -> None:
    """The models and the data are there, and nothing is measured on what is trained on.

    Args:
        arena: says what is measured on.
        entries: its methods, with the models and the data that they train on.

    Raises:
        ConfigError: names the setting, the path and the remedy.
        ModelError: a model is not there, or no model.
    """
    for path in sorted({entry.config.model.path for entry in entries} - {TINY}):
        resolve_model_path(path)
    held_out = dict(_held_out(arena))
    trained = {entry.config.data.train for entry in entries}
    for setting, path in [*held_out.items(), *(("data.train", path) for path in sorted(trained))]:
        if path not in EMBEDDED_SPLITS and not Path(path).expanduser().exists() and not is_hub_id(path):
            raise ConfigError(
                f"{setting} = '{path}': there is no such file or folder, and it is no hub name of the form org/name. Paths "
                "are taken from the folder in which the command is run."
            )
    places = {_trained_place(path) for path in trained}
    for setting, path in held_out.items():
        if held_out_place(path) in places:
            raise ConfigError(f"{setting} = '{path}' is also what the methods train on. Name other problems.")


def _held_out(arena: Arena) -> Iterator[tuple[str, str]]:
    test, tuning = arena.settings.test, arena.settings.tuning
    yield "test.in_distribution", test.in_distribution
    if test.out_of_distribution != NONE:
        yield "test.out_of_distribution", test.out_of_distribution
    if tuning.enabled:
        yield "tuning.validation", tuning.validation


def _trained_place(path: str) -> str:
    """Folders and hub names hold splits of both kinds under one name: they are no place by themselves."""
    if path in EMBEDDED_SPLITS:
        return f"embedded:{EMBEDDED_SPLITS[path] or 'train'}"
    return held_out_place(path) if Path(path).expanduser().is_file() else ""
