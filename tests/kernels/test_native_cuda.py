"""The CUDA back end on a GPU: the grid against the eager back end on the CPU, captured graphs, streams, sizes.

Skipped where there is none. What needs no GPU is tested in test_cuda_emulated*.py and test_cuda_build.py.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import safecode_kernels as sk
from kernels import test_grid as grid
from safecode_kernels import StepParams
from safecode_kernels.testing import Case, assert_step_equals, make_case

NAME = "native_cuda"
# Clusters exist from 9.0 on; eight blocks are the most that every GPU accepts.
PLANS = (None, (True, 1), (True, 2), (True, 8), (False, 1), (False, 2), (False, 8))
GIB = 2**30


@pytest.fixture(scope="module")
def device(required):
    """The GPU; a reason to skip where there is none that the module serves."""
    record = next(record for record in sk.list_backends() if record.name == NAME)
    reason = None if torch.cuda.is_available() else "torch sees no GPU"
    reason = reason or record.supports(torch.device("cuda"), torch.float32)
    if reason and NAME in required:
        pytest.fail(f"SAFECODE_REQUIRE names {NAME}, which cannot run: {reason}")
    if reason:
        pytest.skip(f"{NAME}: {reason}")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=PLANS, ids=str)
def plan(request, device):
    """A way to spread a row over blocks; None is what the launcher chooses."""
    if request.param and request.param[0] and torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("this GPU has no clusters")
    return request.param


def moved(case: Case, device: torch.device) -> Case:
    """The case on the GPU, with the same strides."""

    def to(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or tensor.is_contiguous():
            return None if tensor is None else tensor.to(device)
        there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return there.copy_(tensor)

    names = ("clean", "noised", "refusal_mask", "mask_id", "seeds", "stream")
    return replace(case, **{name: to(getattr(case, name)) for name in names})


def to_cpu(result: sk.StepResult) -> sk.StepResult:
    return sk.StepResult(*(tensor.cpu() for tensor in result))


def run(case: Case, device: torch.device, plan: tuple[bool, int] | None = None) -> sk.StepResult:
    """The result of a prepared step on the GPU, on the CPU."""
    there = moved(case, device)
    step = there.prepare(NAME)
    if plan is not None:
        step.fast.use_plan(*plan)
    return to_cpu(step(there.clean, there.noised, mask_id=there.mask_id, step=there.step))


def same(a: sk.StepResult, b: sk.StepResult) -> bool:
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", grid.DTYPES, ids=str)
@pytest.mark.parametrize("kind", grid.KINDS, ids=lambda kind: kind.__name__)
def test_awkward_rows(device, plan, kind, dtype):
    for vocab_size in (31, 1023, 20_001):
        case = kind(make_case(vocab_size, batch=24, vocab_size=vocab_size, dtype=dtype))
        if case.clean.stride(1) != 1:
            case = replace(case, clean=case.clean.contiguous(), noised=case.noised.contiguous())
        assert_step_equals(case, run(case, device, plan), case.run("eager"))


@pytest.mark.parametrize("dtype", grid.DTYPES, ids=str)
@pytest.mark.parametrize("kind", grid.KINDS, ids=lambda kind: kind.__name__)
def test_scores_of_awkward_rows(device, kind, dtype):
    for vocab_size in (31, 1023, 20_001):
        case = kind(make_case(vocab_size, batch=12, vocab_size=vocab_size, dtype=dtype))
        ours, eager = moved(case, device).run_scores(NAME), case.run_scores("eager")
        for name in ("status", "keep", "scores", "biased_clean"):
            assert getattr(ours, name).cpu().equal(getattr(eager, name)), name


@pytest.mark.parametrize(("batch", "vocab_size"), [(1, 152_064), (8, 152_065), (64, 32_064), (300, 9001)])
def test_random_parameters_per_row(device, batch, vocab_size):
    case = make_case(3, batch=batch, vocab_size=vocab_size, dtype=torch.bfloat16)
    assert_step_equals(case, run(case, device), case.run("eager"))


def test_rows_that_begin_at_any_address(device):
    for dtype, offset in itertools.product(grid.DTYPES, range(8)):
        case = make_case(offset, batch=3, vocab_size=5003, dtype=dtype)
        memory = torch.full((2, 3, 5015), math.nan, dtype=dtype, device=device)
        rows = memory[:, :, offset : offset + 5003]
        rows[0], rows[1] = case.clean, case.noised
        there = replace(moved(case, device), clean=rows[0], noised=rows[1])
        assert same(to_cpu(there.run(NAME)), run(case, device))


def test_every_plan_gives_the_same_bits(device):
    case = make_case(11, batch=32, vocab_size=30_001, dtype=torch.bfloat16)
    plans = [p for p in PLANS[1:] if not p[0] or torch.cuda.get_device_capability(device) >= (9, 0)]
    results = [run(case, device, plan) for plan in plans]
    assert all(same(results[0], result) for result in results)


def test_many_draws_equal_eagers(device):
    case = make_case(6, batch=1, vocab_size=3000, params=StepParams(plausibility_beta=0, greedy=False))
    many = replace(case.select([0] * 4000), seeds=torch.arange(4000) * 2**40, stream=torch.arange(4000))
    assert_step_equals(many, run(many, device), many.run("eager"))
    scores = many.clean.to(device)
    drawn = sk.draw(scores, seeds=many.seeds.to(device), stream=many.stream.to(device), step=2, backend=NAME)
    assert drawn.token.cpu().equal(sk.draw(many.clean, seeds=many.seeds, stream=many.stream, step=2).token)


def test_a_captured_graph_reads_what_changes_in_place(device, plan):
    first, second = (make_case(seed, batch=6, vocab_size=9001, dtype=torch.bfloat16) for seed in (1, 2))
    held = moved(first, device)
    step = held.prepare(NAME, reuse_results=True)
    if plan is not None:
        step.fast.use_plan(*plan)
    index = torch.full((6,), first.step, device=device)
    call = {"mask_id": held.mask_id, "step": index}
    step(held.clean, held.noised, **call)  # the first launch of a kernel loads it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(held.clean, held.noised, **call)
    for case in (first, second, second, first):
        step.rows.packed.copy_(sk.pack_params(case.params, 6))
        for name in ("clean", "noised", "mask_id", "refusal_mask"):
            getattr(held, name).copy_(getattr(case, name))
        step.key.seeds.copy_(case.seeds)
        step.key.stream.copy_(case.stream)
        index.fill_(case.step)
        graph.replay()
        assert same(to_cpu(result), run(case, device))


def test_a_call_neither_waits_nor_allocates(device):
    case = moved(make_case(5, batch=4, vocab_size=9001), device)
    step = case.prepare(NAME, reuse_results=True)
    index = torch.zeros(4, dtype=torch.int64, device=device)
    step(case.clean, case.noised, mask_id=case.mask_id, step=index)
    before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case.clean, case.noised, mask_id=case.mask_id, step=index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats(device)["allocation.all.allocated"] == before


def test_the_current_stream_is_used(device):
    case = make_case(7, batch=4, vocab_size=9001)
    there = moved(case, device)
    step = there.prepare(NAME)
    side = torch.cuda.Stream(device)
    held = torch.empty_like(there.clean)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # what would run too early on another stream reads nonsense
        held.copy_(there.clean)
        result = step(held, there.noised, mask_id=there.mask_id, step=case.step)
    side.synchronize()
    assert same(to_cpu(result), run(case, device))


def test_an_illegal_launch_is_a_typed_error(device):
    there = moved(make_case(8, batch=2, vocab_size=100), device)
    step = there.prepare(NAME)
    step.fast.use_plan(True, 64)  # larger than any cluster
    with pytest.raises(sk.LaunchError, match="CUDA error"):
        step(there.clean, there.noised, mask_id=there.mask_id)
    step.fast.use_plan(False, 1)
    assert int(step(there.clean, there.noised, mask_id=there.mask_id, step=there.step).status.max()) == 0


def test_a_mask_id_outside_the_masks_stops_the_kernel(device):
    """In a process of its own: the error takes the whole context with it."""
    code = (
        "import torch, safecode_kernels as sk\n"
        "z, ids = torch.randn(2, 64, device='cuda'), torch.tensor([0, 7], device='cuda')\n"
        "mask = sk.pack_mask([1], 64).cuda()\n"
        "params = sk.StepParams(refusal_bias=1.0)\n"
        "sk.decode_step(z, None, params, refusal_mask=mask, mask_id=ids, backend='native_cuda')\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "CUDA error" in done.stderr


def test_more_than_two_to_the_31_logits(device):
    rows, vocab_size = 14_200, 152_064  # 2.16e9: an offset in 32 bits would wrap
    needed = rows * vocab_size * (2 + 4) + 2 * GIB  # the logits, the dense scratch, room to make them
    free, _ = torch.cuda.mem_get_info(device)
    if free < needed:
        pytest.skip(f"{free / GIB:.0f} GiB of GPU memory are free, {needed / GIB:.0f} are needed")
    clean = torch.empty(rows, vocab_size, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(0)
    for chunk in clean.split(500):
        chunk.normal_(0, 2.5, generator=generator)
    params = StepParams(contrast_weight=0, greedy=False, top_p=0.9, plausibility_beta=[0.1, 0.0] * (rows // 2))
    result = to_cpu(sk.decode_step(clean, None, params, seeds=list(range(rows)), backend=NAME))
    for row in (0, 1, rows // 2, rows - 2, rows - 1):
        one = StepParams(contrast_weight=0, greedy=False, top_p=0.9, plausibility_beta=[0.1, 0.0][row % 2])
        expected = sk.decode_step(clean[row : row + 1].cpu(), None, one, seeds=row, backend="eager")
        assert int(result.token[row]) == int(expected.token)
        assert int(result.n_kept[row]) == int(expected.n_kept)
