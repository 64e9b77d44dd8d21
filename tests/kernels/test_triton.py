"""The Triton back end against the eager one and the token-by-token one: on a GPU, else in Triton's interpreter.

The interpreter has to be on before the kernels are imported: test_triton_interpreted.py runs this file in a process of
its own. It takes about a tenth of a second for a row, so there the cases are few and small, and so are the tiles of the
kernels: a short row then needs all that a long one does.
"""

from __future__ import annotations

import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import safecode_kernels as sk
from kernels.conftest import REQUIRED
from kernels.test_grid import BATCHES, KINDS, LARGE, SAMPLER, VOCABULARIES, flat
from kernels.test_naive import assert_equal_rows, cases, naive_rows
from kernels.triton_interpreter import patched_once_per_launch
from safecode_kernels import Status, StepParams, rng
from safecode_kernels.contract import Rows
from safecode_kernels.params import resolve_rows
from safecode_kernels.testing import LOGPROB_ATOL, Case, assert_step_equals, make_case, oracle_scores

RECORD = next(record for record in sk.list_backends() if record.name == "triton")
INTERPRETED = RECORD.supports(torch.device("cpu"), torch.float32) is None
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = math.nan, math.inf

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy speaks of infinities


@pytest.fixture(autouse=True, scope="module")
def _usable():
    reason = RECORD.supports(torch.device(DEVICE), torch.float32)
    if reason and "triton" in REQUIRED:
        pytest.fail(f"SAFECODE_REQUIRE names triton, which cannot run: {reason}")
    if reason:
        pytest.skip(f"triton: {reason}; test_triton_interpreted.py runs these tests")
    if ON_GPU:
        yield
    else:
        with patched_once_per_launch():
            yield


def use_sizes(monkeypatch, **sizes) -> None:
    from safecode_kernels.backends import triton
    from safecode_kernels.backends.triton_kernels.shapes import Sizes

    monkeypatch.setattr(triton, "SIZES", Sizes(**sizes))


@pytest.fixture(params=["slices", "rows"])
def form(request, monkeypatch):
    """Both ways to cut a batch: several programs per row, or one."""
    split = {} if request.param == "slices" else {"max_split_rows": 0}
    small = {} if ON_GPU else {"block": 256, "memory_block": 256, "tile": 128, "log_room": 5}
    use_sizes(monkeypatch, **small, **split)
    return request.param


def run(case: Case) -> sk.StepResult:
    return sk.StepResult(*(tensor.cpu() for tensor in case.to(DEVICE).run("triton")))


def run_scores(case: Case) -> sk.StepScores:
    return sk.StepScores(*(tensor.cpu() for tensor in case.to(DEVICE).run_scores("triton")))


def assert_equals_eager(case: Case) -> sk.StepResult:
    ours = run(case)
    assert_step_equals(case, ours, case.run("eager"))
    return ours


def assert_scores_as_good_as_eager(case: Case) -> None:
    ours, eager, truth = run_scores(case), case.run_scores("eager"), oracle_scores(case)
    assert ours.status.equal(eager.status)
    assert ours.keep.equal(eager.keep)
    for field in ("scores", "biased_clean"):
        a, b, t = getattr(ours, field), getattr(eager, field), getattr(truth, field)
        assert a.isfinite().equal(b.isfinite())
        finite = b.isfinite() & t.isfinite()
        if finite.any():
            worst = (b.double() - t)[finite].abs().max()
            assert (a.double() - t)[finite].abs().max() <= 2 * worst, field


def sampling(**fields) -> StepParams:
    return StepParams(**{"contrast_weight": 0, "plausibility_beta": 0, "greedy": False, **fields})


