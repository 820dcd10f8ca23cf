"""Kill real processes at chosen moments, and say what a finished run folder holds.

`Victims` runs the command line in forked processes and can send a signal a chosen time after the n-th entry into a region:
generation, grading, evaluation, second model, rl update, sft update, mixed update, phase switch, save. `digest` is what must be
the same however often a run was killed: weights, optimizers, importance map, state, metrics, samples, and the events of training.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from mifo.train.checkpoint import list_checkpoints, read_json
from mifo.train.manifest import check_files, read_manifest

SERVER = Path(__file__).with_name("kill_server.py")
WALL_CLOCK = {"elapsed", "seconds", "tokens_per_second"}
SESSION = {"journal", "verdicts"}  # byte counts of lines with times; verdicts on demonstrations, given at every start


@dataclass(frozen=True)
class Strike:
    """Send `number` after `seconds` in the `occurrence`-th stay (from 1) in a region."""

    region: str
    occurrence: int = 1
    seconds: float = 0.0
    number: int = signal.SIGKILL
    again: float | None = None
    """A second signal so many seconds later."""
    together: int | None = None
    """Another signal at the same instant."""


@dataclass
class Life:
    """What one process did: exit status (negative: by a signal), where it was struck, how long it stayed in each region."""

    status: int = 0
    struck: str | None = None
    struck_at: float = 0.0
    ended_at: float = 0.0
    stays: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def seconds_to_end(self) -> float:
        """From the signal to the end of the process."""
        return self.ended_at - self.struck_at


class Victims:
    """A fork server; use as a context manager."""

    def __enter__(self) -> Victims:
        self.server = subprocess.Popen(
            [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._rest = b""
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stdin.close()
        self.server.wait(30)
        self.server.stdout.close()

    def run(self, arguments, *, log, strike: Strike | None = None, slow=None, now=None, limit: float = 120.0) -> Life:
        """`mifo ARGUMENTS` to its end, or to that of the strike, which comes early when the event `now` is set."""
        job = {"arguments": [str(a) for a in arguments], "log": str(log), "slow": slow or {}}
        self.server.stdin.write(json.dumps(job).encode() + b"\n")
        self.server.stdin.flush()
        life, inside, due, pid = Life(), [], None, 0
        entries: dict[str, int] = defaultdict(int)
        deadline = time.monotonic() + limit
        while True:
            clock = time.monotonic()
            if due is not None and (clock >= due or (now is not None and now.is_set())):
                send(pid, strike)
                if life.struck is None:
                    life.struck, life.struck_at = "+".join(inside) or "between", clock
                    due = None if strike.again is None else clock + strike.again
                else:
                    due = None
            if clock > deadline:
                os.kill(pid, signal.SIGKILL)
                raise TimeoutError(f"{arguments} took more than {limit} s, in {inside}")
            line = self._line(min(deadline - clock, (due or deadline) - clock, 60.0 if now is None else 0.1))
            if line is None:
                continue
            word, _, rest = line.partition(" ")
            if word == "pid":
                pid = int(rest)
            elif word == "enter":
                inside.append(rest)
                entries[rest] += 1
                if strike and life.struck is None and (rest, entries[rest]) == (strike.region, strike.occurrence):
                    due = time.monotonic() + strike.seconds
            elif word == "leave":
                region, _, seconds = rest.rpartition(" ")
                inside.remove(region)
                life.stays[region].append(float(seconds))
            else:
                life.status, life.ended_at = int(rest), time.monotonic()
                return life

    def _line(self, seconds: float) -> str | None:
        if b"\n" not in self._rest:
            ready, _, _ = select.select([self.server.stdout], [], [], max(0.0, seconds))
            if not ready:
                return None
            data = os.read(self.server.stdout.fileno(), 65536)
            if not data:
                raise EOFError("the fork server ended")
            self._rest += data
        if b"\n" not in self._rest:
            return None
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()


def send(pid: int, strike: Strike) -> None:
    """The signal of a strike; two that come together are sent while the process is stopped, so that both are pending."""
    if strike.together is None:
        os.kill(pid, strike.number)
        return
    os.kill(pid, signal.SIGSTOP)
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.001)
    for number in (strike.number, strike.together, signal.SIGCONT):
        os.kill(pid, number)


def timeless(value):
    """Plain data without wall-clock fields."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in WALL_CLOCK}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 by component of a run folder's newest checkpoint and logs."""
    newest = list_checkpoints(folder / "checkpoints")[-1]
    manifest = read_manifest(newest)
    check_files(newest, manifest, hashes=True)
    found = {name: entry.sha256 for name, entry in manifest.files.items() if name != "state.json"}
    state = timeless(read_json(newest / "state.json"))
    found["state"] = _hash({name: value for name, value in state.items() if name not in SESSION})
    for stream in ("metrics", "samples", "events", "evaluations"):
        log = folder / f"{stream}.jsonl"
        text = log.read_text() if log.exists() else ""  # a run without held-out problems evaluates nothing
        records = [json.loads(line) for line in text.splitlines()]
        records = [r for r in records if r.get("event") not in ("checkpoint", "resumed", "log_lost", "not_removed")]
        found[stream] = _hash([timeless(record) for record in records])
    return found


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest(folder: Path) -> str:
    """One hash of `contents`."""
    return _hash(contents(folder))
