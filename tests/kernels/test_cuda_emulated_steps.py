"""The prepared step of the CUDA back end on the emulated GPU: what captured graphs rely on, and how it fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import safecode_kernels as sk
from kernels.emulated_cuda import forced_plan, same
from safecode_kernels import StepParams
from safecode_kernels.testing import Case, make_case

NAME = "native_cuda"
INVALID_CONFIGURATION = 9


def ordinary(**fields) -> Case:
    params = StepParams(**{"greedy": False, "refusal_bias": 0.7, **fields})
    return make_case(7, batch=5, vocab_size=700, params=params)


def call(step: sk.PreparedStep, case: Case, index: object = None) -> sk.StepResult:
    return step(case.clean, case.noised, mask_id=case.mask_id, step=case.step if index is None else index)


def test_the_fast_way_serves_and_reuses_its_results(gpu):
    case = ordinary()
    step = case.prepare(NAME, reuse_results=True)
    first = call(step, case)
    kept = [t.clone() for t in first]
    again = call(step, case)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(first, again, strict=True))
    assert all(a.equal(b) for a, b in zip(kept, again, strict=True)), "a launch must leave the scratch as it found it"
    assert step.fast(case.clean, case.noised, case.mask_id, case.step) is not None


def test_results_of_earlier_steps_are_never_overwritten(gpu):
    case = ordinary()
    step = case.prepare(NAME)
    results = [call(step, case, i) for i in range(40)]
    assert all(same(result, call(step, case, i)) for i, result in enumerate(results))


@pytest.mark.parametrize("plan", [(True, 2), (False, 3)], ids=str)
def test_what_a_captured_graph_may_change_in_place(gpu, plan):
    """Parameters, masks, seeds, stream and step are read when the kernel runs, never baked into the prepared step."""
    case, other = ordinary(), make_case(8, batch=5, vocab_size=700)
    with forced_plan(plan):
        mask_id, index = case.mask_id.clone(), case.stream.clone()
        step = case.prepare(NAME, reuse_results=True)
        replayed = replace(case, mask_id=mask_id)
        call(step, replayed, index)
        step.rows.packed.copy_(sk.pack_params(other.params, 5))
        step.key.seeds.copy_(other.seeds)
        step.key.stream.copy_(other.stream)
        mask_id.copy_(other.mask_id)
        index.fill_(91)
        expected = replace(other, clean=case.clean, noised=case.noised, refusal_mask=case.refusal_mask, step=91)
        assert same(call(step, replayed, index), expected.run(NAME))


def test_the_fast_way_leaves_what_it_cannot_read_to_the_checked_one(gpu):
    case = ordinary()
    step = case.prepare(NAME)
    expected = call(step, case)
    turned = case.clean.T.contiguous().T
    ids = case.mask_id
    for clean, mask_id in ((turned, ids), (case.clean, ids.tolist()), (case.clean, ids.int())):
        assert step.fast(clean, case.noised, mask_id, case.step) is None
        assert same(step(clean, case.noised, mask_id=mask_id, step=case.step), expected)
    for clean in (case.clean.half(), case.clean[:4], case.clean.requires_grad_().as_subclass(torch.nn.Parameter)):
        assert step.fast(clean, None, None, 0) is None


def test_a_launch_that_fails_is_a_typed_error_with_cudas_text(gpu):
    case = ordinary()
    step = case.prepare(NAME)
    gpu.fail_next_launch(INVALID_CONFIGURATION)
    with pytest.raises(sk.LaunchError, match="CUDA error 9: invalid configuration argument"):
        call(step, case)
    gpu.fail_next_launch(INVALID_CONFIGURATION)
    with pytest.raises(sk.LaunchError, match="invalid configuration"):
        case.run_scores(NAME)
    assert int(call(step, case).status.max()) == 0


@pytest.mark.parametrize("bad", [-2, 3, 2**40])
def test_a_mask_id_outside_the_masks_stops_the_kernel(gpu, bad):
    """On a GPU nobody looks at mask_id before the launch; a row without its bias would be worse than an error."""
    case = ordinary()
    mask_id = case.mask_id.clone()
    mask_id[3] = bad
    with pytest.raises(sk.LaunchError, match="unspecified launch failure"):
        case.prepare(NAME).fast(case.clean, case.noised, mask_id, 0)


def test_why_it_cannot_serve(gpu):
    record = next(record for record in sk.list_backends() if record.name == NAME)
    assert record.probe() is None
    gpu.set_device(capability=75)
    assert "compute capability 7.5" in record.probe()
    assert "80-real,90a-real,100-real,120" in record.probe()
    with pytest.raises(sk.BackendUnavailable, match=r"compute capability 7\.5.*SAFECODE_CUDA=on"):
        ordinary().run(NAME)
    gpu.set_device(count=0)
    assert "no CUDA-capable device is detected" in record.probe()


@pytest.mark.parametrize(
    ("capability", "served"), [(75, False), (80, True), (86, True), (89, True), (90, True), (100, True), (103, True),
                               (110, False), (120, True), (121, True), (130, True)]
)  # fmt: skip
def test_architectures_that_the_build_serves(gpu, capability, served):
    """Machine code for 8.0, 9.0 and 10.0 with their later minors (but 9.0a alone), and PTX from 12.0 on."""
    gpu.set_device(capability=capability)
    assert (gpu.module.why_unusable(-1) == "") == served


@pytest.mark.parametrize(
    ("capability", "rows", "vocab_size", "plan"),
    [
        (90, 1, 152_064, (True, 8)),
        (90, 32, 152_064, (True, 4)),
        (90, 64, 152_064, (True, 2)),
        (90, 4000, 152_064, (True, 1)),
        (90, 1, 9000, (True, 1)),
        (80, 1, 152_064, (False, 8)),
        (80, 4000, 152_064, (False, 1)),
    ],
)
def test_how_rows_are_spread_over_blocks(gpu, capability, rows, vocab_size, plan):
    gpu.set_device(capability=capability, multiprocessors=132)
    assert gpu.module.Step(0, 1, rows, vocab_size).plan() == plan
