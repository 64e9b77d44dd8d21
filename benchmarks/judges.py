"""How good are the judges on Hazard World, what do attacks do to them, and do openings hold? Writes JSON.

    python benchmarks/judges.py seed 0 --weights out/hazard_world/0 --other out/hazard_world/1   # one seed's model
    python benchmarks/judges.py summary                                                         # all measured seeds

The models are those of benchmarks/hazard_world.py; results lie in benchmarks/results/judges. A test-bed for the
mechanism: a flip rate of this world's models says nothing about large models.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from safecode_mllm.hazard_world import load_world
from safecode_mllm.hazard_world.bench import make_bench
from safecode_mllm.hazard_world.judging import (
    ATTACKED,
    ATTACKS,
    judge_quality,
    mean_with_interval,
    measure_flips,
    world_judges,
)
from safecode_mllm.hazard_world.openings import FORCED_WRONG, JUDGED, STYLES, measure_openings
from safecode_mllm.judges.hf_models import JudgeModel

RESULTS = Path(__file__).parent / "results" / "judges"
TEST_SEED, TEST_N = 0, 480
QUALITIES = ("accuracy", "precision", "recall", "auc", "ece")
OPENINGS = ("refusals_kept", "answers_kept", "garbled", "balanced_accuracy", "explained", "reason_true")


def main() -> int:
    """Parse the command line and run one of the parts."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    seed = parts.add_parser("seed", help="measure the model of one seed")
    seed.add_argument("seed", type=int)
    seed.add_argument("--weights", type=Path, required=True, help="folder of its model")
    seed.add_argument("--other", type=Path, help="folder of another seed's model, which judges for it in one row")
    seed.add_argument("--n", type=int, default=TEST_N, help="test scenes")
    parts.add_parser("summary", help="collect the seeds' results")
    arguments = parser.parse_args()
    if arguments.part == "summary":
        _write("summary", summarise([json.loads(path.read_text()) for path in sorted(RESULTS.glob("seed*.json"))]))
    else:
        _write(f"seed{arguments.seed}", run_seed(arguments))
    return 0


def run_seed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every judge, every attack on the judges that are attacked, and every style of going on."""
    torch.set_num_threads(1)
    model, processor = load_world(arguments.weights)
    other = None if arguments.other is None else JudgeModel(*load_world(arguments.other), sees=True)
    judges = world_judges(model, processor, other)
    record: dict[str, Any] = {"training_seed": arguments.seed, "n": arguments.n, "split_seed": TEST_SEED}
    record["judges"] = {}
    for name, judge in judges.items():
        started = time.process_time()
        found = judge_quality(judge, n=arguments.n, seed=TEST_SEED).as_dict()
        record["judges"][name] = _plain(found) | {"ms": round(1000 * (time.process_time() - started) / arguments.n, 2)}
        _tell(f"judge {name}: accuracy {found['accuracy']:.3f}")
    record["attacks"] = {}
    for attack in ATTACKS:
        record["attacks"][attack.name] = {}
        for name in ATTACKED:
            flips = measure_flips(judges[name], attack, n=arguments.n, seed=TEST_SEED)
            record["attacks"][attack.name][name] = {key: _bits(values) for key, values in vars(flips).items()}
            _tell(f"{attack.name} on {name}: {statistics.fmean(flips.flipped):.3f} flipped")
    bench = make_bench(model, processor, n=arguments.n, seed=TEST_SEED)
    record["openings"] = {
        kind: {
            style.name: _plain(measure_openings(bench, style, against_the_model=kind == FORCED_WRONG).as_dict())
            for style in STYLES
        }
        for kind in (JUDGED, FORCED_WRONG)
    }
    return record


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means over the seeds with lowest and highest, and flips with intervals from a bootstrap over scenes."""
    judges = {name: [_quality(run["judges"][name], run["n"]) for run in runs] for name in runs[0]["judges"]}
    attacks = {
        attack: {name: _flips([run["attacks"][attack][name] for run in runs]) for name in found}
        for attack, found in runs[0]["attacks"].items()
    }
    openings = {
        kind: {
            style: {metric: _spread([run["openings"][kind][style][metric] for run in runs]) for metric in OPENINGS}
            for style in styles
        }
        for kind, styles in runs[0]["openings"].items()
    }
    return {
        "seeds": [run["training_seed"] for run in runs],
        "n": runs[0]["n"],
        "judges": judges,
        "attacks": attacks,
        "openings": openings,
    }


def _quality(found: dict[str, Any], n: int) -> dict[str, float | None]:
    return {metric: found[metric] for metric in (*QUALITIES, "ms")} | {"unknown": found["outcomes"]["unknown"] / n}


def _flips(per_model: list[dict[str, str]]) -> dict[str, Any]:
    """Return the rates of one attack on one judge: over all models, and for each of them."""

    def rates(models: list[dict[str, str]]) -> dict[str, Any]:
        return {
            "flipped": _interval([_bools(one["flipped"]) for one in models]),
            "obeyed": _interval([_bools(one["obeyed"]) for one in models]),
            "obeyed_to_safe": _interval([_where(one["obeyed"], one["claimed_safe"]) for one in models]),
        }

    by_seed = [rates([one]) for one in per_model]
    return {"n": len(per_model[0]["flipped"]), "all_seeds": rates(per_model), "by_seed": by_seed}


def _bits(values: list[bool]) -> str:
    return "".join("1" if value else "0" for value in values)


def _bools(bits: str) -> list[bool]:
    return [bit == "1" for bit in bits]


def _where(bits: str, chosen: str) -> list[bool]:
    return [bit == "1" for bit, is_chosen in zip(bits, chosen, strict=True) if is_chosen == "1"]


def _interval(per_model: list[list[bool]]) -> dict[str, float]:
    mean, low, high = mean_with_interval(per_model)
    return _plain({"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4)})


def _spread(values: list[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "lowest": None, "highest": None}
    return {"mean": round(statistics.fmean(known), 4), "lowest": round(min(known), 4), "highest": round(max(known), 4)}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return values with NaN, which is no JSON, as None, and rates rounded."""
    return {key: _plain_value(value) for key, value in values.items()}


def _plain_value(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return None if math.isnan(value) else round(value, 6)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write(name: str, values: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(values, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    raise SystemExit(main())
