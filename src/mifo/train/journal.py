"""The append-only JSONL files of a run folder: metrics, samples, events.

A checkpoint stores their lengths; a resumed run cuts them back to it, so that what a killed run wrote after its last
checkpoint is not there twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STREAMS = ("metrics", "samples", "events")


class Journal:
    """Three JSONL files, one object a line, flushed at every line."""

    def __init__(self, folder: Path) -> None:
        self.paths = {name: folder / f"{name}.jsonl" for name in STREAMS}

    def write(self, stream: str, record: Mapping[str, Any]) -> None:
        """Append one record; floats that are not finite are written as null, which every JSON reader accepts."""
        with self.paths[stream].open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record), ensure_ascii=False) + "\n")

    def state_dict(self) -> dict[str, int]:
        """Bytes written to each file."""
        return {name: path.stat().st_size if path.exists() else 0 for name, path in self.paths.items()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Cut each file back to the length it had."""
        for name, path in self.paths.items():
            if path.exists():
                with path.open("r+b") as file:
                    file.truncate(min(state[name], path.stat().st_size))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
