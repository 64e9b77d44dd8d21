"""Every other back end against the eager one, over sizes, dtypes, layouts and awkward rows: exactly its tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import safecode_kernels as sk
from kernels.conftest import usable_or_skip
from safecode_kernels import StepParams
from safecode_kernels.testing import Case, assert_step_equals, make_case, oracle_scores

OTHERS = [record.name for record in sk.list_backends() if record.name != "eager"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCHES = (0, 1, 3, 64)
VOCABULARIES = (1, 31, 1023, 32_000, 151_936, 152_065)
# The largest cells take one dtype: the eager reference needs seconds for each.
LARGE = 2_000_000
SAMPLER = {"greedy": False, "temperature": 0.8, "top_k": 50, "top_p": 0.9}


@pytest.fixture(scope="module", params=OTHERS)
def other(request):
    """The name of each back end but the eager one."""
    return usable_or_skip(request.param)


def assert_equals_eager(case: Case, name: str) -> None:
    assert_step_equals(case, case.run(name), case.run("eager"))


def assert_scores_as_good_as_eager(case: Case, name: str) -> None:
    ours, eager, truth = case.run_scores(name), case.run_scores("eager"), oracle_scores(case)
    assert ours.status.equal(eager.status)
    assert ours.keep.equal(eager.keep)
    for field in ("scores", "biased_clean"):
        a, b, t = getattr(ours, field), getattr(eager, field), getattr(truth, field)
        assert a.isfinite().equal(b.isfinite())
        finite = b.isfinite() & t.isfinite()  # float64 does not overflow where float32 does
        if finite.any():
            worst = (b.double() - t)[finite].abs().max()
            assert (a.double() - t)[finite].abs().max() <= 2 * worst, field


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("batch", BATCHES)
def test_random_parameters_per_row(other, batch, vocab_size, dtype):
    if batch * vocab_size > LARGE:
        if dtype != torch.bfloat16:
            pytest.skip("the largest cells run in bfloat16 only: the eager reference takes seconds for each")
        case = make_case(3, batch=batch, vocab_size=vocab_size, dtype=dtype, params=StepParams(**SAMPLER))
    else:
        case = make_case(3, batch=batch, vocab_size=vocab_size, dtype=dtype, excluded_share=0.1 * (vocab_size % 2))
    assert_equals_eager(case, other)
    if batch * vocab_size <= LARGE:
        assert_scores_as_good_as_eager(case, other)


def flat(case: Case) -> Case:
    return replace(case, clean=case.clean * 0.05, noised=case.noised * 0.05)


def ties(case: Case) -> Case:
    return replace(case, clean=case.clean.round(), noised=case.noised.round())


def all_equal(case: Case) -> Case:
    return replace(case, clean=torch.ones_like(case.clean), noised=torch.ones_like(case.noised))


def negative(case: Case) -> Case:
    return replace(case, clean=case.clean - 300, noised=case.noised - 300)


def mostly_excluded(case: Case) -> Case:
    clean = case.clean.clone()
    clean[:, ::2], clean[0] = -math.inf, -math.inf
    return replace(case, clean=clean)


def broken(case: Case) -> Case:
    """A special value per row, in either row of logits, once at its best token and once at a random one."""
    clean, noised = case.clean.clone(), case.noised.clone()
    values = [math.nan, -math.nan, math.inf, -math.inf, 3e38, -3e38]
    best = clean.argmax(-1)
    for row in range(case.batch):
        logits = clean if row % 2 else noised
        column = int(best[row]) if row % 3 else row * 37 % clean.shape[1]
        logits[row, column] = values[row % len(values)]
    return replace(case, clean=clean, noised=noised)


def no_masks(case: Case) -> Case:
    return replace(case, refusal_mask=sk.pack_mask([], case.clean.shape[1]), mask_id=torch.zeros_like(case.mask_id))


def full_masks(case: Case) -> Case:
    vocab_size = case.clean.shape[1]
    masks = sk.pack_masks([range(vocab_size), range(0, vocab_size, 3)], vocab_size)
    return replace(case, refusal_mask=masks, mask_id=case.mask_id.clamp(max=1))


def no_noised(case: Case) -> Case:
    return replace(case, noised=None)


def wide_rows(case: Case) -> Case:
    def wide(logits: torch.Tensor) -> torch.Tensor:
        return torch.cat([logits, torch.full_like(logits, math.nan)], dim=1)[:, : logits.shape[1]]

    return replace(case, clean=wide(case.clean), noised=wide(case.noised))


def transposed(case: Case) -> Case:
    return replace(case, clean=case.clean.T.contiguous().T, noised=case.noised.T.contiguous().T)


KINDS = (
    flat,
    ties,
    all_equal,
    negative,
    mostly_excluded,
    broken,
    no_masks,
    full_masks,
    no_noised,
    wide_rows,
    transposed,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_awkward_rows(other, kind, dtype):
    for vocab_size in (31, 1023, 9001):
        case = kind(make_case(vocab_size, batch=24, vocab_size=vocab_size, dtype=dtype))
        assert_equals_eager(case, other)
        assert_scores_as_good_as_eager(case, other)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_rows_with_more_candidates_than_any_buffer(other, beta):
    params = StepParams(plausibility_beta=beta, refusal_bias=0.5, greedy=False, top_p=0.95)
    case = flat(make_case(1, batch=2, vocab_size=60_000, params=params))
    assert_equals_eager(case, other)
    assert int(case.run(other).n_kept.min()) > 30_000


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_rows_beyond_two_to_the_31_elements(other, beta):
    """Only the pages of the rows are touched: memory that nobody writes to is not there."""
    if other == "triton":
        pytest.skip("test_triton_steps.py has such a case with real rows, for a GPU")
    case = make_case(3, batch=3, vocab_size=1023, params=StepParams(plausibility_beta=beta, greedy=False))
    stride = 2**30 + 7
    far = [torch.empty(3 * stride, dtype=torch.bfloat16).as_strided((3, 1023), (stride, 1)) for _ in range(2)]
    for view, rows in zip(far, (case.clean, case.noised), strict=True):
        view.copy_(rows)
    near = replace(case, clean=far[0].contiguous(), noised=far[1].contiguous())
    assert_step_equals(near, replace(case, clean=far[0], noised=far[1]).run(other), near.run("eager"))


def test_draw_of_processed_scores(other):
    for dtype in DTYPES:
        scores = make_case(5, batch=40, vocab_size=5000, dtype=dtype, excluded_share=0.5).clean
        for greedy in (True, False):
            ours, eager = (sk.draw(scores, seeds=range(40), step=2, greedy=greedy, backend=b) for b in (other, "eager"))
            assert ours.token.equal(eager.token)
            assert ours.n_kept.equal(eager.n_kept)
            torch.testing.assert_close(ours.logprob, eager.logprob, atol=1e-5, rtol=0)


def test_many_draws_equal_eagers(other):
    """Different bits for each row: one wrong bit or logarithm would show in thousands of races."""
    case = make_case(6, batch=1, vocab_size=3000, params=StepParams(plausibility_beta=0, greedy=False))
    many = replace(case.select([0] * 2000), seeds=torch.arange(2000) * 2**40, stream=torch.arange(2000))
    assert_equals_eager(many, other)
