"""Timing that can be trusted on a shared machine: variants taken in turns, minima and percentiles, and where it ran."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

Variant = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Microseconds of many runs of one variant."""

    values: list[float]

    @property
    def least(self) -> float:
        """The fastest run: what the code takes when nothing disturbs it."""
        return min(self.values)

    def percentile(self, share: float) -> float:
        """The run that is slower than this share of all."""
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def interleave(
    variants: Mapping[str, Variant], seconds: float, repeats: Mapping[str, int], least_rounds: int = 3
) -> dict[str, Times]:
    """Time variants in turns for so long, at least a few rounds, so that the machine's drift hits all alike.

    Args:
        variants: what to run, by name; each is run once beforehand.
        seconds: how long all of it may take.
        repeats: how often a variant runs per round, if not once. Its minimum is then a run with its input in the cache.
        least_rounds: rounds that are run however long they take.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least_rounds or time.perf_counter() < end:
        rounds += 1
        for name, run in variants.items():
            for _ in range(repeats.get(name, 1)):
                start = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - start) * 1e6)
    return {name: Times(values) for name, values in times.items()}


def read_microseconds(n_bytes: int) -> float | None:
    """Return how long one thread takes to read so many bytes that lie where these would; None without native code."""
    try:
        from safecode_kernels import _native
    except ImportError:
        return None
    data = torch.zeros(n_bytes // 4, dtype=torch.int32)
    return _native.read_seconds(data.data_ptr(), len(data), max(20, 10_000_000 // n_bytes)) * 1e6


def machine() -> dict[str, object]:
    """Return where numbers come from: processor, accelerator, versions, commit."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    found: dict[str, object] = {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "commit": _commit(),
    }
    for package in ("torch", "triton", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    try:
        from safecode_kernels import _native

        found["loops"] = _native.loops()
    except ImportError:
        found["loops"] = None
    return found


def _commit() -> str:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
