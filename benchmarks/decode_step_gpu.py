"""The decode step on a GPU: graph replays of every back end, against eager, compiled and other projects' samplers.

    python benchmarks/decode_step_gpu.py --json FILE --plot FOLDER
    python benchmarks/decode_step_gpu.py --device cpu       a dry run that shows the script works; its times say nothing

Each variant is captured once over enough sets of logits to exceed the L2 cache several times ("cold"), and once over
one set ("warm"); a replay's time over its number of calls is what a call costs in a captured generation. What a graph
cannot hold (it looks at a value on the host) is timed call by call, and its row says so. Every back end's tokens are
compared with the CPU's first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import decode_step_baselines as baselines
from decode_step import make_shape, usable_backends
from timing import machine

import safecode_kernels as sk
from safecode_kernels.testing import Case

VOCABULARIES, BATCHES = (152_064, 32_064), (1, 8, 64, 256)
MODES = ("greedy", "top_k_top_p")
BETAS = (0.1, 0.0)
REPLAYS = 30
# Logits of all sets together against the L2 cache: nothing of one set is left when its turn comes again.
L2_FACTOR = 3
MOST_SETS = 64
PLAIN_TOP_K, PLAIN_TOP_P = 50, 0.9


@dataclass
class Row:
    """One variant on one shape; `note` says what is special about it, or why it has no time."""

    variant: str
    mode: str
    beta: float
    V: int
    B: int
    dtype: str
    sets: int
    graph: bool
    us_min: float | None
    us_median: float | None
    ratio_eager: float | None
    bandwidth_share: float | None
    note: str = ""


class Clock:
    """Times batches of calls on a device: graph replays between events on a GPU, plain calls elsewhere."""

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"

    def replays(self, calls: list[Callable[[], object]]) -> list[float]:
        """Return microseconds per call of replays of a graph that holds all calls."""
        if not self.on_gpu:
            return self.one_by_one(calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:  # compiles, tunes and allocates outside the graph
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        return [self._between_events(graph.replay) / len(calls) for _ in range(REPLAYS)]

    def one_by_one(self, calls: list[Callable[[], object]]) -> list[float]:
        """Return microseconds per call without a graph."""
        calls[0]()
        times = []
        for _ in range(REPLAYS if self.on_gpu else 2):
            if self.on_gpu:
                times.append(self._between_events(lambda: [call() for call in calls]) / len(calls))
            else:
                start = time.perf_counter()
                for call in calls:
                    call()
                times.append((time.perf_counter() - start) * 1e6 / len(calls))
        return times

    def _between_events(self, run: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def l2_bytes(self) -> int:
        """Size of the second-level cache."""
        return torch.cuda.get_device_properties(self.device).L2_cache_size if self.on_gpu else 2**20

    def read_bytes_per_us(self) -> float:
        """The rate at which a large copy reads and writes memory."""
        source = torch.empty(2**28 if self.on_gpu else 2**22, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / min(self.one_by_one([lambda: target.copy_(source)]))


def moved(case: Case, device: torch.device, seed: int) -> Case:
    """Return a case on the device, its logits scaled a little so that sets differ."""
    scale = 1 + 0.001 * seed
    return Case(
        clean=(case.clean * scale).to(device),
        noised=None if case.noised is None else (case.noised * scale).to(device),
        params=case.params,
        refusal_mask=None if case.refusal_mask is None else case.refusal_mask.to(device),
        mask_id=None if case.mask_id is None else case.mask_id.to(device),
        seeds=case.seeds.to(device),
        stream=case.stream.to(device),
        step=case.step,
    )


def sets_for(case: Case, clock: Clock, cold: bool) -> list[Case]:
    """Return one set of logits, or as many as exceed the cache."""
    size = 2 * case.clean.numel() * case.clean.element_size()
    count = min(MOST_SETS, -(-L2_FACTOR * clock.l2_bytes() // size)) if cold else 1
    return [moved(case, clock.device, seed) for seed in range(max(2, count) if cold else 1)]


def ours(cases: list[Case], backend: str) -> list[Callable[[], object]]:
    """Return the prepared step on every set; results are overwritten, nothing is allocated in a call."""
    step = cases[0].prepare(backend, reuse_results=True)
    index = torch.full((cases[0].batch,), cases[0].step, device=cases[0].clean.device)
    return [lambda c=c: step(c.clean, c.noised, mask_id=c.mask_id, step=index) for c in cases]


def eager_chain(cases: list[Case]) -> list[Callable[[], object]]:
    """Return the naive chain on every set."""
    return [partial(baselines.naive, baselines.inputs_of(case)) for case in cases]


def compiled_chain(cases: list[Case]) -> list[Callable[[], object]]:
    """Return the compiled naive chain on every set: one compilation, since only the logits differ."""
    torch._dynamo.reset()
    first = baselines.inputs_of(cases[0])
    function = torch.compile(lambda z, n: baselines.naive(replace(first, clean=z, noised=n)), dynamic=False)
    return [lambda c=case: function(c.clean, c.noised) for case in cases]


def measure_shape(case: Case, mode: str, beta: float, clock: Clock, backends: list[str]) -> list[Row]:
    """Return the rows of one shape: back ends cold and warm, the chain eager, in a graph and compiled."""
    shape = {
        "mode": mode,
        "beta": beta,
        "V": case.clean.shape[1],
        "B": case.batch,
        "dtype": str(case.clean.dtype).removeprefix("torch."),
    }
    cold, warm = sets_for(case, clock, True), sets_for(case, clock, False)
    variants: list[tuple[str, list[Case], Callable[[list[Case]], list[Callable[[], object]]], bool]] = []
    variants.append(("eager chain", cold, eager_chain, False))
    variants.append(("eager chain", cold, eager_chain, True))
    variants.append(("torch.compile", cold, compiled_chain, True))
    for name in backends:
        if name == "eager":  # it looks at the host
            continue
        variants.append((name, cold, lambda sets, name=name: ours(sets, name), True))
        variants.append((name + " warm", warm, lambda sets, name=name: ours(sets, name), True))
    rate, eager = clock.read_bytes_per_us(), None
    rows = []
    for variant, sets, make, in_graph in variants:
        times, note = attempt(lambda: (clock.replays if in_graph else clock.one_by_one)(make(sets)))  # noqa: B023
        least = min(times) if times else None
        if variant == "eager chain" and not in_graph:
            eager = least
        read = case.clean.numel() * case.clean.element_size() * (1 if beta > 0 else 2)
        rows.append(
            Row(
                variant=variant,
                sets=len(sets),
                graph=in_graph,
                us_min=least,
                us_median=statistics.median(times) if times else None,
                ratio_eager=eager / least if eager and least else None,
                bandwidth_share=read / rate / least if least else None,
                note=note,
                **shape,  # type: ignore[arg-type]
            )
        )
    return rows


def attempt(run: Callable[[], list[float]]) -> tuple[list[float], str]:
    """Return times and "", or none and why: one variant that fails must not end the report."""
    try:
        return run(), ""
    except Exception as error:
        return [], f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def other_samplers() -> dict[str, Callable[[torch.Tensor], object] | str]:
    """Return other projects' samplers for the plain top-k + top-p task, or why one is not compared."""
    found: dict[str, Callable[[torch.Tensor], object] | str] = {}
    try:
        from flashinfer.sampling import top_k_top_p_sampling_from_logits

        found["FlashInfer"] = lambda z: top_k_top_p_sampling_from_logits(z, PLAIN_TOP_K, PLAIN_TOP_P)
    except ImportError as error:
        found["FlashInfer"] = f"not compared: {error}"
    try:
        from vllm.v1.sample.ops.topk_topp_triton import apply_top_k_top_p_triton

        def sample(z: torch.Tensor) -> torch.Tensor:
            k = torch.full((len(z),), PLAIN_TOP_K, device=z.device, dtype=torch.int32)
            p = torch.full((len(z),), PLAIN_TOP_P, device=z.device)
            kept = apply_top_k_top_p_triton(z.clone(), k, p)
            return kept.softmax(-1).div(torch.empty_like(kept).exponential_()).argmax(-1)

        found["vLLM Triton"] = sample
    except ImportError as error:
        found["vLLM Triton"] = f"not compared: {error}"
    return found


