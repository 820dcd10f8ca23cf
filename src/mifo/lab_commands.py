"""What `mifo probe` and `mifo rejuvenate` do, once everything heavy may be imported: measure, write, show."""

from __future__ import annotations

import argparse
from pathlib import Path

from mifo.cli import quiet_libraries
from mifo.data.labelled import make_task
from mifo.errors import ConfigError
from mifo.lab.coupling import CouplingSettings, coupling
from mifo.lab.entropy import entropy
from mifo.lab.magnitude import magnitudes
from mifo.lab.overlap import overlap
from mifo.lab.redundancy import ratios, redundancy
from mifo.lab.rejuvenate import RejuvenationSettings, rejuvenate
from mifo.lab.samples import PairSettings
from mifo.lab.sparsify import SparsifySettings, sparsify
from mifo.report.figures import (
    draw_coupling,
    draw_entropy,
    draw_magnitude,
    draw_overlap,
    draw_redundancy,
    draw_rejuvenation,
    draw_sparsify,
)
from mifo.report.lab_tables import (
    bounds_table,
    coupling_table,
    drops_table,
    entropy_table,
    largest_table,
    magnitude_table,
    mask_table,
    notes_on_bounds,
    overlap_table,
    ratios_table,
    redundancy_table,
    rejuvenation_table,
    sparsify_table,
)
from mifo.report.output import writable_folder, write_outputs
from mifo.signals import ended_by_sigterm
from mifo.train.console import Screen
from mifo.train.device import set_up_cpu
from mifo.training_probe_verbs import refuse_flags


def rejuvenate_command(known: argparse.Namespace) -> int:
    """`mifo rejuvenate`."""
    screen = _begin()
    settings = RejuvenationSettings(
        alpha=known.alpha,
        rho=known.rho,
        targets=known.targets,
        signed=known.signed,
        per_module_quota=known.per_module_quota,
        pairs=_pair_settings(known),
        compute=known.compute,
        device=known.device,
    )
    with ended_by_sigterm():
        done = rejuvenate(known.base, known.over, known.out, settings)
    screen.print(done.note)
    screen.print(rejuvenation_table(done))
    lines = write_outputs(
        Path(known.out).expanduser(),
        "rejuvenation",
        record=None,  # it was written with the model
        rows=done.rows(),
        draw=lambda figure: draw_rejuvenation(figure, done),
    )
    _end(screen, [f"{known.out} (a plain Hugging Face folder; what was reset: rejuvenation.json)", *lines])
    return 0


def magnitude_command(known: argparse.Namespace) -> int:
    """`mifo probe magnitude`."""
    screen, folder = _begin(), writable_folder(known.out)
    found = magnitudes(known.before, known.after, largest=known.largest)
    for note in dict.fromkeys(one.note for one in found if one.note):
        screen.print(note)
    screen.print(magnitude_table(found))
    screen.print(largest_table(found))
    lines = write_outputs(
        folder,
        "magnitude",
        record={"comparisons": [one.record() for one in found]},
        rows=[row for one in found for row in one.rows()],
        draw=lambda figure: draw_magnitude(figure, found),
    )
    _end(screen, lines)
    return 0


def overlap_command(known: argparse.Namespace) -> int:
    """`mifo probe overlap`."""
    screen, folder = _begin(), writable_folder(known.out)
    found = overlap(known.checkpoints, top=known.top, names=known.names)
    if found.note:
        screen.print(found.note)
    screen.print(overlap_table(found))
    if found.masks:
        screen.print(mask_table(found))
    lines = write_outputs(
        folder,
        "overlap",
        record=found.record(),
        rows=found.rows(),
        draw=lambda figure: draw_overlap(figure, found),
    )
    _end(screen, lines)
    return 0


def entropy_command(known: argparse.Namespace) -> int:
    """`mifo probe entropy`."""
    screen, folder = _begin(), writable_folder(known.out)
    found = entropy(
        known.models,
        pairs=_pair_settings(known),
        fraction=known.token_fraction,
        compute=known.compute,
        device=known.device,
    )
    screen.print(found.note)
    screen.print(entropy_table(found))
    lines = write_outputs(
        folder,
        "entropy",
        record=found.record(),
        rows=found.rows(),
        draw=lambda figure: draw_entropy(figure, found),
    )
    _end(screen, lines)
    return 0


