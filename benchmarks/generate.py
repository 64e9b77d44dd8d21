"""What does steering cost? Whole answers: ours against stock generate, plain forward passes and the published code.

    python benchmarks/generate.py --quick                  both CPU geometries in about three minutes on two cores
    python benchmarks/generate.py --json FILE              ten pairs of everything (about an hour on a CPU)
    python benchmarks/generate.py --published CHECKOUT     also the published implementation, from a checkout of it

Arms run in turns. On a CPU the time is processor time of one thread, and every ratio is the median over rounds of one
arm's time over another's in the same round, because such machines drift by a fifth. On a GPU it is wall clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from generate_arms import SAMPLING, Arm, Arms, PublishedWork
from generate_models import Geometry, build
from timing import machine

SHORT, LONG = 25, 64  # tokens of a short answer (5 guided and 20 free) and of a longer one
ROUNDS, QUICK_ROUNDS = 10, 2


@dataclass
class Row:
    """One arm on one geometry; a ratio is this arm's time over the other's, None where the other was not run.

    Two are the other way round: `ratio_published` says how many times longer the published code takes, and
    `ratio_single` how many times longer the same requests take one at a time.
    """

    arm: str
    geometry: str
    batch: int
    threads: int
    new_tokens: int
    seconds_median: float
    samples_per_second: float
    seconds_first_token: float | None
    lm_positions: int | None
    vision_calls: int | None
    peak_mb: float | None
    ratio_stock: float | None
    ratio_floor: float | None
    ratio_published: float | None
    ratio_single: float | None
    ratio_unjudged: float | None


@dataclass(frozen=True)
class Spec:
    """An arm, and the names of the arms that it is compared with."""

    run: Arm
    new_tokens: int
    stock: str | None = None
    floor: str | None = None
    published: str | None = None
    single: str | None = None
    unjudged: str | None = None
    batch: int = 1


def specs(geometry: Geometry, published: str | None, quick: bool) -> dict[str, Spec]:
    """Return the arms of batch 1."""
    found: dict[str, Spec] = {}
    for tokens in (SHORT, LONG):
        arms = Arms(geometry, 1, tokens)
        stock, floor = f"stock_{tokens}", f"floor_{tokens}"
        found[stock] = Spec(arms.stock, tokens)
        found[floor] = Spec(arms.floor, tokens, stock)
        judged, steered = f"floor_judge_{tokens}", f"steered_{tokens}"
        found[judged] = Spec(partial(arms.floor, judge=True), tokens, stock, unjudged=floor)
        # One behind the other: what the judge costs is the difference of the two, and machines drift.
        found[steered] = Spec(arms.steered, tokens, stock, floor)
        found[f"steered_judge_{tokens}"] = Spec(arms.steered_judge, tokens, stock, judged, unjudged=steered)
        if tokens == LONG:
            found["weight0_64"] = Spec(arms.weight0, tokens, stock)
            # On a GPU these steps are captured and replayed.
            static = partial(arms.steered, cache_implementation="static")
            found["steered_static_64"] = Spec(static, tokens, stock, floor)
        if tokens == SHORT:
            found["stock_sampled_25"] = Spec(partial(arms.stock, **SAMPLING), tokens, stock)
            found["steered_sampled_25"] = Spec(partial(arms.steered, **SAMPLING), tokens, "stock_sampled_25", floor)
            if not quick:
                found["naive_25"] = Spec(arms.naive, tokens, stock, floor)
                found["stock_static_25"] = Spec(partial(arms.stock, cache_implementation="static"), tokens, stock)
    return found | (published_specs(geometry, published, quick) if published else {})


def published_specs(geometry: Geometry, checkout: str, quick: bool) -> dict[str, Spec]:
    """Return the published code, our drop-in on exactly its work, and our own decoding: 5 guided tokens, the rest free.

    After a verdict of "unsafe" the published code guides fewer than that.
    """
    found: dict[str, Spec] = {}
    lengths = {"safe_20": ("safe", SHORT - 5), "unsafe_20": ("unsafe", SHORT - 5), "safe_64": ("safe", LONG)}
    for name, (verdict, free) in lengths.items():
        if quick and name != "safe_20":
            continue
        arms = Arms(geometry, 1, free + 5)
        work = PublishedWork(arms, checkout, verdict, free)
        theirs = f"published_{name}"
        found[theirs] = Spec(work.published, work.new_tokens)
        found[f"dropin_{name}"] = Spec(work.dropin, work.new_tokens, published=theirs)
        found[f"ours_{name}"] = Spec(partial(arms.steered, **SAMPLING), free + 5, published=theirs)
    return found


def batch_specs(geometry: Geometry, batches: list[int]) -> dict[str, Spec]:
    """Return steered batches with the model as its own judge."""
    name = "steered_judge_batch_{}".format
    return {
        name(batch): Spec(Arms(geometry, batch, SHORT).steered_judge, SHORT, single=name(batches[0]), batch=batch)
        for batch in batches
    }


def measure(name: str, arms: dict[str, Spec], model: Any, rounds: int) -> list[Row]:
    """Run the arms in turns and return a row for each."""
    clock = wall_clock if model.device.type == "cuda" else time.process_time
    counted = {arm: count(model, spec.run) for arm, spec in arms.items()}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, spec in arms.items():
            start = clock()
            spec.run()
            seconds[arm].append(clock() - start)
    return [make_row(name, arm, spec, seconds, counted[arm]) for arm, spec in arms.items()]


def make_row(
    geometry: str, arm: str, spec: Spec, seconds: dict[str, list[float]], counted: dict[str, float | int | None]
) -> Row:
    """Return the measurement of one arm."""

    def ratio(other: str | None) -> float | None:
        if other not in seconds:
            return None
        return statistics.median(a / b for a, b in zip(seconds[arm], seconds[other], strict=True))

    median = statistics.median(seconds[arm])
    against, alone = ratio(spec.published), ratio(spec.single)
    return Row(
        arm=arm,
        geometry=geometry,
        batch=spec.batch,
        threads=torch.get_num_threads(),
        new_tokens=spec.new_tokens,
        seconds_median=round(median, 4),
        samples_per_second=round(spec.batch / median, 4),
        ratio_stock=rounded(ratio(spec.stock)),
        ratio_floor=rounded(ratio(spec.floor)),
        ratio_published=rounded(None if against is None else 1 / against),
        ratio_single=rounded(None if alone is None else spec.batch / alone),
        ratio_unjudged=rounded(ratio(spec.unjudged)),
        **counted,  # type: ignore[arg-type]
    )


def rounded(value: float | None) -> float | None:
    """Return a ratio as it is written down."""
    return None if value is None else round(value, 3)


def wall_clock() -> float:
    """Seconds, with everything done that was asked of the GPU."""
    torch.cuda.synchronize()
    return time.perf_counter()


def count(model: Any, run: Callable[[], object]) -> dict[str, Any]:
    """Run once, untimed: language-model positions, vision calls, seconds to the first token, peak memory."""
    positions, visions, first = [], [], []
    language, vision = parts(model)
    start = time.perf_counter()

    def on_language(module: Any, arguments: Any, output: Any) -> None:
        positions.append(output.last_hidden_state.shape[0] * output.last_hidden_state.shape[1])
        first.append(time.perf_counter() - start)

    hooks = [
        language.register_forward_hook(on_language),
        vision.register_forward_hook(lambda *_: visions.append(1)),
    ]
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {
        "lm_positions": sum(positions),
        "vision_calls": len(visions),
        "seconds_first_token": round(first[0], 4) if first else None,
        "peak_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1) if on_gpu else None,
    }


def parts(model: Any) -> tuple[Any, Any]:
    """Return the language model and the vision tower."""
    inner = model.model
    return inner.language_model, getattr(inner, "vision_tower", None) or inner.visual


HEADER = (
    "geometry arm                      batch tokens   seconds  samples/s  positions vision   /stock  /floor  published/"
    "  singly/ /unjudged"
)


def show(row: Row) -> None:
    """Print a row of the table."""

    def cell(value: float | None, width: int) -> str:
        return f"{'-' if value is None else f'{value:.2f}':>{width}}"

    print(
        f"{row.geometry:<8} {row.arm:<26}{row.batch:>5}{row.new_tokens:>7}{row.seconds_median:>10.3f}"
        f"{row.samples_per_second:>11.2f}{row.lm_positions or 0:>11}{row.vision_calls or 0:>7}"
        f"{cell(row.ratio_stock, 9)}{cell(row.ratio_floor, 8)}{cell(row.ratio_published, 12)}"
        f"{cell(row.ratio_single, 9)}{cell(row.ratio_unjudged, 10)}",
        flush=True,
    )


def main() -> int:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, no batches of 32: about three minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--published", metavar="CHECKOUT", help="folder of a checkout of the published code")
    parser.add_argument("--geometry", action="append", help="G1, G2, llava-7b or qwen-7b; may be repeated")
    parser.add_argument("--rounds", type=int, help=f"rounds, default {ROUNDS}")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    on_gpu = options.device != "cpu"
    names = options.geometry or (["llava-7b", "qwen-7b"] if on_gpu else ["G1", "G2"])
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    rows: list[Row] = []
    print(HEADER)
    for name in names:
        geometry = build(name, options.device, torch.bfloat16 if on_gpu else torch.float32)
        # A batch of 32 long prompts takes a minute on a core and shows nothing that 8 do not.
        batches = [1, 8] if options.quick or name == "G1" else [1, 8, 32]
        groups = [(specs(geometry, options.published, options.quick), rounds)]
        groups.append((batch_specs(geometry, batches), max(1, rounds // 2)))
        for arms, times in groups:
            found = measure(name, arms, geometry.model, times)
            rows += found
            for row in found:
                show(row)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                report = {"machine": machine(), "rounds": rounds, "rows": [asdict(row) for row in rows]}
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
