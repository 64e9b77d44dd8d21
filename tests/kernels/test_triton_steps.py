"""The Triton back end's prepared step, its functions by themselves, and what needs a GPU. See test_triton.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import safecode_kernels as sk
from kernels.triton_harness import DEVICE, ON_GPU, sampling
from safecode_kernels import StepParams, rng
from safecode_kernels.contract import Rows
from safecode_kernels.params import resolve_rows
from safecode_kernels.testing import assert_step_equals, make_case

INF = math.inf

pytestmark = [
    pytest.mark.usefixtures("small_tiles"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's numpy speaks of infinities
]


# ---- functions of the kernels, by themselves ----


def test_bits_are_those_of_the_eager_generator():
    from kernels.triton_probes import bits_of_tokens

    tokens = torch.cat([torch.arange(48), 2**31 - 1 - torch.arange(16)])
    seeds = torch.tensor([0, 1, 2**32, 2**63 - 1, 5])
    stream = torch.tensor([0, 2**32 - 1, 7, 2**31, 5])
    steps = torch.tensor([0, 2**32 + 3, 2**63 - 1, 1, 5])
    out = torch.empty(5, 64, dtype=torch.int64, device=DEVICE)
    arguments = [tensor.to(DEVICE) for tensor in (tokens.int(), seeds, stream, steps)]
    bits_of_tokens[(5,)](*arguments, -1, out, N=64)
    assert out.cpu().equal(rng.token_bits(tokens.expand(5, -1), seeds=seeds, stream=stream, step=steps))


def test_gumbel_values_are_the_eager_ones_and_their_bounds_are_above():
    from kernels.triton_probes import gumbel_of_bits

    edges = [0, 1, 2, 3, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]
    random = torch.randint(2**32, (56,), generator=torch.Generator().manual_seed(0))
    bits = torch.cat([torch.tensor(edges), random])
    value = torch.empty(64, dtype=torch.float64, device=DEVICE)
    bound = torch.empty(64, device=DEVICE)
    gumbel_of_bits[(1,)](bits.to(DEVICE), value, bound, N=64)
    torch.testing.assert_close(value.cpu(), rng.gumbel(bits), atol=1e-14, rtol=1e-14)
    assert (bound.cpu().double() >= rng.gumbel(bits)).all()


def test_order_is_by_score_descending_and_id_ascending():
    from kernels.triton_probes import order_of

    x = torch.tensor([0.0, -0.0, 2.0, -1.0, -INF, 2.0, -3e38, 0.0] * 4)
    tokens = torch.randperm(32, generator=torch.Generator().manual_seed(0)).int() * 60_000_000
    ordered_x, ordered_tokens = torch.empty(32, device=DEVICE), torch.empty(32, dtype=torch.int32, device=DEVICE)
    order_of[(1,)](x.to(DEVICE), tokens.to(DEVICE), ordered_x, ordered_tokens, LOG_N=5)
    by_rule = sorted(range(32), key=lambda i: (-float(x[i]), int(tokens[i])))
    assert ordered_tokens.tolist() == tokens[by_rule].tolist()
    assert ordered_x.cpu().equal(x[by_rule] + 0.0)


# ---- the prepared step ----


def test_step_may_differ_by_row_and_is_63_bits_wide():
    steps = [0, 3, 2**31 + 1, 2**32, 2**63 - 1]
    case = make_case(8, batch=5, vocab_size=60, params=sampling(plausibility_beta=0.01))
    key = {"seeds": [5] * 5, "stream": 0, "refusal_mask": None}
    prepared = case.to(DEVICE).prepare("triton", **key)
    together = prepared(case.clean.to(DEVICE), step=torch.tensor(steps, device=DEVICE)).token.tolist()
    assert together == case.prepare("eager", **key)(case.clean, step=torch.tensor(steps)).token.tolist()
    assert len(set(together)) > 2
    for row in (2, 4):
        assert int(prepared(case.clean.to(DEVICE), step=steps[row]).token[row]) == together[row]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_parameters_are_read_when_the_kernels_run(triton_form, beta):
    """A captured graph replays the launches: only what lies in the tensors can change then."""
    case = make_case(9, batch=4, vocab_size=300, params=StepParams(plausibility_beta=beta, greedy=False)).to(DEVICE)
    prepared = case.prepare("triton", reuse_results=True)
    before = prepared(case.clean, case.noised, mask_id=case.mask_id, step=1)
    kept = before.n_kept.clone()
    other = replace(case, params=replace(case.params, top_k=2, temperature=0.5, contrast_weight=1.0, refusal_bias=3.0))
    prepared.rows.packed.copy_(resolve_rows(other.params, batch=4, device=torch.device(DEVICE)).packed)
    after = prepared(case.clean, case.noised, mask_id=case.mask_id, step=1)
    assert after.token.data_ptr() == before.token.data_ptr()
    assert (kept > 2).any()
    expected = replace(other, step=1).to("cpu").run("eager")
    assert after.token.tolist() == expected.token.tolist()
    assert after.n_kept.tolist() == expected.n_kept.tolist()


def test_facts_that_allow_for_everything(triton_form):
    """Parameters that were packed on the device: nobody has looked at them."""
    from safecode_kernels.backends import triton

    case = make_case(10, batch=5, vocab_size=300).to(DEVICE)
    unknown = Rows(sk.pack_params(case.params, 5, DEVICE), torch.float32)
    unknown._host = None  # as it is on an accelerator
    assert unknown.any_dense
    key = sk.contract.DrawKey(case.seeds, case.stream, 0)
    prepared = triton.prepare((5, 300), torch.float32, unknown, case.refusal_mask, key, True)
    result = prepared(case.clean, case.noised, case.mask_id, case.step)
    assert_step_equals(case.to("cpu"), sk.StepResult(*(t.cpu() for t in result)), case.to("cpu").run("eager"))


def test_results_are_new_tensors_unless_they_may_be_reused():
    case = make_case(7, batch=3, vocab_size=200).to(DEVICE)
    step = case.prepare("triton")
    results = [step(case.clean, case.noised, mask_id=case.mask_id, step=i) for i in range(3)]
    assert len({result.token.data_ptr() for result in results}) == 3
    for i, result in enumerate(results):
        assert result.token.equal(step(case.clean, case.noised, mask_id=case.mask_id, step=i).token)


def test_prepared_step_takes_what_the_fast_way_does_not():
    case = make_case(8, batch=4, vocab_size=200).to(DEVICE)
    step = case.prepare("triton")
    expected = step(case.clean, case.noised, mask_id=case.mask_id, step=5)
    assert step.fast is not None
    column_major = case.clean.T.contiguous().T
    for clean, mask_id in (
        (column_major, case.mask_id),
        (case.clean, case.mask_id.tolist()),
        (case.clean, case.mask_id.to(torch.int32)),
    ):
        assert step.fast(clean, case.noised, mask_id, 5) is None
        assert step(clean, case.noised, mask_id=mask_id, step=5).token.equal(expected.token)
    assert step.fast(case.clean[:3], case.noised, case.mask_id, 5) is None
    assert step.fast(case.clean.double(), case.noised, case.mask_id, 5) is None
    assert step.fast(case.clean, case.noised, case.mask_id, -1) is None
    with pytest.raises(sk.ArgumentError, match=r"mask_id\[1\]=3 is out of range"):
        step(case.clean, case.noised, mask_id=[0, 3, 0, 0])


def test_empty_batch():
    empty = torch.empty(0, 50, device=DEVICE)
    result = sk.decode_step(empty, None, sampling(), seeds=[], backend="triton")
    assert [tuple(tensor.shape) for tensor in result] == [(0,)] * 4
    assert sk.decode_scores(empty, None, sampling(), backend="triton").scores.shape == (0, 50)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_captured_graph_replays_with_new_logits_and_parameters(beta):
    if not ON_GPU:
        pytest.skip("CUDA graphs need a GPU")
    params = StepParams(plausibility_beta=beta, greedy=False, top_k=50, top_p=0.9)
    case = make_case(11, batch=8, vocab_size=32_064, dtype=torch.bfloat16, params=params).to(DEVICE)
    steps = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    prepared = case.prepare("triton", reuse_results=True)
    clean, noised = case.clean.clone(), case.noised.clone()
    prepared(clean, noised, mask_id=case.mask_id, step=steps)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = prepared(clean, noised, mask_id=case.mask_id, step=steps)
    for seed in range(4):
        other = make_case(seed, batch=8, vocab_size=32_064, dtype=torch.bfloat16, params=params).to(DEVICE)
        clean.copy_(other.clean)
        noised.copy_(other.noised)
        steps.fill_(seed)
        graph.replay()
        expected = replace(case, clean=other.clean, noised=other.noised, step=seed).run("triton")
        assert result.token.equal(expected.token)


def test_more_than_two_to_the_31_logits():
    if not ON_GPU or torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs a GPU with 14 GiB of free memory")
    batch, vocab_size = 2**31 // 152_064 + 2, 152_064
    clean = torch.zeros(batch, vocab_size, dtype=torch.bfloat16, device=DEVICE)
    clean[-1, 77] = 9.0
    result = sk.draw(clean, greedy=True, backend="triton")
    assert (int(result.token[-1]), int(result.token[0])) == (77, 0)
