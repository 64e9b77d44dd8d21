"""Properties that hold for every input, on random ones."""

from __future__ import annotations

import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import safecode_kernels as sk
from safecode_kernels import StepParams
from safecode_kernels.testing import Case, make_case

pytestmark = pytest.mark.usefixtures("backend")

SEEDS = st.integers(0, 2**31 - 1)
# A batch's widest row decides how a sum is laid out, so a log-probability may move by the rounding of the sum.
SUM_ATOL = 1e-6


def assert_same(actual: sk.StepResult, expected: sk.StepResult) -> None:
    for name in ("token", "n_kept", "status"):
        assert getattr(actual, name).tolist() == getattr(expected, name).tolist(), name
    torch.testing.assert_close(actual.logprob, expected.logprob, atol=SUM_ATOL, rtol=0)


def random_case(seed: int, **options) -> Case:
    sizes = {"batch": 6, "vocab_size": [1, 31, 32, 500, 1023][seed % 5], "excluded_share": [0.0, 0.3][seed % 2]}
    return make_case(seed, **{**sizes, **options})


@settings(max_examples=100)
@given(seed=SEEDS, weight=st.floats(0, 10), bias=st.floats(-9, 9), beta=st.sampled_from([0.0, 0.1, 0.7]))
def test_equal_branches_leave_the_greedy_token_alone(seed, weight, bias, beta):
    # Distinct quarters, and a bias off their grid: what float32 rounding could decide is left out.
    generator = torch.Generator().manual_seed(seed)
    clean = torch.stack([torch.randperm(400, generator=generator) for _ in range(3)]).float() / 4 - 50
    mask = sk.pack_mask(torch.randint(400, (90,), generator=generator), 400)
    bias = round(bias * 4) / 4 + 0.1
    tokens = [
        sk.decode_step(
            clean,
            noised,
            StepParams(contrast_weight=a, plausibility_beta=beta, refusal_bias=bias),
            refusal_mask=mask,
        ).token.tolist()
        for a, noised in ((weight, clean), (0.0, clean), (weight, None))
    ]
    assert tokens[0] == tokens[1] == tokens[2]


@settings(max_examples=60)
@given(seed=SEEDS)
def test_a_row_alone_equals_the_row_in_a_batch(seed):
    case = random_case(seed)
    together = case.run()
    for row in range(case.batch):
        assert_same(case.select([row]).run(), sk.StepResult(*(t[row : row + 1] for t in together)))


@settings(max_examples=40)
@given(seed=SEEDS)
def test_the_order_of_the_rows_does_not_matter(seed):
    case = random_case(seed)
    order = [4, 0, 5, 3, 1, 2]
    assert_same(case.select(order).run(), sk.StepResult(*(t[order] for t in case.run())))


@settings(max_examples=40)
@given(seed=SEEDS)
def test_scores_then_cut_then_draw_equals_the_fused_step(seed):
    case = random_case(seed)
    plain = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}
    for greedy in (True, False):
        fused_case = replace(case, params=replace(case.params, greedy=greedy, **plain))
        scores = fused_case.run_scores()
        keep = sk.plausible(scores.biased_clean, scores.scores.isfinite(), fused_case.params.plausibility_beta)
        assert keep.equal(scores.keep)
        drawn = sk.draw(
            scores.scores.masked_fill(~keep, -math.inf),
            seeds=case.seeds,
            stream=case.stream,
            step=case.step,
            greedy=greedy,
        )
        fused = fused_case.run()
        ok = fused.status == 0
        assert_same(sk.StepResult(*(t[ok] for t in drawn)), sk.StepResult(*(t[ok] for t in fused)))


@settings(max_examples=30)
@given(seed=SEEDS)
def test_strided_rows_give_the_same_result(seed):
    case = random_case(seed)
    expected = case.run()

    def wide(logits: torch.Tensor) -> torch.Tensor:
        return torch.cat([logits, torch.full_like(logits, math.nan)], dim=1)[:, : logits.shape[1]]

    def every_second(logits: torch.Tensor) -> torch.Tensor:
        return torch.stack([logits, torch.full_like(logits, math.nan)], dim=2).flatten(1)[:, ::2]

    def transposed(logits: torch.Tensor) -> torch.Tensor:
        return logits.T.contiguous().T

    for view in (wide, every_second, transposed):
        assert_same(replace(case, clean=view(case.clean), noised=view(case.noised)).run(), expected)