def measure_plain(batch: int, clock: Clock, backends: list[str]) -> list[Row]:
    """Return rows of the plain task, top-k 50 and top-p 0.9 on fp32 logits without contrast, with others' samplers."""
    params = sk.StepParams(contrast_weight=0, plausibility_beta=0, greedy=False, top_k=PLAIN_TOP_K, top_p=PLAIN_TOP_P)
    logits = 2.5 * torch.randn(batch, VOCABULARIES[0], device=clock.device)
    seeds = torch.arange(batch, device=clock.device)
    step = torch.zeros(batch, dtype=torch.int64, device=clock.device)
    runs: dict[str, Callable[[], object] | str] = {}
    for name in backends:
        if name != "eager":
            prepared = sk.prepare_step(
                params, batch=batch, vocab_size=logits.shape[1], device=logits.device, dtype=logits.dtype, seeds=seeds,
                backend=name, reuse_results=True,
            )  # fmt: skip
            runs[name] = lambda prepared=prepared: prepared(logits, step=step)
    for name, sampler in other_samplers().items():
        runs[name] = sampler if isinstance(sampler, str) else lambda sampler=sampler: sampler(logits)
    rows = []
    for name, run in runs.items():
        times, note = ([], run) if isinstance(run, str) else attempt(lambda: clock.replays([run]))  # noqa: B023
        rows.append(
            Row(
                name,
                "plain top-k top-p",
                0.0,
                logits.shape[1],
                batch,
                "float32",
                1,
                True,
                min(times) if times else None,
                statistics.median(times) if times else None,
                None,
                None,
                note,
            )
        )
    return rows


