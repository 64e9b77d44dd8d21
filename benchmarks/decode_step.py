"""How fast is the decode step? Back ends against plain PyTorch, minima of interleaved runs in one process.

    python benchmarks/decode_step.py --quick            4 shapes, under a minute
    python benchmarks/decode_step.py --json FILE        all shapes, rows and machine as JSON

Every variant's values are checked before it is timed. Baselines (see decode_step_baselines.py): (a) the naive eager
chain, (b) PyTorch on the candidates only, (d) the published step. One thread unless --threads says otherwise.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import decode_step_baselines as baselines

import safecode_kernels as sk
from safecode_kernels.testing import LOGPROB_ATOL, Case, make_case

VOCABULARIES, BATCHES, DTYPES = (32_064, 152_064), (1, 8, 32), (torch.bfloat16, torch.float32)
QUICK = [(v, b, torch.bfloat16) for v in VOCABULARIES for b in (1, 8)]
MODES: dict[str, dict[str, object]] = {
    "greedy": {},
    "temperature": {"greedy": False, "temperature": 0.8},
    "top_p": {"greedy": False, "temperature": 0.8, "top_p": 0.9},
    "top_k_top_p": {"greedy": False, "temperature": 0.8, "top_k": 50, "top_p": 0.9},
}
BETAS = (0.1, 0.0)
BIASES = (1.5, -1.0, 0.0)
NUCLEUS_SLACK = 2e-3
# The fast variant runs so often per round that its minimum is one with its input in the cache, as after a model's step.
FAST_RUNS = 12


@dataclass
class Row:
    """One measurement; ratios are the baseline's minimum over ours, None where the baseline does not exist."""

    mode: str
    beta: float
    layer: str
    V: int
    B: int
    dtype: str
    threads: int
    backend: str
    us_min: float
    us_p20: float
    ratio_eager: float
    ratio_compact: float | None
    ratio_compile: float | None
    ratio_published: float
    bandwidth_share: float | None


