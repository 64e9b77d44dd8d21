"""Pictures of the decode step's measurements: how many times faster than each baseline, and how near to the memory.

python benchmarks/decode_step_plots.py RESULTS.json FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BASELINES = {
    "ratio_eager": "naive PyTorch",
    "ratio_compact": "PyTorch on candidates",
    "ratio_compile": "torch.compile",
    "ratio_published": "published step",
}
MODES = {"greedy": "greedy", "temperature": "temperature", "top_p": "top-p", "top_k_top_p": "top-k + top-p"}


def draw(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write speedup.png and bandwidth.png for the prepared calls of the fastest back end; returns the paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    prepared = [row for row in rows if row["layer"] == "native" and row["backend"] != "eager"]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True, constrained_layout=True)
    for axis, beta in zip(axes, (0.1, 0.0), strict=True):
        _speedups(axis, [row for row in prepared if row["beta"] == beta], beta)
    axes[0].set_ylabel("times faster (log scale)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(BASELINES), frameon=False)
    paths = [folder / "speedup.png"]
    figure.savefig(paths[0], dpi=130)
    if any(row["bandwidth_share"] is not None for row in prepared):
        figure, axis = pyplot.subplots(figsize=(8, 4.5), constrained_layout=True)
        _shares(axis, [row for row in prepared if row["beta"] > 0 and row["mode"] == "greedy"])
        paths.append(folder / "bandwidth.png")
        figure.savefig(paths[1], dpi=130)
    pyplot.close("all")
    return paths


def _speedups(axis: Any, rows: list[dict[str, Any]], beta: float) -> None:
    """One group per mode, one bar per baseline: the median over shapes, with the lowest and highest as a line."""
    width = 0.8 / len(BASELINES)
    for place, (field, label) in enumerate(BASELINES.items()):
        for group, mode in enumerate(MODES):
            found = sorted(row[field] for row in rows if row["mode"] == mode and row[field])
            if not found:
                continue
            middle = found[len(found) // 2]
            x = group + (place - (len(BASELINES) - 1) / 2) * width
            axis.bar(x, middle, width * 0.9, color=f"C{place}", label=label if group == 0 else None)
            axis.plot([x, x], [found[0], found[-1]], color="black", linewidth=1)
    axis.set_yscale("log")
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_xticks(range(len(MODES)), MODES.values())
    axis.set_title(f"plausibility beta = {beta:g}")


def _shares(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Time of the bare read over time of the step, per shape."""
    labels = [f"V={row['V']}\nB={row['B']}\n{row['dtype']}" for row in rows]
    axis.bar(range(len(rows)), [row["bandwidth_share"] or 0 for row in rows], color="C0")
    axis.set_xticks(range(len(rows)), labels, fontsize=7)
    axis.set_ylabel("share of the read bandwidth")
    axis.set_ylim(0, 1.05)
    axis.set_title("greedy, beta = 0.1: reading the clean logits once, against the whole step")


if __name__ == "__main__":
    report = json.loads(Path(sys.argv[1]).read_text())
    for path in draw(report["rows"], Path(sys.argv[2])):
        print(path)
