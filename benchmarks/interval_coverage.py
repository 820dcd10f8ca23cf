"""How often the intervals of `mifo compare` hold the truth: simulated arenas with known means, no model.

Each experiment draws a table of seeds by problems, score = mean + seed + problem + noise (normal), and asks whether the 95 %
interval holds the mean; beside it, whether a plain bootstrap of both ways would have. Prints the table of docs/compare.md.

    python benchmarks/interval_coverage.py [--experiments 2000]
"""

from __future__ import annotations

import argparse

import numpy as np

from mifo.lab import arena_statistics
from mifo.lab.arena_statistics import interval

MEAN, PROBLEMS = 0.4, 100
# Standard deviations between seeds, between problems, and of a single score.
CASES = {
    "seeds differ by 5 points": (0.05, 0.3, 0.3),
    "seeds differ by 10 points, problems little": (0.1, 0.05, 0.1),
    "seeds hardly differ": (0.001, 0.3, 0.3),
}
SEEDS = (1, 2, 3, 5, 10)


def coverage(spreads: tuple[float, float, float], seeds: int, experiments: int) -> tuple[float, float, float]:
    """Share of experiments whose interval, and whose plain bootstrap, holds the mean; mean half-width of the interval."""
    by_seed, by_problem, noise = spreads
    draw = np.random.default_rng(seeds)
    held, plain_held, width = 0, 0, 0.0
    widening = arena_statistics.widening
    for _ in range(experiments):
        table = MEAN + draw.normal(0, by_seed, (seeds, 1)) + draw.normal(0, by_problem, (1, PROBLEMS))
        table = table + draw.normal(0, noise, (seeds, PROBLEMS))
        found = interval(table)
        arena_statistics.widening = lambda _: 1.0
        plain = interval(table)
        arena_statistics.widening = widening
        held += found.low <= MEAN <= found.high
        plain_held += plain.low <= MEAN <= plain.high
        width += (found.high - found.low) / 2 / experiments
    return held / experiments, plain_held / experiments, width


def main() -> None:
    """Print one line a case and number of seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=2000)
    experiments = parser.parse_args().experiments
    print(
        "| | seeds | these intervals cover | a plain bootstrap covers | half-width |\n| --- | --- | --- | --- | --- |"
    )
    for case, spreads in CASES.items():
        for seeds in SEEDS:
            held, plain, width = coverage(spreads, seeds, experiments)
            print(
                f"| {case} | {seeds} | {100 * held:.1f} % | {100 * plain:.1f} % | {100 * width:.1f} points |",
                flush=True,
            )


if __name__ == "__main__":
    main()
