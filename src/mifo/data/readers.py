"""Rows from files: JSONL (plain or gzip), a JSON list, CoLA's TSV, parquet, local `datasets` folders, hub data sets by name.

Every reader yields a row as a dict, or the reason (a string) for which a line could not be read. `pyarrow` and
`datasets` are imported only when a file needs them. The hub is asked only for a name `org/name` that is no local path.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias

from mifo.data.labelled import tsv_rows
from mifo.errors import DataError

RowOrReason: TypeAlias = dict[str, Any] | str
MAX_LINE_BYTES = 32 << 20  # of one JSON line; a row with a hundred long responses has less than one
MAX_LIST_BYTES = 1 << 30  # of a file that is one JSON list, which is read at once
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".tsv")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_rows(path: str, split: str | None) -> Iterator[RowOrReason]:
    """Rows of a file, a folder or a hub data set. Raises DataError when it is missing, unreadable or ambiguous."""
    local = Path(path).expanduser()
    if local.is_dir():
        yield from _read_folder(local, split)
    elif local.is_file():
        yield from _read_file(local)
    elif is_hub_id(path):
        yield from _read_hub(path, split)
    else:
        raise DataError(
            f"data = {path!r}: no such file or folder, nor a hub name of the form org/name; give a path to "
            f"{', '.join(_FILE_SUFFIXES)} or to a `datasets` folder"
        )


def is_hub_id(path: str) -> bool:
    """Whether `path` names a hub data set: org/name, with no file suffix and no local folder called org."""
    return bool(_HUB_ID.fullmatch(path)) and not path.endswith(_FILE_SUFFIXES) and not Path(path).parent.exists()


def _read_file(path: Path) -> Iterator[RowOrReason]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        yield from _read_parquet(path)
    elif name.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")):
        yield from _read_json(path)
    elif name.endswith(".tsv"):
        yield from _read_tsv(path)
    else:
        raise DataError(f"data = {str(path)!r}: unknown kind of file; give one of {', '.join(_FILE_SUFFIXES)}")


def _read_tsv(path: Path) -> Iterator[RowOrReason]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data = {str(path)!r}: cannot be read ({error}); check the file or fetch it again") from error
    yield from (row or "not CoLA's four columns" for row in tsv_rows(lines))


def _read_json(path: Path) -> Iterator[RowOrReason]:
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            yield from _json_rows(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data = {str(path)!r}: cannot be read ({error}); check the file or fetch it again") from error


def _json_rows(path: Path, file: IO[bytes]) -> Iterator[RowOrReason]:
    """A row a line, of which only one is held at a time; or the rows of a list, where the file starts with one."""
    line = file.readline(MAX_LINE_BYTES + 1).removeprefix(_BYTE_ORDER_MARK)
    while line and not line.strip():
        line = file.readline(MAX_LINE_BYTES + 1)
    if line.lstrip()[:1] == b"[":
        yield from _json_list(path, line + file.read(MAX_LIST_BYTES))
        return
    while line:
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield f"line over {MAX_LINE_BYTES >> 20} MiB"
        elif line.strip():
            yield _json_line(line)
        line = file.readline(MAX_LINE_BYTES + 1)


def _json_line(line: bytes) -> RowOrReason:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "bad UTF-8"
    except (ValueError, RecursionError):  # also an integer beyond the interpreter's digit limit
        return "bad JSON"
    return row if isinstance(row, dict) else "not an object"


def _json_list(path: Path, data: bytes) -> Iterator[RowOrReason]:
    if len(data) > MAX_LIST_BYTES:
        raise DataError(f"data = {str(path)!r}: a JSON list over {MAX_LIST_BYTES >> 20} MiB; convert it to JSONL")
    try:
        rows = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"data = {str(path)!r}: not a JSON list ({error}); mend it or convert it to JSONL") from error
    yield from (row if isinstance(row, dict) else "not an object" for row in rows)


def _read_parquet(path: Path) -> Iterator[RowOrReason]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"data = {str(path)!r}: parquet needs pyarrow; install mifo[data]") from error
    try:
        table = pyarrow.parquet.ParquetFile(path)
        for batch in table.iter_batches(batch_size=1024):
            yield from _batch_rows(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"data = {str(path)!r}: cannot be read as parquet ({error}); fetch it again") from error


def _batch_rows(batch: Any) -> Iterator[RowOrReason]:
    """Rows of a record batch; a text column that is not UTF-8 costs the rows it is in, not the batch."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                row = batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield "bad UTF-8"
            else:
                yield row


def _read_folder(folder: Path, split: str | None) -> Iterator[RowOrReason]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        yield from _read_saved(folder, split)
        return
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name.lower().endswith(_FILE_SUFFIXES))
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    chosen = [p for p in files if split is None or _belongs(p.relative_to(folder), split)]
    names = ", ".join(str(p.relative_to(folder)) for p in files[:12]) or "no data files"
    if not chosen:
        raise DataError(f"data = {str(folder)!r}, split = {split!r}: no file of that split; the folder has {names}")
    if split is None and len(chosen) > 1:
        raise DataError(f"data = {str(folder)!r}: several files ({names}); name a split or one of the files")
    for path in chosen:
        yield from _read_file(path)


def _belongs(path: Path, split: str) -> bool:
    """train.jsonl, train-00000-of-00002.parquet and train/part.parquet are files of the split train."""
    return path.parent.name == split or bool(re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", path.name))


def _read_saved(folder: Path, split: str | None) -> Iterator[RowOrReason]:
    datasets = _datasets(str(folder))
    try:
        data = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"data = {str(folder)!r}: not a whole saved data set ({error}); save it again") from error
    yield from _one_split(data, str(folder), split)


def _read_hub(name: str, split: str | None) -> Iterator[RowOrReason]:
    datasets = _datasets(name)
    try:
        data = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"data = {name!r}, split = {split!r}: no such local path, and the hub gave none ({error}); check the name, "
            f"the split and the connection, or give a local file"
        ) from error
    yield from _one_split(data, name, split)


def _one_split(data: Any, name: str, split: str | None) -> Iterator[RowOrReason]:
    if not isinstance(data, dict):  # a Dataset; a DatasetDict is a dict of them
        yield from data
        return
    if split is None and len(data) == 1:
        split = next(iter(data))
    if split not in data:
        raise DataError(f"data = {name!r}, split = {split!r}: name one of its splits: {', '.join(data)}")
    yield from data[split]


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"data = {name!r}: needs the `datasets` library; install mifo[data]") from error
    return datasets
