"""Builds, tests and measures on a GPU machine, in stages that do not depend on each other.

    python scripts/gpu_report.py kernels      build, GPU tests, sanitizers, benchmark of the decode step
    python scripts/gpu_report.py generate     GPU tests of generation, benchmark of whole answers

Everything goes to $OUT if it is set, else to benchmarks/results/gpu_<report>: results.json, log.txt and a few pictures,
written as the stages end, so that a run that is stopped leaves what it has. A tool that the machine lacks or that
refuses it is recorded as "not available", never as a pass. Needs no network. The exit code is 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# All stages together: what the stages may take is chosen so that it is not reached.
BUDGET_SECONDS = 8.5 * 60
NOT_AVAILABLE = 3  # exit code of a stage's program that finds its tool or device missing


@dataclass(frozen=True)
class Stage:
    """One program; it is stopped after so many seconds."""

    name: str
    command: list[str]
    seconds: int
    environment: dict[str, str] | None = None


BUILD = Stage(
    "build",
    [
        *(sys.executable, "-m", "pip", "install", "--quiet"),
        *("--no-build-isolation", "--no-deps", "--no-index", "-e", "."),
    ],
    180,
    {"SAFECODE_NATIVE": "on", "SAFECODE_CUDA": "on"},
)
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def kernel_stages(out: Path) -> list[Stage]:
    """Return the stages of the kernels' report."""
    return [
        BUILD,
        Stage("back ends", [sys.executable, "-m", "safecode_kernels"], 30),
        Stage("tests", [*PYTEST, "tests/kernels", "-k", "native_cuda or triton or torch_ops", "-m", "not slow"], 150),
        Stage("sanitizers", ["bash", "scripts/sanitize_cuda.sh", sys.executable], 100),
        Stage(
            "benchmark",
            [
                *(sys.executable, "benchmarks/decode_step_gpu.py", "--minutes", "2.5"),
                *("--json", str(out / "decode_step_gpu.json"), "--plot", str(out)),
            ],
            200,
        ),
    ]


def generate_stages(out: Path) -> list[Stage]:
    """Return the stages of the generation's report."""
    return [
        BUILD,
        Stage("tests", [*PYTEST, "tests/mllm/test_on_gpu.py"], 120),
        Stage(
            "benchmark",
            [
                *(sys.executable, "benchmarks/generate.py", "--device", "cuda", "--rounds", "3"),
                *("--json", str(out / "generate_gpu.json")),
            ],
            400,
        ),
    ]


def run(stage: Stage, log: Path, left: float) -> dict[str, object]:
    """Run a stage with its output in the log; returns what is recorded about it."""
    start = time.monotonic()
    with log.open("a") as file:
        file.write(f"\n=== {stage.name}: {' '.join(stage.command)}\n")
        file.flush()
        try:
            done = subprocess.run(
                stage.command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=min(stage.seconds, max(1, left)),
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(stage.environment or {})},
                check=False,
            )
            code: int | None = done.returncode
        except subprocess.TimeoutExpired:
            code = None
        except OSError as error:
            file.write(f"{error}\n")
            code = NOT_AVAILABLE
    outcome = {0: "passed", None: "out of time", NOT_AVAILABLE: "not available"}.get(code, f"failed (exit code {code})")
    return {"stage": stage.name, "outcome": outcome, "seconds": round(time.monotonic() - start, 1)}


def collect(out: Path, record: dict[str, object]) -> None:
    """Write results.json: the stages, and what the benchmarks wrote."""
    measured = {
        path.stem: json.loads(path.read_text())
        for path in sorted(out.glob("*_gpu.json"))
        if path.name != "results.json"
    }
    (out / "results.json").write_text(json.dumps({**record, **measured}, indent=1) + "\n")


def main() -> int:
    """Run the stages of a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", choices=("kernels", "generate"))
    options = parser.parse_args()
    default = ROOT / "benchmarks" / "results" / f"gpu_{options.report}"
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else default
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.write_text("")
    end = time.monotonic() + BUDGET_SECONDS
    stages: list[dict[str, object]] = []
    for stage in (kernel_stages if options.report == "kernels" else generate_stages)(out):
        stages.append(run(stage, log, end - time.monotonic()))
        print(f"{stages[-1]['stage']:<12} {stages[-1]['outcome']:<24} {stages[-1]['seconds']} s", flush=True)
        collect(out, {"report": options.report, "stages": stages})
    print(f"written to {out}")
    return int(any(str(stage["outcome"]).startswith(("failed", "out of time")) for stage in stages))


if __name__ == "__main__":
    sys.exit(main())