# ---- the grid ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCABULARIES if ON_GPU else (1, 31, 600))
@pytest.mark.parametrize("batch", BATCHES if ON_GPU else (2,))
def test_random_parameters_per_row(form, batch, vocab_size, dtype):
    if batch * vocab_size > LARGE and dtype != torch.bfloat16:
        pytest.skip("the largest cells run in bfloat16 only: the eager reference takes seconds for each")
    params = StepParams(**SAMPLER) if batch * vocab_size > LARGE else None
    case = make_case(
        vocab_size + DTYPES.index(dtype),
        batch=batch,
        vocab_size=vocab_size,
        dtype=dtype,
        params=params,
        excluded_share=0.1 * (vocab_size % 2),
    )
    assert_equals_eager(case)
    if batch * vocab_size <= LARGE:
        assert_scores_as_good_as_eager(case)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_awkward_rows(form, kind):
    for vocab_size in (31, 600, 9001) if ON_GPU else (600 if form == "slices" else 31,):
        dtype = DTYPES[(KINDS.index(kind) + vocab_size) % 3]
        case = kind(make_case(vocab_size, batch=24 if ON_GPU else 5, vocab_size=vocab_size, dtype=dtype))
        assert_equals_eager(case)
        assert_scores_as_good_as_eager(case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_awkward_rows_of_every_dtype_with_the_real_sizes(kind, dtype):
    for vocab_size in (31, 1023, 9001):
        case = kind(make_case(vocab_size, batch=24 if ON_GPU else 8, vocab_size=vocab_size, dtype=dtype))
        assert_equals_eager(case)
        assert_scores_as_good_as_eager(case)


@pytest.mark.slow
def test_a_long_vocabulary_has_longer_slices_and_no_more_of_them(monkeypatch):
    use_sizes(monkeypatch, block=128, memory_block=256, tile=128, log_room=5)
    case = make_case(2, batch=4, vocab_size=20_011, params=StepParams(plausibility_beta=[0.0, 0.1, 0.5, 0.9]))
    assert_equals_eager(case)
    assert_scores_as_good_as_eager(case)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_k": 200, "top_p": 0.9}, {"top_p": 0.95, "min_p": 0.6}])
def test_rows_with_more_candidates_than_any_buffer(form, beta, filters):
    params = StepParams(plausibility_beta=beta, refusal_bias=0.5, bias_scope=40, greedy=False, **filters)
    vocab_size = 60_000 if ON_GPU else 300
    case = flat(make_case(1, batch=2, vocab_size=vocab_size, params=params))
    result = assert_equals_eager(case)
    assert int(result.n_kept.min()) > (1 if filters else vocab_size // 2)


def test_rows_of_equal_scores_are_cut_by_id(form):
    """All ties: top_p keeps the first ones, whatever the path; top_k keeps all."""
    clean = torch.ones(3, 500)
    params = sampling(top_p=[0.25, 0.9, 1.0], top_k=[0, 0, 7], plausibility_beta=[0.0, 0.5, 0.1])
    case = replace(make_case(0, batch=3, vocab_size=500, params=params), clean=clean, noised=None)
    assert assert_equals_eager(case).n_kept.tolist() == [125, 450, 500]


def test_many_draws_equal_eagers(form):
    """Different bits for each row: one wrong bit or logarithm would show in some races."""
    rows = 2000 if ON_GPU else 12
    case = make_case(6, batch=1, vocab_size=200, params=sampling())
    many = replace(case.select([0] * rows), seeds=torch.arange(rows) * 2**40, stream=torch.arange(rows) * 2**27)
    assert len(assert_equals_eager(many).token.unique()) > rows // 3


def test_draw_of_processed_scores(form):
    rows = 40 if ON_GPU else 2
    for dtype in DTYPES:
        scores = make_case(5, batch=rows, vocab_size=400, dtype=dtype, excluded_share=0.5).clean
        for greedy in (True, False):
            options = {"seeds": range(rows), "step": 2, "greedy": greedy}
            eager = sk.draw(scores, **options, backend="eager")
            ours = sk.draw(scores.to(DEVICE), **options, backend="triton")
            assert ours.token.tolist() == eager.token.tolist()
            assert ours.n_kept.tolist() == eager.n_kept.tolist()
            torch.testing.assert_close(ours.logprob.cpu(), eager.logprob, atol=1e-5, rtol=0)


@settings(max_examples=1000 if ON_GPU else 8)
@given(data=st.data())
@pytest.mark.parametrize("special_share", [0.0, 0.04, 0.5])
def test_equals_naive_bit_for_bit(special_share, data):
    case = data.draw(cases(special_share))
    assert_equal_rows(naive_rows(case, np.float32), run(case), run_scores(case), LOGPROB_ATOL)


@pytest.mark.slow
@settings(max_examples=150)
@given(data=st.data())
@pytest.mark.parametrize("special_share", [0.0, 0.04, 0.5])
def test_equals_naive_bit_for_bit_on_many_examples(special_share, data):
    case = data.draw(cases(special_share))
    assert_equal_rows(naive_rows(case, np.float32), run(case), run_scores(case), LOGPROB_ATOL)


# ---- rules that the cases above meet too seldom ----


def test_status_and_precedence(form):
    rows = [
        ([0.0, 1.0], [0.0, 1.0], Status.OK),
        ([-NAN, 1.0], [0.0, 1.0], Status.NAN_CLEAN),
        ([NAN, INF], [NAN, INF], Status.NAN_CLEAN),
        ([INF, 1.0], [NAN, 1.0], Status.INFINITE),
        ([0.0, 1.0], [NAN, INF], Status.NAN_NOISED),
        ([0.0, 1.0], [INF, 0.0], Status.INFINITE),
        ([-INF, -INF], [NAN, INF], Status.NOTHING_FINITE),
        ([3e38, 1.0], [0.0, 0.0], Status.INFINITE),
        ([0.0, 1.0], [0.0, -INF], Status.OK),
    ]
    clean, noised = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
    expected = [int(row[2]) for row in rows]
    case = replace(make_case(0, batch=len(rows), vocab_size=2), clean=clean, noised=noised, mask_id=None)
    for beta in (0.0, 1e-9):
        params = StepParams(plausibility_beta=beta)
        this = replace(case, params=params, refusal_mask=None)
        assert run(this).status.tolist() == expected
        assert run_scores(this).status.tolist() == expected


def test_draw_status():
    rows = [[NAN, INF], [0.0, INF], [-INF, -INF], [0.0, -INF]]
    for greedy in (True, False):
        result = sk.draw(torch.tensor(rows, device=DEVICE), seeds=3, greedy=greedy, backend="triton")
        assert result.status.tolist() == [1, 4, 3, 0]
        assert result.token.tolist() == [0] * 4
        assert result.n_kept.tolist() == [0, 0, 0, 1]
        assert result.logprob.tolist() == [-INF, -INF, -INF, 0.0]


@pytest.mark.parametrize("filters", [{}, {"top_k": 1}, {"top_p": 0.9}])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_temperature_overflow_is_infinite(filters, beta):
    clean = torch.tensor([[1e38, 0.0]], device=DEVICE)
    params = sampling(temperature=1e-3, plausibility_beta=beta, **filters)
    result = sk.decode_step(clean, None, params, seeds=0, backend="triton")
    assert (int(result.status), int(result.token), float(result.logprob)) == (Status.INFINITE, 0, -INF)


def test_temperature_divides_and_is_not_multiplied_by_the_reciprocal(form):
    """In each of the places that divide: among few candidates, in a row without a cut, after a bias with a scope."""
    temperature = torch.tensor(1.7)
    below = torch.arange(1, 2000) / 128
    above = torch.nextafter(below, torch.tensor(math.inf))
    merged = below / temperature == above / temperature
    merged &= below * temperature.reciprocal() != above * temperature.reciprocal()
    rows = torch.stack([below, above], dim=1)[merged][:6].to(DEVICE)
    params = sampling(
        temperature=float(temperature),
        top_k=1,
        plausibility_beta=[0.9, 0.0, 0.0] * 2,
        refusal_bias=1.0,
        bias_scope=[0, 0, 1] * 2,
    )
    nothing = sk.pack_mask([], 2).to(DEVICE)
    result = sk.decode_step(rows, None, params, seeds=0, refusal_mask=nothing, backend="triton")
    assert result.n_kept.tolist() == [2] * 6


def test_top_p_keeps_while_the_mass_before_is_below(form):
    clean = torch.zeros(6, 4, device=DEVICE)
    params = sampling(top_p=[0.25, 0.26, 0.74] * 2, plausibility_beta=[0.0] * 3 + [0.1] * 3)
    result = sk.decode_step(clean, None, params, seeds=0, backend="triton")
    assert result.n_kept.tolist() == [1, 2, 3] * 2
    assert result.token[[0, 3]].tolist() == [0, 0]


@pytest.mark.parametrize("n_tail", [20, 1000])
def test_top_p_mass_is_float64(form, n_tail):
    tail = torch.tensor(0.5 - math.log(n_tail))
    share = 1 / (1 + n_tail * math.exp(float(tail)))  # of the best token
    assert abs(share - 1 / (1 + n_tail * float(tail.exp()))) > 2e-9, "float32 would do"
    clean = torch.cat([torch.zeros(1), tail.expand(n_tail)]).expand(4, -1).contiguous().to(DEVICE)
    params = sampling(top_p=[share - 1e-9, share + 1e-9] * 2, plausibility_beta=[0.0, 0.0, 1e-9, 1e-9])
    assert sk.decode_step(clean, None, params, seeds=0, backend="triton").n_kept.tolist() == [1, 2, 1, 2]


# Three ways: few candidates, a row without a cut, and one whose bias has to wait for the best scores.
WAYS = {"plausibility_beta": [0.1, 0.0, 0.0], "bias_scope": [0, 0, 1]}


def biased_case(clean: list[float], noised: list[float] | None, **fields: float) -> Case:
    """Three equal rows, decoded in the three ways, with the bias on token 0."""
    params = StepParams(**WAYS, **fields)
    return replace(
        make_case(0, batch=3, vocab_size=2, params=params),
        clean=torch.tensor([clean] * 3),
        noised=None if noised is None else torch.tensor([noised] * 3),
        refusal_mask=sk.pack_mask([0], 2),
        mask_id=torch.zeros(3, dtype=torch.int64),
    )


def test_a_bias_that_overflows_the_score(form):
    case = biased_case([3e38, 1.0], None, refusal_bias=1e38)
    assert run(case).status.tolist() == [Status.INFINITE] * 3
    assert run_scores(case).status.tolist() == [Status.INFINITE] * 3


def test_a_bias_that_overflows_the_clean_logit_only(form):
    """The score stays finite, what the cut compares does not."""
    case = biased_case([2e38, 1.0], [3e38, 1.0], contrast_weight=0.5, refusal_bias=1.6e38)
    assert assert_equals_eager(case).status.tolist() == [Status.OK] * 3
    assert_scores_as_good_as_eager(case)


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
def test_parameters_are_read_when_the_kernels_run(form, beta):
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


def test_facts_that_allow_for_everything(form):
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
