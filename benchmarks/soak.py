"""Does anything pile up? Trains `tiny` over and over in one process and watches its memory, file handles, threads and children.

    python benchmarks/soak.py                 an hour
    python benchmarks/soak.py --minutes 5     a look
    python benchmarks/soak.py --steps 2       rounds of two steps: many starts and ends, what grows by the run shows sooner
    python benchmarks/soak.py --trace         also name the lines of Python that hold more at the end (three times as slow)

A round is a whole `mifo train tiny`: data, graders, training with checkpoints, evaluation, export. The first quarter of the
rounds warms up. Flat means: the median resident memory of the last quarter of the rounds is at most 2 % above that of the second
quarter, and no round of the last ends with more open files, threads or children than the most of the second. Beside them stand
what tells a leak from memory that malloc keeps: bytes in use on the heap, and objects of the interpreter. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path

from mifo.cli import main as mifo

GROWTH = 1.02  # of the median resident memory
FEWEST_ROUNDS = 8
WARM_UP = 2  # rounds before --trace begins
SHOWN = 25
HEAP_FIELDS = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
)  # fmt: skip


@dataclass(frozen=True)
class Sight:
    """The process after a round: memory in MiB, and counts. `heap_mib` is in use, what malloc keeps free not counted."""

    minutes: float
    resident_mib: float
    heap_mib: float
    objects: int
    open_files: int
    threads: int
    children: int


class Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in HEAP_FIELDS]


def heap_in_use() -> float:
    """MiB that malloc has given out in all its arenas; nan before glibc 2.33."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return float("nan")
    libc.mallinfo2.restype = Heap
    heap = libc.mallinfo2()
    return (heap.uordblks + heap.hblkhd) / 2**20


def descendants() -> int:
    """Processes below this one, at any depth: grading workers are children of a child."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may be gone by now
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    below, found = {os.getpid()}, 0
    while below:
        below = {process for process, parent in parents.items() if parent in below}
        found += len(below)
    return found


def look(started: float) -> Sight:
    """Reads /proc of this process, once what has died is collected."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sight(
        minutes=(time.monotonic() - started) / 60,
        resident_mib=pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        heap_mib=heap_in_use(),
        objects=sys.getallocatedblocks(),
        open_files=len(os.listdir("/proc/self/fd")),
        threads=threading.active_count(),
        children=descendants(),
    )


def one_round(folder: Path, steps: int | None) -> None:
    """A whole run, whose folder is removed."""
    shown, words = io.StringIO(), ["train", "tiny", "--run.folder", str(folder), "--run.name", "soak"]
    length = ["--run.checkpoint-steps", "20"] if steps is None else ["--train.steps", str(steps)]
    with contextlib.redirect_stdout(shown):
        status = mifo([*words, *length])
    if status != 0:
        sys.exit(f"a run ended with status {status}:\n{shown.getvalue()}")
    shutil.rmtree(folder / "soak")


def complaints(sights: list[Sight]) -> list[str]:
    """What is not flat; empty where all is."""
    quarter = len(sights) // 4
    early, late = sights[quarter : 2 * quarter], sights[-quarter:]
    found = []
    before, after = (statistics.median(s.resident_mib for s in part) for part in (early, late))
    if after > GROWTH * before:
        found.append(f"resident memory went from {before:.1f} to {after:.1f} MiB")
    for name in ("open_files", "threads", "children"):
        most = max(getattr(s, name) for s in early)
        worst = max(getattr(s, name) for s in late)
        if worst > most:
            found.append(f"{name.replace('_', ' ')} went from {most} to {worst}")
    return found


def report_growth(before: tracemalloc.Snapshot) -> None:
    """What holds more than after the warm-up, with the calls that led there."""
    after = tracemalloc.take_snapshot()
    for growth in after.compare_to(before, "traceback")[:SHOWN]:
        print(f"{growth.size_diff / 1024:+.1f} KiB in {growth.count_diff:+d} blocks")
        print("\n".join(growth.traceback.format(limit=8)))


def main() -> int:
    """Run rounds for the given time; 1 if anything piles up."""
    parser = argparse.ArgumentParser(description="train tiny over and over and watch what piles up")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--steps", type=int, help="train.steps of a round (default: the recipe's)")
    parser.add_argument("--trace", action="store_true", help="name the lines of Python that hold more at the end")
    parser.add_argument("--json", type=Path, help="write every sight here")
    known = parser.parse_args()
    started, sights, before = time.monotonic(), [], None
    with tempfile.TemporaryDirectory(prefix="mifo-soak-") as folder:
        while len(sights) < FEWEST_ROUNDS or time.monotonic() - started < 60 * known.minutes:
            one_round(Path(folder), known.steps)
            sights.append(look(started))
            print(
                "round {}: {minutes:.1f} min, {resident_mib:.1f} MiB, heap {heap_mib:.2f} MiB, {objects} objects, {open_files} "
                "files, {threads} threads, {children} children".format(len(sights), **asdict(sights[-1])),
                flush=True,
            )
            if known.trace and len(sights) == WARM_UP:
                tracemalloc.start(12)
                before = tracemalloc.take_snapshot()
    if known.json is not None:
        known.json.write_text(json.dumps([asdict(s) for s in sights], indent=1), encoding="utf-8")
    if before is not None:
        report_growth(before)
    found = complaints(sights)
    print("\n".join(found) or f"flat over {len(sights)} rounds in {sights[-1].minutes:.0f} minutes")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