@settings(max_examples=30)
@given(seed=SEEDS, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_is_read_as_float32(seed, dtype):
    case = random_case(seed, dtype=dtype)
    as_float = replace(case, clean=case.clean.float(), noised=case.noised.float())
    assert_same(case.run(), as_float.run())
    for half, single in zip(case.run_scores(), as_float.run_scores(), strict=True):
        assert half.equal(single)
        assert half.dtype == single.dtype


@settings(max_examples=30)
@given(seed=SEEDS)
def test_prepared_step_equals_the_single_call_and_changes_no_input(seed):
    case = random_case(seed)
    before = [case.clean.clone(), case.noised.clone(), case.refusal_mask.clone(), case.seeds.clone()]
    prepared = case.prepare()
    for _ in range(2):
        assert_same(prepared(case.clean, case.noised, mask_id=case.mask_id, step=case.step), case.run())
    prepared_scores = prepared.scores(case.clean, case.noised, mask_id=case.mask_id)
    for actual, expected in zip(prepared_scores, case.run_scores(), strict=True):
        assert actual.equal(expected)
    prepared_scores.scores.fill_(0)
    prepared_scores.biased_clean.fill_(0)
    after = [case.clean, case.noised, case.refusal_mask, case.seeds]
    assert all(a.equal(b) for a, b in zip(after, before, strict=True))


@settings(max_examples=40)
@given(seed=SEEDS)
def test_swapped_branches_differ(seed):
    case = make_case(seed, batch=16, vocab_size=500, params=StepParams())
    swapped = replace(case, clean=case.noised, noised=case.clean)
    assert case.run().token.tolist() != swapped.run().token.tolist()
    assert not case.run_scores().scores.equal(swapped.run_scores().scores)


@settings(max_examples=40)
@given(seed=SEEDS)
def test_contrast_is_the_papers_at_another_temperature(seed):
    """z - alpha n = (1 - alpha) ((1 + a) z - a n) with a = alpha / (1 - alpha)."""
    case = make_case(seed, batch=4, vocab_size=300)
    alpha = 0.3
    ours = sk.decode_scores(case.clean, case.noised, StepParams(contrast_weight=alpha / (1 - alpha))).scores
    torch.testing.assert_close(ours * (1 - alpha), case.clean - alpha * case.noised, atol=1e-5, rtol=1e-5)


@settings(max_examples=40)
@given(seed=SEEDS)
def test_logprob_is_that_of_the_reported_distribution(seed):
    case = random_case(seed, params=StepParams(plausibility_beta=0.2, refusal_bias=1.5))
    scores, result = case.run_scores(), case.run()
    kept = scores.scores.masked_fill(~scores.keep, -math.inf)
    ok = result.status == 0
    expected = kept.log_softmax(-1).gather(1, result.token.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(result.logprob[ok], expected[ok], atol=1e-5, rtol=0)
    assert result.token[ok].tolist() == kept.argmax(-1)[ok].tolist()
    assert result.n_kept[ok].tolist() == scores.keep.sum(-1)[ok].tolist()


def test_a_failed_row_leaves_the_others_alone():
    case = make_case(5, batch=8, vocab_size=400)
    expected = case.run()
    clean = case.clean.clone()
    clean[2, 7], clean[5] = math.nan, -math.inf
    result = replace(case, clean=clean).run()
    assert result.status.tolist() == [0, 0, 1, 0, 0, 3, 0, 0]
    others = [0, 1, 3, 4, 6, 7]
    assert_same(sk.StepResult(*(t[others] for t in result)), sk.StepResult(*(t[others] for t in expected)))


@pytest.mark.parametrize("noised_is_nan", [True, False])
def test_weight_zero_equals_no_noised_row(noised_is_nan):
    case = make_case(8, batch=6, vocab_size=700)
    params = replace(case.params, contrast_weight=[0.0, 0.43] * 3)
    noised = case.noised.clone()
    noised[::2] = math.nan if noised_is_nan else 1.0
    mixed = replace(case, params=params, noised=noised).run()
    without = replace(case, params=replace(params, contrast_weight=0.0), noised=None).run()
    assert_same(sk.StepResult(*(t[::2] for t in mixed)), sk.StepResult(*(t[::2] for t in without)))
