"""What only the native CPU back end has: instruction sets, threads, the prepared fast way, addresses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import safecode_kernels as sk
from kernels.conftest import usable_or_skip
from safecode_kernels import StepParams
from safecode_kernels.testing import Case, assert_scores_match_oracle, assert_step_equals, make_case

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


@pytest.fixture(autouse=True)
def native():
    """The compiled module, with its own choice of loops afterwards."""
    usable_or_skip("native_cpu")
    from safecode_kernels import _native

    before = _native.loops()
    yield _native
    assert _native.use_loops(before)


def prepared(case: Case, **options) -> sk.PreparedStep:
    return case.prepare("native_cpu", **options)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_instruction_set_gives_the_same_result(native, name, dtype):
    if not native.use_loops(name):
        pytest.skip(f"this processor or build has no {name} loops")
    for seed, vocab_size in enumerate((1, 65, 1023, 5000, 33_000)):
        case = make_case(seed, batch=16, vocab_size=vocab_size, dtype=dtype, excluded_share=0.2 * (seed % 2))
        assert_step_equals(case, case.run("native_cpu"), case.run("eager"))
        assert_scores_match_oracle(case, case.run_scores("native_cpu"))


def test_inference_mode_does_not_stick_to_a_prepared_step():
    case = make_case(1, batch=3, vocab_size=40)
    step = prepared(case)
    with torch.inference_mode():
        results = [step(case.clean, case.noised, mask_id=case.mask_id) for _ in range(3)]
    results.append(step(case.clean, case.noised, mask_id=case.mask_id))
    assert len({result.token.data_ptr() for result in results}) == len(results)
    results[-1].token.add_(1)


def test_unknown_loops_are_refused(native):
    assert not native.use_loops("vax")


def test_threads_change_nothing():
    case = make_case(4, batch=40, vocab_size=33_000)  # above the size from which rows are shared out
    step = prepared(case)
    alone = [t.clone() for t in step(case.clean, case.noised, mask_id=case.mask_id)]
    alone_scores = step.scores(case.clean, case.noised, mask_id=case.mask_id)
    torch.set_num_threads(4)
    for _ in range(20):
        together = step(case.clean, case.noised, mask_id=case.mask_id)
        assert all(a.equal(b) for a, b in zip(alone, together, strict=True))
    assert all(
        a.equal(b)
        for a, b in zip(alone_scores, step.scores(case.clean, case.noised, mask_id=case.mask_id), strict=True)
    )


def test_a_forked_child_has_threads_of_its_own():
    code = (
        "import os, torch, safecode_kernels as sk\n"
        "torch.set_num_threads(4)\n"
        "z = torch.randn(32, 40_000)\n"
        "def token(): return sk.decode_step(z, None, sk.StepParams(), backend='native_cpu').token\n"
        "before = token()\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if token().equal(before) else 3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SAFECODE")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=True
    )
    assert done.stdout == "0\n"


def test_results_of_earlier_steps_are_never_overwritten():
    case = make_case(7, batch=3, vocab_size=500)
    step = prepared(case)
    results = [step(case.clean, case.noised, mask_id=case.mask_id, step=i) for i in range(100)]
    for i, result in enumerate(results):
        assert result.token.equal(step(case.clean, case.noised, mask_id=case.mask_id, step=i).token)


def test_results_of_the_operators_have_memory_of_their_own():
    from concurrent.futures import ThreadPoolExecutor

    case = make_case(4, batch=3, vocab_size=40, params=StepParams())
    packed = sk.pack_params(case.params, 3)

    def several() -> list[torch.Tensor]:
        decode = torch.ops.safecode_kernels.decode_step
        return [t for _ in range(50) for t in decode(case.clean, case.noised, packed, backend="native_cpu")]

    with ThreadPoolExecutor(4) as pool:
        tensors = [t for made in [pool.submit(several) for _ in range(8)] for t in made.result()]
    assert len({t.data_ptr() for t in tensors}) == len(tensors) == 8 * 50 * 4
    assert {(t.storage_offset(), t.untyped_storage().nbytes() // t.element_size()) for t in tensors} == {(0, 3)}


def test_reused_results_hold_the_newest_step():
    case = make_case(7, batch=3, vocab_size=500)
    fresh, reusing = prepared(case), prepared(case, reuse_results=True)
    for i in range(5):
        call = {"mask_id": case.mask_id, "step": i}
        result = reusing(case.clean, case.noised, **call)
        assert all(a.equal(b) for a, b in zip(result, fresh(case.clean, case.noised, **call), strict=True))


def test_prepared_step_takes_what_the_fast_way_does_not():
    case = make_case(8, batch=4, vocab_size=300)
    step = prepared(case)
    expected = step(case.clean, case.noised, mask_id=case.mask_id, step=5)
    assert step.fast is not None
    assert step.fast(case.clean, case.noised, case.mask_id, 5) is not None
    ids = case.mask_id.tolist()
    column_major = case.clean.T.contiguous().T
    for clean, mask_id in (
        (column_major, case.mask_id),
        (case.clean, ids),
        (case.clean, case.mask_id.to(torch.int32)),
        (case.clean, torch.stack([case.mask_id, case.mask_id], dim=1)[:, 0]),
    ):
        assert step.fast(clean, case.noised, mask_id, 5) is None
        assert step(clean, case.noised, mask_id=mask_id, step=5).token.equal(expected.token)


@pytest.mark.parametrize("bad", [-2, 3, 2**40])
def test_fast_way_refuses_mask_ids_outside_the_masks(bad):
    case = make_case(9, batch=2, vocab_size=40)
    mask_id = torch.tensor([0, bad])
    with pytest.raises(sk.ArgumentError, match=rf"mask_id\[1\]={bad} is out of range"):
        prepared(case)(case.clean, case.noised, mask_id=mask_id)


def test_single_column_and_expanded_rows():
    one = torch.tensor([[1.0, 2.0, 3.0]]).T  # [3, 1]: its column stride means nothing
    assert sk.decode_step(one, None, StepParams(), backend="native_cpu").token.tolist() == [0, 0, 0]
    row = torch.randn(1, 700, generator=torch.Generator().manual_seed(0))
    many = sk.decode_step(row.expand(5, -1), None, StepParams(), backend="native_cpu")
    assert many.token.tolist() == [int(row.argmax())] * 5


def test_flushing_subnormals_does_not_change_half_precision_logits():
    tiny = torch.full((1, 40), 2.0**-24, dtype=torch.float16)
    tiny[0, 7] = 2.0**-23
    torch.set_flush_denormal(True)
    try:
        result = sk.decode_step(tiny, None, StepParams(contrast_weight=0, plausibility_beta=0), backend="native_cpu")
    finally:
        torch.set_flush_denormal(False)
    assert int(result.token) == 7


def test_the_module_links_no_openmp(native):
    listed = subprocess.run(["ldd", native.__file__], capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("ldd is not available here")
    assert "gomp" not in listed.stdout
    assert "libomp" not in listed.stdout


@pytest.mark.parametrize("field", range(9))
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -3.0, float("inf")])
def test_parameters_that_no_step_params_could_hold_are_refused(field, value):
    name = sk.contract.PACKED_FIELDS[field]
    legal = {"bias": [-3.0], "log_beta": [-3.0, float("-inf")], "log_min_p": [-3.0, float("-inf")]}
    packed = sk.pack_params(StepParams(greedy=False), 2)
    packed[field, 1] = value
    clean, seeds = torch.zeros(2, 40), torch.zeros(2, dtype=torch.int64)
    call = torch.ops.safecode_kernels.decode_step
    if value in legal.get(name, []):
        call(clean, clean, packed, None, None, seeds, None, None, "native_cpu")
    else:
        with pytest.raises(ValueError, match=f"{name} of row 1 is out of range; make params with pack_params"):
            call(clean, clean, packed, None, None, seeds, None, None, "native_cpu")


def test_operator_without_seeds_does_not_sample():
    packed = sk.pack_params(StepParams(greedy=False), 1)
    with pytest.raises(sk.ArgumentError, match="a row samples and there are no seeds"):
        torch.ops.safecode_kernels.decode_step(torch.zeros(1, 9), None, packed, backend="native_cpu")