def sparsify_command(known: argparse.Namespace) -> int:
    """`mifo probe sparsify`."""
    if known.start is None or not known.models:
        raise ConfigError(
            "sparsify needs START and at least one MODEL trained from it, or --online: mifo probe sparsify --help."
        )
    online = dict.fromkeys(("recipe", "steps", "seeds", "jobs", "batch_size", "start_model", "warmup"))
    refuse_flags(known, "without --online", online)
    screen, folder = _begin(), writable_folder(known.out)
    settings = SparsifySettings(
        rates=SparsifySettings().rates if known.rates is None else tuple(known.rates),
        masks=known.masks,
        seed=known.seed,
        data=known.data,
        split=known.split,
        limit=known.limit,
        samples=known.samples,
        temperature=known.temperature,
        max_tokens=known.max_tokens,
        template=known.template,
        system_prompt=known.system_prompt,
        device=known.device,
    )
    done = sparsify(known.start, known.models, settings)
    screen.print(done.note)
    screen.print(sparsify_table(done))
    screen.print(drops_table(done))
    lines = write_outputs(
        folder,
        "sparsify",
        record=done.record(),
        rows=done.rows(),
        draw=lambda figure: draw_sparsify(figure, done),
    )
    _end(screen, lines)
    return 0


def redundancy_command(known: argparse.Namespace) -> int:
    """`mifo probe redundancy`."""
    screen, folder = _begin(), writable_folder(known.out)
    found = redundancy(
        known.start,
        known.models,
        pairs=_pair_settings(known),
        tokens=known.tokens,
        reward=known.reward,
        seed=known.seed,
        device=known.device,
    )
    compared = [ratios(found[0], other) for other in found[1:]]
    screen.print(found[0].note)
    screen.print(redundancy_table(found))
    if compared:
        screen.print(ratios_table(compared))
    lines = write_outputs(
        folder,
        "redundancy",
        record={"models": [one.record() for one in found], "ratios": [one.record() for one in compared]},
        rows=[row for one in found for row in one.rows()],
        draw=lambda figure: draw_redundancy(figure, found, compared),
    )
    _end(screen, lines)
    return 0


def coupling_command(known: argparse.Namespace) -> int:
    """`mifo probe coupling`."""
    screen, folder = _begin(), writable_folder(known.out)
    if known.instruction is not None and known.labels is None:
        raise ConfigError("--instruction asks for labels: give --labels with it.")
    task = make_task(tuple(known.labels), known.instruction) if known.labels else None
    settings = CouplingSettings(
        data=known.data,
        order=known.order,
        task=task,
        limit=known.limit,
        samples=known.samples,
        beta=known.beta,
        temperature=known.temperature,
        top_p=known.top_p,
        max_tokens=known.max_tokens,
        seed=known.seed,
        template=known.template,
        system_prompt=known.system_prompt,
        device=known.device,
    )
    found = coupling(known.models, settings)
    screen.print(found.note)
    screen.print(coupling_table(found))
    screen.print(bounds_table(found))
    _end(screen, notes_on_bounds(found))
    lines = write_outputs(
        folder,
        "coupling",
        record=found.record(),
        rows=found.rows(),
        draw=lambda figure: draw_coupling(figure, found),
    )
    _end(screen, lines)
    return 0


def _pair_settings(known: argparse.Namespace) -> PairSettings:
    return PairSettings(
        data=known.data,
        split=known.split,
        count=known.samples,
        max_tokens=known.max_tokens,
        template=known.template,
        system_prompt=known.system_prompt,
    )


def _begin() -> Screen:
    quiet_libraries()
    set_up_cpu(None)
    return Screen()


def _end(screen: Screen, lines: list[str]) -> None:
    for line in lines:
        screen.print(line)
