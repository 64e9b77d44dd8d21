"""The measured tables of docs/kernels.md and docs/performance.md, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
KERNELS = RESULTS / "decode_step" / "cpu.json"
GENERATION = RESULTS / "generate" / "cpu.json"
MODES = {"greedy": "greedy", "temperature": "temperature", "top_p": "top-p", "top_k_top_p": "top-k + top-p"}

Row = dict[str, Any]


def markdown(rows: list[list[str]]) -> str:
    """Return rows, header first, as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def speed_tables() -> dict[str, str]:
    """Return the tables by name."""
    if not KERNELS.exists() or not GENERATION.exists():
        return {}
    kernels, generation = (json.loads(path.read_text()) for path in (KERNELS, GENERATION))
    rows = [row for row in kernels["rows"] if row["backend"] == "native_cpu"]
    prepared = [row for row in rows if row["layer"] == "native"]
    return {
        "kernels_machine": machine_text(kernels["machine"]),
        "kernels_cut": cut_table([row for row in prepared if row["beta"] > 0]),
        "kernels_dense": dense_table([row for row in prepared if row["beta"] == 0]),
        "kernels_op": op_text(rows),
        "generate_machine": machine_text(generation["machine"]),
        **{f"generate_{name}": generate_table(generation["rows"], name) for name in ("G1", "G2")},
    }


def machine_text(machine: Row) -> str:
    """Return what was measured on."""
    return f"{machine['cpu']}, torch {machine['torch']}"


def cut_table(rows: list[Row]) -> str:
    """Return the ratios with the plausibility cut, one line per shape."""
    header = ["V", "B", "dtype", "greedy: naive", "compact", "compile", "published", "top-k + top-p: naive", "share"]
    table = [header]
    for shape, found in by_shape(rows):
        greedy, filtered = found["greedy"], found["top_k_top_p"]
        ratios = (greedy[f"ratio_{name}"] for name in ("eager", "compact", "compile", "published"))
        table.append([*shape, *map(times, ratios), times(filtered["ratio_eager"]), share(greedy["bandwidth_share"])])
    return markdown(table)


def dense_table(rows: list[Row]) -> str:
    """Return the ratios without the cut, one line per shape."""
    table = [["V", "B", "dtype", *MODES.values()]]
    for shape, found in by_shape(rows):
        table.append([*shape, *(times(found[mode]["ratio_eager"]) for mode in MODES)])
    return markdown(table)


def by_shape(rows: list[Row]) -> Iterable[tuple[tuple[str, str, str], dict[str, Row]]]:
    """Return for each shape that was measured its rows by mode."""
    shapes: dict[tuple[int, int, str], dict[str, Row]] = {}
    for row in rows:
        shapes.setdefault((row["V"], row["B"], row["dtype"]), {})[row["mode"]] = row
    for (vocabulary, batch, dtype), found in sorted(shapes.items()):
        yield (f"{vocabulary:,}", str(batch), dtype), found


def op_text(rows: list[Row]) -> str:
    """Return by how much the call through torch.ops is longer where the step is short enough to tell."""
    times_of: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["B"] == 1:
            key = tuple(row[name] for name in ("mode", "beta", "V", "dtype"))
            times_of.setdefault(key, {})[row["layer"]] = row["us_min"]
    more = sorted(found["op"] - found["native"] for found in times_of.values())
    return f"{more[len(more) // 2]:.0f} us (median over all modes at B = 1)"


def generate_table(rows: list[Row], geometry: str) -> str:
    """Return what whole answers cost on one geometry, one line per arm."""
    compared = ["stock", "floor", "without a judge", "published takes", "one at a time takes"]
    table = [["arm", "batch", "new tokens", *compared, "model positions", "vision calls"]]
    for row in rows:
        if row["geometry"] == geometry:
            counts = (row["lm_positions"], row["vision_calls"])
            names = ("stock", "floor", "unjudged", "published", "single")
            ratios = (row.get(f"ratio_{name}") for name in names)
            cells = [row["arm"], str(row["batch"]), str(row["new_tokens"]), *(ratio(value) for value in ratios)]
            table.append([*cells, *("" if count is None else str(count) for count in counts)])
    return markdown(table)


def times(value: float | None) -> str:
    """Return how many times faster, or that it was not measured."""
    return "not measured" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def ratio(value: float | None) -> str:
    """Return a ratio of times; empty where the other was not run."""
    return "" if value is None else f"{value:.2f}"


def share(value: float | None) -> str:
    """Return a share in percent; empty where it was not measured."""
    return "" if value is None else f"{value:.0%}"
