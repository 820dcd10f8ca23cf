"""The suite: finding by finding, run what is not finished, measure, judge, and keep the judgement.

FOLDER/runs, configs, logs      the runs, shared between findings (lab.trials)
FOLDER/measures/KEY.json        measurements of exported models
FOLDER/findings/NAME.json       what was found; a finding that is there whole is not run again
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from mifo.errors import CheckpointError, ConfigError
from mifo.lab.arena_results import SUMMARY
from mifo.lab.arena_statistics import Estimate
from mifo.lab.claims import Claim
from mifo.lab.paper import s0_method, s0_updates, s2_baselines, s3_plasticity, s4_coupling
from mifo.lab.paper.finding import Evidence, Finding, Judged, no_reward
from mifo.lab.paper.plan import Plan
from mifo.lab.paper.tier import Tier
from mifo.lab.trial_results import EXPORT, TrialResult, read_trial
from mifo.lab.trials import RUNS, Trial, run_trials
from mifo.train.checkpoint import read_json
from mifo.train.estimate import empty_model
from mifo.train.lock import FolderLock
from mifo.train.stop import Stop
from mifo.train.storage import Storage, replace_file

FINDINGS: tuple[Finding, ...] = (
    *s0_updates.FINDINGS,
    *s0_method.FINDINGS,
    *s2_baselines.FINDINGS,
    *s3_plasticity.FINDINGS,
    *s4_coupling.FINDINGS,
)
JUDGED, MEASURES = "findings", "measures"
FAR_FROM_BUDGET = 0.25  # share beyond which a run's FLOPs are noted


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a suite is run on this machine; none of it changes what is found.

    `machine` names it and the versions, for records. `arena` is the folder of a finished arena whose runs stand for those of
    findings that allow it.
    """

    folder: Path
    jobs: int
    threads: int
    arena: Path | None = None
    machine: str = ""


def chosen(names: Sequence[str] | None) -> list[Finding]:
    """The findings of these names, in the order in which they are named; all where none are.

    Raises:
        ConfigError: a name is unknown.
    """
    known = {finding.name: finding for finding in FINDINGS}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ConfigError(f"--only: '{unknown[0]}' is no finding. They are: {', '.join(known)}.")
    return [known[name] for name in dict.fromkeys(names)] if names else list(FINDINGS)


def run_suite(
    tier: Tier,
    findings: Sequence[Finding],
    options: Options,
    *,
    stop: Stop,
    say: Callable[[str], None],
    judged_one: Callable[[], None] = lambda: None,
) -> list[Judged] | None:
    """Put findings to the test.

    Args:
        tier: how much is trained.
        findings: in the order in which they are run.
        options: where, and how many at a time.
        stop: when asked, runs under way save; the same call goes on from there.
        say: hears of every run and finding.
        judged_one: called after each finding, whose record is there then.

    Returns:
        What was found, in the same order; None where `stop` was asked before the end.

    Raises:
        ConfigError: the folder holds other runs of these names, or the arena has not the runs.
        CheckpointError: the folder is in use or cannot be written to.
    """
    with FolderLock(options.folder / JUDGED, elsewhere="--folder"):
        return _run_findings(tier, findings, options, stop, say, judged_one)


def _run_findings(
    tier: Tier,
    findings: Sequence[Finding],
    options: Options,
    stop: Stop,
    say: Callable[[str], None],
    judged_one: Callable[[], None],
) -> list[Judged] | None:
    plan, judged = Plan(tier=tier, folder=options.folder), list[Judged]()
    for seed in plan.seeds:
        plan.write_shipped(seed)
    for place, finding in enumerate(findings, start=1):
        say(f"{place} of {len(findings)}: {finding.name} ({finding.source})")
        found = _Work(plan=plan, finding=finding, options=options, stop=stop, say=say).execute()
        if found is None:
            return None
        say(f"  {finding.name}: {found.verdict}")
        judged.append(found)
        judged_one()
        _drop_exports(options.folder, plan, finding, findings[place:])
    return judged


def recorded(tier: Tier, options: Options, say: Callable[[str], None] = lambda line: None) -> list[Judged]:
    """All findings whose record in the folder is of this tier and of the runs that they have now, in their order.

    `say` hears of records of others.
    """
    plan, found = Plan(tier=tier, folder=options.folder), []
    for finding in FINDINGS:
        path = options.folder / JUDGED / f"{finding.name}.json"
        arena = read_json(path).get("arena") if path.is_file() else None
        own = replace(options, arena=None if arena is None else Path(arena))
        work = _Work(plan=plan, finding=finding, options=own, stop=Stop(), say=lambda line: None)
        judged = work.stored(work.key([] if arena is not None else list(finding.trials(plan))))
        if judged is not None:
            found.append(judged)
        elif path.is_file():
            say(f"{finding.name} is left out of the page: its record is of other runs than it has now")
    return found