def equal_tokens(backends: list[str], clock: Clock) -> dict[str, str]:
    """Return for each back end "equal" if its tokens are the CPU's for both betas and every mode, else what differs."""
    found = {}
    for name in backends:
        differing = []
        for beta in BETAS:
            for mode in ("greedy", "temperature", "top_p", "top_k_top_p"):
                case = make_shape(VOCABULARIES[0], 8, torch.bfloat16, beta, mode)
                expected = case.run("auto").token
                try:
                    same = moved(case, clock.device, 0).run(name).token.cpu().equal(expected)
                    problem = "" if same else f"{mode} beta {beta:g}"
                except Exception as error:
                    problem = f"{mode} beta {beta:g}: {type(error).__name__}: {error}"
                differing += [problem] if problem else []
        found[name] = "; ".join(differing) or "equal"
    return found


def show(row: Row) -> None:
    """Print a row of the table."""

    def cell(value: float | None, width: int, digits: int) -> str:
        return f"{'-' if value is None else f'{value:.{digits}f}':>{width}}"

    print(
        f"{row.variant:<18} {row.mode:<18} {row.beta:<4} {row.V:>7} {row.B:>4} {row.dtype:<9} "
        f"{'graph' if row.graph else 'calls'}{cell(row.us_min, 10, 2)}{cell(row.us_median, 10, 2)}"
        f"{cell(row.ratio_eager, 9, 1)}{cell(row.bandwidth_share, 7, 2)}  {row.note}",
        flush=True,
    )


def main() -> int:
    """Measure within the time, print, write JSON and a picture as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FOLDER")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=4.0, help="no shape is begun after so long")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; --device cpu shows that the script works", file=sys.stderr)
        return 3
    clock = Clock(torch.device(options.device))
    deadline = time.perf_counter() + 60 * options.minutes
    backends = usable_backends(options.device)
    report: dict[str, Any] = {"machine": machine(), "backends": {}, "equal_tokens": {}, "rows": [], "left_out": []}
    report["backends"] = {b.name: b.supports(clock.device, torch.bfloat16) or "usable" for b in sk.list_backends()}
    report["equal_tokens"] = equal_tokens(backends, clock)
    print(json.dumps({key: report[key] for key in ("backends", "equal_tokens")}, indent=1))
    small = options.device == "cpu"
    shapes = [(v, b) for b in BATCHES for v in VOCABULARIES] if not small else [(32_064, 1)]
    jobs: list[tuple[str, Callable[[], list[Row]]]] = [
        (f"plain B={b}", lambda b=b: measure_plain(b, clock, backends)) for b in (BATCHES if not small else (1,))
    ]
    for vocab_size, batch in shapes:
        for beta in BETAS:
            for mode in MODES:
                case = make_shape(vocab_size, batch, torch.bfloat16, beta, mode)
                jobs.append(
                    (
                        f"V={vocab_size} B={batch} beta={beta:g} {mode}",
                        lambda c=case, m=mode, x=beta: measure_shape(c, m, x, clock, backends),
                    )
                )
    for name, job in jobs:
        if time.perf_counter() > deadline:
            report["left_out"].append(name)
            continue
        for row in job():
            show(row)
            report["rows"].append(asdict(row))
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    if report["left_out"]:
        print(f"out of time, not measured: {', '.join(report['left_out'])}")
    if options.plot and report["rows"]:
        draw(report["rows"], options.plot)
    return 0


def draw(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write decode_step_gpu.png: microseconds per call over the batch, one line per variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(1, len(MODES), figsize=(12, 4.5), sharey=True, constrained_layout=True)
    for axis, mode in zip(axes, MODES, strict=True):
        chosen = [r for r in rows if r["mode"] == mode and r["beta"] > 0 and r["V"] == VOCABULARIES[0] and r["us_min"]]
        for variant in dict.fromkeys((r["variant"], r["graph"]) for r in chosen):
            points = sorted((r["B"], r["us_min"]) for r in chosen if (r["variant"], r["graph"]) == variant)
            label = variant[0] + ("" if variant[1] else ", no graph")
            axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set(xscale="log", yscale="log", xlabel="batch", title=f"{mode}, V = {VOCABULARIES[0]:,}, beta = 0.1")
    axes[0].set_ylabel("microseconds per call")
    if axes[0].lines:
        axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(folder / "decode_step_gpu.png", dpi=130)


if __name__ == "__main__":
    sys.exit(main())
