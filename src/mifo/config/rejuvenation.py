"""Rejuvenation inside a run (S3): as a stage of its own, and between intervals.

Rules of the schema (see `config.schema`) hold here too.
"""

from __future__ import annotations

from dataclasses import dataclass

from mifo.config.bounds import Count, Share


@dataclass(frozen=True, kw_only=True)
class RejuvenationConfig:
    """Rejuvenation: pull the weights towards a base, and give the neurons behind over-confident tokens back to it."""

    base: str | None = None
    """A folder or hub id to fuse with and reset to; none: model.path, the model as the run loaded it."""
    alpha: Share = 0.5
    """α: share of the trained weights in the fusion; the rest is the base's."""
    rho: Share = 0.01
    """ρ: share of all neurons that each target token gives back; 0 fuses alone."""
    targets: Count = 16
    """N: target tokens of each demonstration, those whose entropy differs most from the base's."""
    samples: Count = 64
    """Demonstrations to calibrate on, the first of the training data that are short enough."""
    max_tokens: Count = 2048
    """Most tokens of prompt and demonstration together; longer ones are left out."""
    signed: bool = False
    """Only tokens whose entropy fell are targets; false takes rises too, as printed in the paper."""
    per_module_quota: bool = False
    """ρ of every projection instead of ranking all of them together."""


@dataclass(frozen=True, kw_only=True)
class IntervalRejuvenationConfig(RejuvenationConfig):
    """Rejuvenation between the intervals of a method that returns from SFT phases to RL."""

    every_intervals: Count | None = None
    """After every so many SFT phases, before RL goes on; none: never."""