@dataclass(kw_only=True)
class _Work:
    """One finding of one suite."""

    plan: Plan
    finding: Finding
    options: Options
    stop: Stop
    say: Callable[[str], None]

    def execute(self) -> Judged | None:
        """From its record, or from its runs."""
        use_arena = self.options.arena is not None and bool(self.finding.in_arena)
        trials = [] if use_arena else list(self.finding.trials(self.plan))
        key = self.key(trials)
        stored = self.stored(key)
        if stored is not None and not stored.failed:
            return stored
        setting, notes = self.finding.setting, tuple[str, ...]()
        failures: tuple[str, ...] = ()
        results: Mapping[str, TrialResult]
        if use_arena:
            results = self._arena_results()
            starts = sorted({result.config.model.path for result in results.values()})
            setting = (
                f"Runs of the arena {self.options.arena}, from {', '.join(starts)}, at its equal budget and with the rates of "
                f"its grid, in place of these: {self.finding.setting}"
            )
            notes = tuple(self._arena_notes(results))
        else:
            done = run_trials(
                trials,
                self.options.folder,
                jobs=self.options.jobs,
                threads=self.options.threads,
                stop=self.stop,
                say=lambda line: self.say(f"  {line}"),
                flag="--folder",
            )
            if done.stopped:
                return None
            results = done.results
            failures = tuple(f"{failure.name} failed: {failure.reason}" for failure in done.failures)
        return self._judge(results, failures, setting, notes, key)

    def _judge(
        self,
        results: Mapping[str, TrialResult],
        failures: tuple[str, ...],
        setting: str,
        notes: tuple[str, ...],
        key: str,
    ) -> Judged:
        evidence = Evidence(plan=self.plan, results=results, cache=self.options.folder / MEASURES)
        names = sorted({name.rpartition("-seed")[0] for name in results})
        judged = Judged(
            finding=self.finding,
            claims=tuple(self.finding.judge(evidence)),
            notes=(
                *self.finding.remarks(evidence),
                *notes,
                *failures,
                *no_reward(evidence, names),
                *_far_from_budget(results),
            ),
            runs=len(results),
            flops=sum(result.summary["flops"] for result in results.values()),
            seconds=sum(result.summary["seconds"] for result in results.values()),
            failed=len(failures),
            setting=setting,
            machine=self.options.machine,
        )
        arena = str(self.options.arena) if self.options.arena is not None and self.finding.in_arena else None
        _write(self._record, _plain(judged) | {"key": key, "arena": arena})
        return judged

    @property
    def _record(self) -> Path:
        return self.options.folder / JUDGED / f"{self.finding.name}.json"

    def key(self, trials: Sequence[Trial]) -> str:
        """A hash of all that the finding's runs are, so that a record of others is not taken for theirs."""
        runs = {trial.name: beyond_defaults(trial.config) for trial in trials}
        arena = ["", *map(str, sorted(self._arena_folders().values()))] if not trials else ""
        sizes = {name: value for name, value in encode_tier(self.plan.tier).items() if name != "description"}
        content = json.dumps([sizes, runs, arena])
        return hashlib.sha256(content.encode()).hexdigest()

    def stored(self, key: str) -> Judged | None:
        """What a record of that key says; None where there is none."""
        if not self._record.is_file():
            return None
        record = read_json(self._record)
        if record.get("key") != key:
            return None
        try:
            return _from_plain(self.finding, record)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._record} is no whole record ({error}). Remove it: its runs are judged again."
            ) from error

    def _arena_results(self) -> dict[str, TrialResult]:
        """Finished runs of the arena under the names used here.

        Raises:
            ConfigError: it has none of a method.
        """
        folders = self._arena_folders()
        for name, entry in self.finding.in_arena.items():
            if not any(key.rpartition("-seed")[0] == name for key in folders):
                raise ConfigError(
                    f"--arena = '{self.options.arena}' has no finished run of {entry} (seeds {list(self.plan.seeds)}), which "
                    f"{self.finding.name} needs. Finish the arena, or leave --arena out."
                )
        return {name: read_trial(folder) for name, folder in folders.items()}

    def _arena_notes(self, results: Mapping[str, TrialResult]) -> Iterator[str]:
        """What makes an arena's runs others than those that they stand for.

        Raises:
            ConfigError: its model is not the tier's.
        """
        shape = empty_model(self.plan.recipe())
        own = sum(parameter.numel() for parameter in shape.parameters())
        for name, result in results.items():
            if result.summary["parameters"] != own:
                raise ConfigError(
                    f"--arena = '{self.options.arena}': {name} has {result.summary['parameters']:,} parameters, and the model of "
                    f"tier {self.plan.tier.name} has {own:,}. Name an arena of that model, or another --tier."
                )
        for name in self.finding.in_arena:
            missing = [str(seed) for seed in self.plan.seeds if f"{name}-seed{seed}" not in results]
            if missing:
                yield f"{name} has no finished run of seed {', '.join(missing)}"
        spent = [result.summary["flops"] for result in results.values()]
        if max(spent) > (1.0 + FAR_FROM_BUDGET) * min(spent):
            yield f"budgets are not equal: the runs spent {min(spent):.2g} to {max(spent):.2g} FLOPs"

    def _arena_folders(self) -> dict[str, Path]:
        """Folders of finished runs, under the names used here."""
        assert self.options.arena is not None
        places = {
            f"{name}-seed{seed}": self.options.arena / RUNS / f"{entry}-seed{seed}"
            for name, entry in self.finding.in_arena.items()
            for seed in self.plan.seeds
        }
        return {name: folder for name, folder in places.items() if (folder / SUMMARY).is_file()}


