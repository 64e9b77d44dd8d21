"""The Triton back end against the eager one and the token-by-token one: on a GPU, else in Triton's interpreter.

The interpreter has to be on before the kernels are imported: test_triton_interpreted.py runs this file in a process of
its own. It takes about a tenth of a second for a row, so there the cases are few and small, and so are the tiles.
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
from kernels.test_grid import BATCHES, KINDS, LARGE, SAMPLER, VOCABULARIES, flat
from kernels.test_naive import assert_equal_rows, cases, naive_rows
from kernels.triton_harness import DEVICE, ON_GPU, assert_equals_eager, run, run_scores, sampling, use_sizes
from safecode_kernels import Status, StepParams
from safecode_kernels.testing import LOGPROB_ATOL, Case, make_case, oracle_scores

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = math.nan, math.inf

pytestmark = [
    pytest.mark.usefixtures("small_tiles"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's numpy speaks of infinities
]


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


# ---- the grid ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCABULARIES if ON_GPU else (1, 31, 600))
@pytest.mark.parametrize("batch", BATCHES if ON_GPU else (2,))
def test_random_parameters_per_row(triton_form, batch, vocab_size, dtype):
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
def test_awkward_rows(kind):
    for vocab_size in (31, 600, 9001) if ON_GPU else (600,):
        dtype = DTYPES[(KINDS.index(kind) + vocab_size) % 3]
        case = kind(make_case(vocab_size, batch=24 if ON_GPU else 4, vocab_size=vocab_size, dtype=dtype))
        assert_equals_eager(case)
        assert_scores_as_good_as_eager(case)


def test_the_real_sizes(monkeypatch):
    use_sizes(monkeypatch)
    case = make_case(3, batch=3, vocab_size=5000, dtype=torch.bfloat16)
    assert_equals_eager(case)
    assert_scores_as_good_as_eager(case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_awkward_rows_in_both_forms(triton_form, kind):
    case = kind(make_case(31, batch=24 if ON_GPU else 4, vocab_size=31, dtype=DTYPES[KINDS.index(kind) % 3]))
    assert_equals_eager(case)
    assert_scores_as_good_as_eager(case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_awkward_rows_of_every_dtype_with_the_real_sizes(monkeypatch, kind, dtype):
    use_sizes(monkeypatch)
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
def test_rows_with_more_candidates_than_any_buffer(triton_form, beta, filters):
    params = StepParams(plausibility_beta=beta, refusal_bias=0.5, bias_scope=40, greedy=False, **filters)
    vocab_size = 60_000 if ON_GPU else 300
    case = flat(make_case(1, batch=2, vocab_size=vocab_size, params=params))
    result = assert_equals_eager(case)
    assert int(result.n_kept.min()) > (1 if filters else vocab_size // 2)


def test_rows_of_equal_scores_are_cut_by_id(triton_form):
    """All ties: top_p keeps the first ones, whatever the path; top_k keeps all."""
    clean = torch.ones(3, 500)
    params = sampling(top_p=[0.25, 0.9, 1.0], top_k=[0, 0, 7], plausibility_beta=[0.0, 0.5, 0.1])
    case = replace(make_case(0, batch=3, vocab_size=500, params=params), clean=clean, noised=None)
    assert assert_equals_eager(case).n_kept.tolist() == [125, 450, 500]


def test_many_draws_equal_eagers(triton_form):
    """Different bits for each row: one wrong bit or logarithm would show in some races."""
    rows = 2000 if ON_GPU else 12
    case = make_case(6, batch=1, vocab_size=200, params=sampling())
    many = replace(case.select([0] * rows), seeds=torch.arange(rows) * 2**40, stream=torch.arange(rows) * 2**27)
    assert len(assert_equals_eager(many).token.unique()) > rows // 3


def test_draw_of_processed_scores(triton_form):
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


@settings(max_examples=1000 if ON_GPU else 5)
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


def test_status_and_precedence(triton_form):
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


@pytest.mark.parametrize("bias", [2.0, -2.0])
@pytest.mark.parametrize("n_flat", [1, 400])
def test_only_tokens_that_pass_the_cut_are_candidates(triton_form, bias, n_flat):
    """Token 0 would pass if it were biased as the last one is; in registers (few candidates) and in memory (many)."""
    clean = torch.tensor([[-3.0] + [0.0] * n_flat + [-1.0]])
    noised = clean.clone()
    noised[0, 0] = NAN
    mask, expected = sk.pack_mask([n_flat + 1], n_flat + 2), {0: Status.OK, 1: Status.NAN_NOISED}
    for scope, status in expected.items():
        case = replace(
            make_case(0, batch=1, vocab_size=n_flat + 2, params=StepParams(refusal_bias=bias, bias_scope=scope)),
            clean=clean,
            noised=noised,
            refusal_mask=mask,
            mask_id=torch.zeros(1, dtype=torch.int64),
        )
        assert case.run("eager").status.tolist() == [status]
        assert assert_equals_eager(case).status.tolist() == [status]
        assert run_scores(case).status.tolist() == [status]


def test_suppressing_the_best_token_makes_candidates_of_what_it_hid(triton_form):
    clean, mask = torch.tensor([[5.0, 1.0, -0.5]], device=DEVICE), sk.pack_mask([0], 3).to(DEVICE)
    noised = torch.tensor([[5.0, 1.0, NAN]], device=DEVICE)
    for bias, status in ((-6.0, Status.NAN_NOISED), (-1.0, Status.OK)):
        params = StepParams(refusal_bias=bias)
        assert int(sk.decode_step(clean, noised, params, refusal_mask=mask, backend="triton").status) == status
        assert int(sk.decode_scores(clean, noised, params, refusal_mask=mask, backend="triton").status) == status


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


def test_temperature_divides_and_is_not_multiplied_by_the_reciprocal(triton_form):
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


def test_top_p_keeps_while_the_mass_before_is_below(triton_form):
    clean = torch.zeros(6, 4, device=DEVICE)
    params = sampling(top_p=[0.25, 0.26, 0.74] * 2, plausibility_beta=[0.0] * 3 + [0.1] * 3)
    result = sk.decode_step(clean, None, params, seeds=0, backend="triton")
    assert result.n_kept.tolist() == [1, 2, 3] * 2
    assert result.token[[0, 3]].tolist() == [0, 0]


@pytest.mark.parametrize("n_tail", [20, 1000])
def test_top_p_mass_is_float64(triton_form, n_tail):
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


def test_a_bias_that_overflows_the_score(triton_form):
    case = biased_case([3e38, 1.0], None, refusal_bias=1e38)
    assert run(case).status.tolist() == [Status.INFINITE] * 3
    assert run_scores(case).status.tolist() == [Status.INFINITE] * 3


def test_a_bias_that_overflows_the_clean_logit_only(triton_form):
    """The score stays finite, what the cut compares does not."""
    case = biased_case([2e38, 1.0], [3e38, 1.0], contrast_weight=0.5, refusal_bias=1.6e38)
    assert assert_equals_eager(case).status.tolist() == [Status.OK] * 3
    assert_scores_as_good_as_eager(case)
