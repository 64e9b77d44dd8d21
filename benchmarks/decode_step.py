"""How fast is the decode step? Every back end against plain PyTorch, minima of interleaved runs in one process.

    python benchmarks/decode_step.py --quick             4 shapes, under a minute on two cores
    python benchmarks/decode_step.py --json FILE         all shapes, with torch.compile (about 20 minutes on a CPU)
    python benchmarks/decode_step.py --plot FOLDER       pictures beside the table

The values of every variant are checked before it is timed. Baselines (decode_step_baselines.py): (a) the naive eager
chain, (b) PyTorch on the candidates only, (c) torch.compile of (a), (d) the published step. Layers: `native` is the
prepared call, `op` is torch.ops.safecode_kernels from Python. One thread unless --threads says otherwise. On a GPU,
decode_step_gpu.py measures graph replays instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import decode_step_baselines as baselines
from timing import Times, Variant, interleave, machine, read_microseconds

import safecode_kernels as sk
from safecode_kernels.testing import LOGPROB_ATOL, Case, make_case

Shape = tuple[int, int, torch.dtype]  # V, B, dtype

VOCABULARIES, BATCHES, DTYPES = (32_064, 152_064), (1, 8, 32), (torch.bfloat16, torch.float32)
QUICK = [(v, b, torch.bfloat16) for v in VOCABULARIES for b in (1, 8)]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"greedy": False, "temperature": 0.8},
    "top_p": {"greedy": False, "temperature": 0.8, "top_p": 0.9},
    "top_k_top_p": {"greedy": False, "temperature": 0.8, "top_k": 50, "top_p": 0.9},
}
BETAS = (0.1, 0.0)
BIASES = (1.5, -1.0, 0.0)
NUCLEUS_SLACK = 2e-3
# Our variants run so often per round that their minimum is one with its input in the cache, as after a model's step.
FAST_RUNS = 12
# The eager reference is there to be right; it is shown, and not timed for long.
REFERENCE = "eager"


@dataclass
class Row:
    """One measurement; ratios are a baseline's minimum over ours, None where the baseline was not run."""

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
    us_p50: float
    bytes: int
    ratio_eager: float
    ratio_compact: float | None
    ratio_compile: float | None
    ratio_published: float
    bandwidth_share: float | None


def measure(case: Case, mode: str, backends: list[str], seconds: float, compiled: bool) -> list[Row]:
    """Check and time one shape on every back end, prepared and as an operator."""
    inputs = baselines.inputs_of(case)
    ours: dict[tuple[str, str], Variant] = {}
    for backend in backends:
        step = case.prepare(backend, reuse_results=True)
        check(case, step, inputs)
        ours[backend, "native"] = lambda step=step: step(case.clean, case.noised, mask_id=case.mask_id, step=case.step)
        if backend != REFERENCE:
            ours[backend, "op"] = operator(case, backend)
    others = baseline_variants(case, inputs, compiled)
    variants = {**{"/".join(name): run for name, run in ours.items()}, **others}
    times = interleave(variants, seconds, {"/".join(name): FAST_RUNS for name in ours if name[0] != REFERENCE})
    return [make_row(case, mode, *name, times["/".join(name)], times) for name in ours]


def operator(case: Case, backend: str) -> Variant:
    """Return the call of torch.ops, after a check that it gives what the function gives."""
    packed = sk.pack_params(case.params, case.batch)
    step = torch.full((case.batch,), case.step)
    call = torch.ops.safecode_kernels.decode_step.default
    logits, masks = (case.clean, case.noised), (case.refusal_mask, case.mask_id)
    operands = (*logits, packed, *masks, case.seeds, case.stream, step, backend)
    assert call(*operands)[0].equal(case.run(backend).token), "operator"
    return lambda: call(*operands)


def baseline_variants(case: Case, inputs: baselines.Inputs, compiled: bool) -> dict[str, Variant]:
    """Return the baselines that exist for this case."""
    found: dict[str, Variant] = {
        "naive": lambda: baselines.naive(inputs),
        "published": lambda: baselines.published(inputs),
    }
    if inputs.log_beta is not None:
        found["compact"] = lambda: baselines.compact(inputs)
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(baselines.naive, dynamic=False)
        theirs, plain = function(inputs)[2], baselines.naive(inputs)[2]
        # Compiled sums are ordered differently, so a nucleus may end a few tokens elsewhere.
        slack = NUCLEUS_SLACK if inputs.top_p < 1 else 0.0
        assert ((theirs - plain).abs() <= slack * plain + bool(slack)).all(), "torch.compile"
        found["compile"] = lambda: function(inputs)
    return found


