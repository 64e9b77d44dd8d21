"""Every usable back end against the float64 oracle, and the comparison rules themselves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from safecode_kernels import StepParams
from safecode_kernels.testing import (
    LOGPROB_ATOL,
    SCORE_ATOL,
    assert_scores_match_oracle,
    assert_step_matches_oracle,
    chi_square_p,
    make_case,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(3, 1), (5, 31), (64, 1023), (16, 5000), (2, 152_065)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "vocab_size"), SIZES)
def test_backend_matches_oracle(backend, batch, vocab_size, dtype):
    for seed in range(1 if vocab_size > 100_000 else 4):
        case = make_case(seed, batch=batch, vocab_size=vocab_size, dtype=dtype, excluded_share=0.1 * (seed % 2))
        assert_step_matches_oracle(case, case.run(backend))
        assert_scores_match_oracle(case, case.run_scores(backend))


def test_comparison_catches_a_wrong_result():
    case = make_case(0, batch=8, vocab_size=400, params=StepParams(refusal_bias=1.0))
    right = case.run()
    assert assert_step_matches_oracle(case, right) == 0
    wrong_token = right.token.clone()
    wrong_token[3] += 1
    for wrong in (
        right._replace(token=wrong_token),
        right._replace(n_kept=right.n_kept + 1),
        right._replace(status=right.status + 1),
        right._replace(logprob=right.logprob + 2 * LOGPROB_ATOL),
        right._replace(logprob=right.logprob * math.nan),
    ):
        with pytest.raises(AssertionError):
            assert_step_matches_oracle(case, wrong)
    scores = case.run_scores()
    for wrong in (
        scores._replace(scores=scores.scores + 2 * SCORE_ATOL),
        scores._replace(biased_clean=scores.biased_clean.masked_fill(scores.keep, -math.inf)),
        scores._replace(keep=~scores.keep),
        scores._replace(status=scores.status + 1),
    ):
        with pytest.raises(AssertionError):
            assert_scores_match_oracle(case, wrong)


def test_comparison_excuses_what_rounding_decides_and_caps_it():
    clean = torch.zeros(1, 8)
    clean[0, 2], clean[0, 5] = 1.0, 1.0 - 2.0**-24  # one ulp below
    case = replace(make_case(0, batch=1, vocab_size=8, params=StepParams(contrast_weight=0)), clean=clean)
    other = case.run()._replace(token=torch.tensor([5]))
    assert assert_step_matches_oracle(case, other) == 1
    many = case.select([0] * 10)
    others = many.run()._replace(token=torch.full((10,), 5))
    with pytest.raises(AssertionError, match="decided by rounding"):
        assert_step_matches_oracle(many, others)


def test_chi_square_p_against_known_values():
    # The 95 % quantile of chi-square with 3 degrees of freedom is 7.8147.
    half = math.sqrt(7.8147 * 100 / 4)
    counts = torch.tensor([100 + half, 100 - half, 100 + half, 100 - half], dtype=torch.float64)
    assert chi_square_p(counts, torch.full((4,), 0.25, dtype=torch.float64)) == pytest.approx(0.05, abs=1e-4)
    assert chi_square_p(torch.tensor([10, 10, 1]), torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)) == 0.0
    with pytest.raises(ValueError, match="at least two bins"):
        chi_square_p(torch.tensor([5, 0]), torch.tensor([1.0, 0.0], dtype=torch.float64))


def test_make_case_is_reproducible_and_exercises_what_it_claims():
    case, again = (make_case(11, batch=64, vocab_size=2000) for _ in range(2))
    assert case.clean.equal(again.clean)
    assert case.params == again.params
    result = case.run()
    assert (result.status == 0).all()
    assert len(result.n_kept.unique()) > 20
    assert set(case.mask_id.tolist()) == {-1, 0, 1, 2}
    without_bias = replace(case, params=replace(case.params, refusal_bias=0.0)).run()
    without_contrast = replace(case, noised=None).run()
    assert (without_bias.token != result.token).sum() > 3
    assert (without_contrast.token != result.token).sum() > 3