def beyond_defaults(settings: Any) -> Any:
    """What a configuration says beyond the schema's defaults, as plain data: a setting that a later version adds is not in it."""
    if isinstance(settings, tuple):
        return [beyond_defaults(item) for item in settings]
    if not is_dataclass(settings):
        return settings
    found = {"": type(settings).__name__}
    for field in fields(settings):
        value = getattr(settings, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if value != default:
            found[field.name] = beyond_defaults(value)
    return found


def encode_tier(tier: Tier) -> dict[str, Any]:
    """A tier as plain data."""
    return asdict(tier)


def _far_from_budget(results: Mapping[str, TrialResult]) -> list[str]:
    notes = []
    for name, result in results.items():
        budget, spent = result.config.train.max_flops, result.summary["flops"]
        if budget is not None and abs(spent / budget - 1.0) > FAR_FROM_BUDGET:
            notes.append(f"{name} spent {spent:.2g} FLOPs, {100 * (spent / budget - 1.0):+.0f} % of its budget")
    return notes


def _drop_exports(folder: Path, plan: Plan, done: Finding, later: Sequence[Finding]) -> None:
    """Exports are as large as the model; those that no later finding of this call needs go."""
    needed = {one.name for finding in later for trial in finding.trials(plan) for one in trial.lineage}
    for trial in done.trials(plan):
        for name in {one.name for one in trial.lineage} - needed:
            shutil.rmtree(folder / RUNS / name / EXPORT, ignore_errors=True)


# --- as plain data -----------------------------------------------------------------------------------------------------


def _plain(judged: Judged) -> dict[str, Any]:
    return {
        "finding": judged.finding.name,
        "verdict": judged.verdict,
        "claims": [asdict(claim) | {"verdict": claim.verdict} for claim in judged.claims],
        "notes": list(judged.notes),
        "runs": judged.runs,
        "flops": judged.flops,
        "seconds": judged.seconds,
        "failed": judged.failed,
        "setting": judged.setting,
        "machine": judged.machine,
    }


def _from_plain(finding: Finding, record: Mapping[str, Any]) -> Judged:
    claims = []
    for stored in record["claims"]:
        fields = {key: value for key, value in stored.items() if key != "verdict"}
        measured = fields.pop("measured")
        claims.append(Claim(**fields, measured=None if measured is None else Estimate(**measured)))
    return Judged(
        finding=finding,
        claims=tuple(claims),
        notes=tuple(record["notes"]),
        runs=record["runs"],
        flops=record["flops"],
        seconds=record["seconds"],
        failed=record.get("failed", 0),
        setting=record.get("setting", finding.setting),
        machine=record.get("machine", ""),
    )


def suite_record(tier: Tier, judged: Sequence[Judged]) -> dict[str, Any]:
    """Everything of a suite, for paper.json."""
    return {
        "tier": encode_tier(tier),
        "findings": [{"source": j.finding.source, "claim": j.finding.claim, **_plain(j)} for j in judged],
    }


def _write(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(Storage(), path, json.dumps(record, indent=1).encode("utf-8"))