def measure(case: Case, mode: str, backend: str, seconds: float, threads: int) -> Row:
    """Check and time one shape."""
    beta = float(case.params.plausibility_beta)
    inputs = baselines.inputs_of(case)
    step = prepared(case, backend)
    variants: dict[str, Callable[[], object]] = {
        "ours": lambda: step(case.clean, case.noised, mask_id=case.mask_id, step=case.step),
        "eager": lambda: baselines.naive(inputs),
        "published": lambda: baselines.published(inputs),
    }
    if beta > 0:
        variants["compact"] = lambda: baselines.compact(inputs)
    check(case, step, inputs)
    times = interleave(variants, seconds)
    best = {name: min(values) for name, values in times.items()}
    read = case.clean.numel() * case.clean.element_size() * (1 if beta > 0 else 2)
    floor = read_microseconds(read)
    return Row(
        mode=mode,
        beta=beta,
        layer="native",
        V=case.clean.shape[1],
        B=case.batch,
        dtype=str(case.clean.dtype).removeprefix("torch."),
        threads=threads,
        backend=step.backend,
        us_min=round(best["ours"], 2),
        us_p20=round(sorted(times["ours"])[len(times["ours"]) // 5], 2),
        ratio_eager=round(best["eager"] / best["ours"], 1),
        ratio_compact=round(best["compact"] / best["ours"], 1) if "compact" in best else None,
        ratio_compile=None,
        ratio_published=round(best["published"] / best["ours"], 1),
        bandwidth_share=None if floor is None else round(floor / best["ours"], 2),
    )


def prepared(case: Case, backend: str) -> sk.PreparedStep:
    """Return the step prepared once, its results overwritten by the next call; the loop keeps them, about 4 us more."""
    return case.prepare(backend, reuse_results=True)


def check(case: Case, step: sk.PreparedStep, inputs: baselines.Inputs) -> None:
    """Fail unless the step and both chains agree on what is kept and on the probability of the token."""
    ours = step(case.clean, case.noised, mask_id=case.mask_id, step=case.step)
    logprobs = baselines.naive_logprobs(inputs)
    assert ours.status.tolist() == [0] * case.batch
    # The chain sums the mass of a nucleus in float32, so its end lies a few tokens elsewhere.
    slack = NUCLEUS_SLACK if inputs.top_p < 1 else 0.0
    n_kept = (logprobs > -torch.inf).sum(-1)
    assert ((ours.n_kept - n_kept).abs() <= slack * n_kept + bool(slack)).all(), "n_kept"
    expected = logprobs.gather(1, ours.token.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(ours.logprob, expected, atol=max(slack, LOGPROB_ATOL), rtol=0)
    if bool(case.params.greedy):
        assert ours.token.equal(logprobs.argmax(-1)), "token"
        assert ours.token.equal(baselines.naive(inputs)[0]), "token of the naive chain"
    if inputs.log_beta is not None:
        token, logprob = baselines.compact(inputs)[:2]
        torch.testing.assert_close(
            logprob, logprobs.gather(1, token.unsqueeze(1)).squeeze(1), atol=LOGPROB_ATOL, rtol=0
        )


def interleave(variants: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Return microseconds per variant, taken in turns for so long, at least three rounds."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["eager"]) < 3:
        for name, run in variants.items():
            for _ in range(FAST_RUNS if name == "ours" else 1):
                start = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - start) * 1e6)
    return times


def read_microseconds(n_bytes: int) -> float | None:
    """Return how long one thread takes to read so many bytes that lie where these would; None without native code."""
    try:
        from safecode_kernels import _native
    except ImportError:
        return None
    data = torch.zeros(n_bytes // 4, dtype=torch.int32)
    return _native.read_seconds(data.data_ptr(), len(data), max(20, 200_000_000 // n_bytes // 20)) * 1e6


def make_shape(vocab_size: int, batch: int, dtype: torch.dtype, beta: float, mode: str) -> Case:
    """Return a case with a refusal mask and, by row, a boost, a suppression or neither."""
    params = sk.StepParams(
        plausibility_beta=beta,
        contrast_weight=[0.25 + 0.5 * row / batch for row in range(batch)],
        refusal_bias=[BIASES[row % len(BIASES)] for row in range(batch)],
        **MODES[mode],  # type: ignore[arg-type]
    )
    case = make_case(0, batch=batch, vocab_size=vocab_size, dtype=dtype, params=params, n_masks=1)
    case.mask_id.zero_()
    return case


def machine() -> dict[str, str]:
    """Return where the numbers come from."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu[0].partition(": ")[2] if cpu else platform.processor(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def show(row: Row) -> None:
    """Print a row of the table."""
    compact = "-" if row.ratio_compact is None else f"{row.ratio_compact:.0f}"
    share = "-" if row.bandwidth_share is None else f"{row.bandwidth_share:.2f}"
    print(
        f"{row.mode:<12} {row.beta:<4} {row.V:>7} {row.B:>3} {row.dtype:<9} {row.us_min:>9.1f} {row.us_p20:>9.1f} "
        f"{row.ratio_eager:>7.1f} {compact:>8} {row.ratio_published:>10.1f} {share:>6}",
        flush=True,
    )


def main() -> int:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 shapes, under a minute")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--backend", default="auto", help="back end to measure")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="time per row")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = QUICK if options.quick else [(v, b, d) for v in VOCABULARIES for b in BATCHES for d in DTYPES]
    seconds = options.seconds or (0.4 if options.quick else 1.0)
    print("mode         beta       V   B dtype        us_min    us_p20 /eager /compact /published  share")
    rows = []
    for beta in BETAS:
        for mode in MODES:
            for vocab_size, batch, dtype in shapes:
                case = make_shape(vocab_size, batch, dtype, beta, mode)
                rows.append(measure(case, mode, options.backend, seconds, options.threads))
                show(rows[-1])
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