def make_row(case: Case, mode: str, backend: str, layer: str, ours: Times, times: dict[str, Times]) -> Row:
    """Return the measurement as a row of the table."""
    beta = float(case.params.plausibility_beta)  # type: ignore[arg-type]
    read = case.clean.numel() * case.clean.element_size() * (1 if beta > 0 else 2)
    floor = read_microseconds(read)

    def ratio(name: str) -> float | None:
        return round(times[name].least / ours.least, 1) if name in times else None

    return Row(
        mode=mode,
        beta=beta,
        layer=layer,
        V=case.clean.shape[1],
        B=case.batch,
        dtype=str(case.clean.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        backend=backend,
        us_min=round(ours.least, 2),
        us_p20=round(ours.percentile(0.2), 2),
        us_p50=round(ours.percentile(0.5), 2),
        bytes=read,
        ratio_eager=ratio("naive") or 0.0,
        ratio_compact=ratio("compact"),
        ratio_compile=ratio("compile"),
        ratio_published=ratio("published") or 0.0,
        bandwidth_share=None if floor is None else round(floor / ours.least, 2),
    )


def check(case: Case, step: sk.PreparedStep, inputs: baselines.Inputs) -> None:
    """Fail unless the step and the chains agree on what is kept and on the probability of the token."""
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
        of_naive = logprobs.gather(1, token.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(logprob, of_naive, atol=max(slack, LOGPROB_ATOL), rtol=0)


def make_shape(vocab_size: int, batch: int, dtype: torch.dtype, beta: float, mode: str) -> Case:
    """Return a case with a refusal mask and, by row, a boost, a suppression or neither."""
    params = sk.StepParams(
        plausibility_beta=beta,
        contrast_weight=[0.25 + 0.5 * row / batch for row in range(batch)],
        refusal_bias=[BIASES[row % len(BIASES)] for row in range(batch)],
        **MODES[mode],
    )
    case = make_case(0, batch=batch, vocab_size=vocab_size, dtype=dtype, params=params, n_masks=1)
    case.mask_id.zero_()
    return case


def all_rows(shapes: list[Shape], backends: list[str], seconds: float, compiled: bool) -> Iterator[Row]:
    """Measure everything, one row at a time."""
    for beta in BETAS:
        for mode in MODES:
            for vocab_size, batch, dtype in shapes:
                case = make_shape(vocab_size, batch, dtype, beta, mode)
                yield from measure(case, mode, backends, seconds, compiled)


def usable_backends(device: str) -> list[str]:
    """Return the names of the back ends that can serve here, the best first."""
    return [b.name for b in sk.list_backends() if b.supports(torch.device(device), torch.bfloat16) is None]


HEADER = (
    "mode         beta       V   B dtype     back end     layer     us_min    us_p20   /eager /compact /compile "
    "/published  share"
)


def show(row: Row) -> None:
    """Print a row of the table."""

    def cell(value: float | None, width: int, digits: int = 1) -> str:
        return f"{'-' if value is None else f'{value:.{digits}f}':>{width}}"

    print(
        f"{row.mode:<12} {row.beta:<4} {row.V:>7} {row.B:>3} {row.dtype:<9} {row.backend:<12} {row.layer:<6}"
        f"{row.us_min:>10.1f}{row.us_p20:>10.1f}{row.ratio_eager:>9.1f}{cell(row.ratio_compact, 9)}"
        f"{cell(row.ratio_compile, 9)}{row.ratio_published:>11.1f}{cell(row.bandwidth_share, 7, 2)}",
        flush=True,
    )


def main() -> int:
    """Measure, print the table, write JSON and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 shapes, no torch.compile, under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw pictures there")
    parser.add_argument("--backend", action="append", help="back end to measure, may be repeated; default: all usable")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="time per shape")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = QUICK if options.quick else [(v, b, d) for v in VOCABULARIES for b in BATCHES for d in DTYPES]
    backends = options.backend or usable_backends("cpu")
    print(HEADER)
    rows = []
    for row in all_rows(shapes, backends, options.seconds or (0.5 if options.quick else 2.0), not options.quick):
        rows.append(row)
        show(row)
        if options.json:  # as it goes: a run that is stopped leaves what it has
            options.json.parent.mkdir(parents=True, exist_ok=True)
            report = {"machine": machine(), "rows": [asdict(row) for row in rows]}
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        from decode_step_plots import draw

        draw([asdict(row) for row in rows], options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
