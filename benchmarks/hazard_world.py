"""Does SafeCoDe do in Hazard World what the paper says? Trains, tunes on validation, evaluates on test, writes JSON.

    python benchmarks/hazard_world.py seed 0 --weights out/hazard_world/0      # one seed: train, tune, evaluate
    python benchmarks/hazard_world.py no-priors --weights out/hazard_world/np  # the control world
    python benchmarks/hazard_world.py shipped                                  # four times the scenes, shipped model
    python benchmarks/hazard_world.py summary                                  # all seeds measured, in one table

Results lie in benchmarks/results/hazard_world. The shipped model is seed 0, fixed before any seed was trained.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from safecode_mllm.hazard_world import WEIGHTS, load_world, run_evaluation, save_tuned, train, tune
from safecode_mllm.hazard_world.evaluate import Evaluation

RESULTS = Path(__file__).parent / "results" / "hazard_world"
TEST_SEED = 0
TEST_N = 480
# Run after seed0.json: 53 dusk scenes left the wrong-verdict comparison open there. Another draw, nothing retuned.
SHIPPED_SEED = 1
SHIPPED_N = 1920
# The arms that the paired comparisons need.
COMPARED_ARMS = ("plain", "contrast_only", "verdict_only", "safecode")
METRICS = ("unsafe_refused", "safe_answered", "balanced_accuracy", "garbled")


def main() -> int:
    """Parse the command line and run one of the parts."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    seed = parts.add_parser("seed", help="train, tune and evaluate one seed")
    seed.add_argument("seed", type=int)
    no_priors = parts.add_parser("no-priors", help="train and evaluate the world without priors")
    for part in (seed, no_priors):
        part.add_argument("--weights", type=Path, required=True, help="folder of the model; trained if it has none")
        part.add_argument("--n", type=int, default=TEST_N, help="test scenes")
    parts.add_parser("shipped", help="evaluate the shipped model on more scenes")
    parts.add_parser("summary", help="collect the seeds' results")
    arguments = parser.parse_args()
    if arguments.part == "summary":
        _write("summary", summarise())
    elif arguments.part == "shipped":
        _write("shipped", run_shipped())
    elif arguments.part == "seed":
        _write(f"seed{arguments.seed}", run_seed(arguments.seed, arguments.weights, arguments.n))
    else:
        _write("no_priors", run_no_priors(arguments.weights, arguments.n))
    return 0


def run_seed(seed: int, weights: Path, n: int) -> dict[str, Any]:
    """Train one seed if its folder is empty, choose its settings on validation, evaluate it on test."""
    torch.set_num_threads(1)
    if not (weights / "config.json").is_file():
        train(seed, weights, _progress("training"))
    model, processor = load_world(weights)
    sweep = tune(model, processor, progress=_progress("tuning"))
    save_tuned(sweep, weights)
    evaluation = run_evaluation(
        model, processor, n=n, seed=TEST_SEED, controls=True, weights=weights, progress=_progress("evaluating")
    )
    return _record(evaluation, weights) | {
        "training_seed": seed,
        "validation": {
            "best_sigma": sweep.best_sigma,
            "sigmas": [vars(point) for point in sweep.sigmas],
            "grid": [vars(point) for point in sweep.grid],
        },
    }


def run_no_priors(weights: Path, n: int) -> dict[str, Any]:
    """Train the world without priors if its folder is empty; steering must change nothing in it."""
    torch.set_num_threads(1)
    if not (weights / "config.json").is_file():
        train(0, weights, _progress("training"), variant="no_priors")
    model, processor = load_world(weights)
    evaluation = run_evaluation(
        model,
        processor,
        n=n,
        seed=TEST_SEED,
        only=COMPARED_ARMS,
        weights=weights,
        priors=False,
        progress=_progress("evaluating"),
    )
    return _record(evaluation, weights)


def run_shipped() -> dict[str, Any]:
    """Evaluate the shipped model on a larger draw, the arms of the paired comparisons only."""
    torch.set_num_threads(1)
    model, processor = load_world()
    evaluation = run_evaluation(
        model,
        processor,
        n=SHIPPED_N,
        seed=SHIPPED_SEED,
        only=COMPARED_ARMS,
        progress=_progress("evaluating"),
    )
    return _record(evaluation, WEIGHTS)


def summarise() -> dict[str, Any]:
    """Return mean, lowest and highest of every rate over the seeds, and how often each expectation held."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("seed*.json"))]
    seeds = [run["training_seed"] for run in runs]
    summary: dict[str, Any] = {"seeds": seeds, "n": runs[0]["n"], "methods": {}, "controls": {}}
    for kind in ("methods", "controls"):
        for name in runs[0][kind]:
            found = [run[kind][name] for run in runs]
            summary[kind][name] = {metric: _spread([f[metric] for f in found]) for metric in METRICS}
            summary[kind][name]["strata"] = {
                stratum: _spread([f["strata"][stratum]["balanced_accuracy"] for f in found])
                for stratum in found[0]["strata"]
            }
    summary["comparisons"] = [
        {key: comparisons[0][key] for key in ("kind", "claim", "first", "second", "metric", "stratum")}
        | {
            "difference": _spread([c["difference"] for c in comparisons]),
            "held": sum(c["holds"] for c in comparisons),
        }
        for comparisons in zip(*(run["comparisons"] for run in runs), strict=True)
    ]
    sweeps = zip(*(run["validation"]["sigmas"] for run in runs), strict=True)
    summary["validation_sigma"] = {
        str(points[0]["noise_sigma"]): _spread([p["balanced_accuracy"] for p in points]) for points in sweeps
    }
    summary["best_sigma"] = [run["validation"]["best_sigma"] for run in runs]
    summary["tuned"] = [run["tuned"] for run in runs]
    return summary


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": round(statistics.fmean(values), 4),
        "lowest": round(min(values), 4),
        "highest": round(max(values), 4),
    }


def _record(evaluation: Evaluation, weights: Path) -> dict[str, Any]:
    training = json.loads((weights / "training.json").read_text())
    return evaluation.as_dict(with_intervals=True) | {
        "training": {key: training[key] for key in ("seed", "variant", "steps", "seconds")},
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _write(name: str, values: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(values, indent=1) + "\n")
    print(f"wrote {path}")


def _progress(stage: str) -> Any:
    """Return a callback that prints a line now and then."""
    last = time.monotonic()

    def show(done: int, total: int, detail: object) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 20:
            last = time.monotonic()
            print(f"{stage}: {done}/{total} {detail}", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    raise SystemExit(main())
