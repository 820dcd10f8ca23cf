"""Rewrite the table of recorded figures in README.md from results/*.json.

python benchmarks/table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

FOLDER = Path(__file__).parent
MARK = "<!-- made by table.py -->\n"


def details(name: str, record: dict[str, Any]) -> str:
    """The figures behind a ratio, in a few words."""
    if name == "rollout":
        rates = [record[side]["tokens_per_cpu_second"] for side in ("engine", "generate")]
        return f"{rates[0]:.0f} against {rates[1]:.0f} tokens per CPU-second"
    if name.startswith("rl_step"):
        own, peer = record["mifo"]["cpu_seconds"], record["trl"]["cpu_seconds"]
        return (
            f"CPU-seconds a step: {', '.join(f'{s:.1f}' for s in own)} against {', '.join(f'{s:.1f}' for s in peer)} "
            f"(TRL {record['trl']['setting']}); CPU ratio {record['ratio_cpu']}, wall ratio {record['ratio_wall']}"
        )
    if name == "freeze_overhead":
        whole = record["seconds"]["cpu"]["64"]
        return (
            f"{whole['freeze']:.2f} of {whole['interval']:.1f} CPU-seconds, {record['ratio_without_meter']} without the meter; "
            f"with four SFT updates {record['updates_of_16']['ratio']} and {record['updates_of_16']['ratio_without_meter']}"
        )
    if name == "logprob_memory":
        return (
            f"{record['ours']['peak_mib']:.0f} against {record['full']['peak_mib']:.0f} MiB, of which gradients "
            f"{record['gradients_mib']:.0f}; CPU time ratio {record['ratio_cpu']}"
        )
    if name.startswith("rejuvenate_memory"):
        parts = {part: entry["gib_of_all_layers"] for part, entry in record["parts"].items()}
        held = ", ".join(f"{part} {gib:.1f}" for part, gib in parts.items())
        weights = record["weights_of_all_layers_gib"]
        measured = record["measured_layers"]
        how = "all 32 layers" if measured == "32" else f"extrapolated from {measured} to 32 layers"
        return f"{held} GiB, {how}, {record['workload'].rpartition('widths / 1, ')[2]}; the weights are {weights:.1f}"
    if name == "cpu_arithmetic":
        middle = {arithmetic: median(runs["cpu_seconds"]) for arithmetic, runs in record["update"].items()}
        rates = record["product_gigaflops"]
        return (
            f"{middle['float32']:.1f} against {middle['bfloat16']:.1f} CPU-seconds an update; products at {rates['float32']} "
            f"against {rates['bfloat16']} GFLOP/s"
        )
    if name == "checkpoint":
        parts = []
        for memory in ("plenty", "little"):
            own, other = record[memory]["foreground"]["held"], record[memory]["background"]
            both = ", ".join(
                f"{held:.0f} of {done:.0f}" for held, done in zip(other["held"], other["done"], strict=True)
            )
            parts.append(f"{memory} of memory: {', '.join(f'{s:.0f}' for s in own)} s against {both} s")
        return f"a save of {record['bytes'] / 1e9:.2f} GB holds training up; " + "; ".join(parts)
    return ""


def main() -> None:
    """Read every record and rewrite the table."""
    lines = ["| script | ratio | figures | device | threads | load |", "| --- | --- | --- | --- | --- | --- |"]
    for path in sorted((FOLDER / "results").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        machine = record["machine"]
        load = machine["load_average"]
        device = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
        cells = (
            path.stem,
            f"**{record['ratio']}**",
            details(path.stem, record),
            f"{device}, {machine['cores']} cores",
            str(machine["threads"]),
            f"{load[0] if isinstance(load, list) else load:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    readme = FOLDER / "README.md"
    text = readme.read_text(encoding="utf-8")
    assert MARK in text
    readme.write_text(text.split(MARK)[0] + MARK + "\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
