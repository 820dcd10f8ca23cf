"""What a measurement leaves behind: NAME.json, NAME.csv and NAME.png in one folder."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mifo.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_FIGURE = (
    "no figure was drawn: matplotlib is not installed. pip install matplotlib brings it; JSON and CSV are whole."
)


def writable_folder(given: str) -> Path:
    """The folder of --out, once it is sure that it can be made and written to: before anything is measured for it.

    Raises:
        ConfigError: the system refuses.
    """
    folder = Path(given).expanduser().absolute()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ConfigError(
            f"--out = '{given}' cannot be written ({error.strerror or error}). Write elsewhere."
        ) from error
    return Path(given).expanduser()


def write_outputs(
    folder: Path,
    name: str,
    *,
    record: Mapping[str, Any] | None,
    rows: Sequence[Mapping[str, Any]],
    draw: Callable[[Figure], None],
) -> list[str]:
    """Write the record, the table and the figure of a measurement; returns a line for each file, or why there is none.

    Args:
        folder: made if it is missing.
        name: of the files, without ending; files of that name are replaced.
        record: plain data for the JSON file; None leaves it out.
        rows: of the table, all with the same keys.
        draw: fills an empty figure.

    Raises:
        ConfigError: the system refused to write.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        if record is not None:
            path = folder / f"{name}.json"
            path.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
            lines.append(str(path))
        if rows:
            path = folder / f"{name}.csv"
            path.write_text(table_text(rows), encoding="utf-8", newline="\n")
            lines.append(str(path))
        figure = new_figure()
        if figure is None:
            return [*lines, NO_FIGURE]
        draw(figure)
        figure.savefig(folder / f"{name}.png", dpi=150)
    except OSError as error:
        raise ConfigError(
            f"--out = '{folder}' cannot be written ({error.strerror or error}). Write elsewhere."
        ) from error
    return [*lines, str(folder / f"{name}.png")]


def new_figure() -> Figure | None:
    """An empty figure that needs no display; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(9.0, 4.5), layout="constrained")


def table_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows that all have the same keys as CSV with a header; nothing for no rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    if rows:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
