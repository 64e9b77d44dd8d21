"""Each rule of the decode step on a row small enough to check by hand."""

from __future__ import annotations

import math

import pytest
import torch

import safecode_kernels as sk
from safecode_kernels import Status, StepParams

pytestmark = pytest.mark.usefixtures("backend")

INF, NAN = math.inf, math.nan
LEAST = torch.finfo(torch.float32).min
PLAIN = StepParams(contrast_weight=0, plausibility_beta=0)


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def sampling(**fields) -> StepParams:
    return StepParams(**{"contrast_weight": 0, "plausibility_beta": 0, "greedy": False, **fields})


def kept(clean: torch.Tensor, params: StepParams) -> list[int]:
    """The tokens that can be drawn, found by drawing often."""
    rows = clean.expand(400, -1)
    tokens = sk.decode_step(rows, None, params, seeds=list(range(400))).token
    n_kept = sk.decode_step(clean, None, params, seeds=0).n_kept
    drawn = sorted(set(tokens.tolist()))
    assert int(n_kept) == len(drawn), "draws and n_kept disagree"
    return drawn


# --- statuses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clean", "noised", "status"),
    [
        ([0.0, 1.0], [0.0, 1.0], Status.OK),
        ([NAN, 1.0], [0.0, 1.0], Status.NAN_CLEAN),
        ([NAN, INF], [NAN, INF], Status.NAN_CLEAN),
        ([INF, NAN], [0.0, 0.0], Status.NAN_CLEAN),
        ([INF, 1.0], [NAN, 1.0], Status.INFINITE),
        ([0.0, 1.0], [NAN, INF], Status.NAN_NOISED),
        ([0.0, 1.0], [INF, 0.0], Status.INFINITE),
        ([-INF, -INF], [NAN, INF], Status.NOTHING_FINITE),
        ([-INF, -INF], [0.0, 0.0], Status.NOTHING_FINITE),
        ([3e38, 1.0], [0.0, 0.0], Status.INFINITE),
        ([0.0, 1.0], [0.0, -INF], Status.OK),
    ],
)
def test_decode_step_status_and_precedence(clean, noised, status):
    params = StepParams(contrast_weight=0.43, plausibility_beta=0)
    good = [2.0, 1.0]
    result = sk.decode_step(torch.tensor([good, clean, good]), torch.tensor([good, noised, good]), params)
    assert result.status.tolist() == [0, status, 0]
    assert result.token.tolist()[::2] == [0, 0]
    scores = sk.decode_scores(torch.tensor([clean]), torch.tensor([noised]), params)
    assert scores.status.tolist() == [status]
    if status:
        assert (int(result.token[1]), float(result.logprob[1]), int(result.n_kept[1])) == (0, -INF, 0)
        assert (scores.scores == -INF).all()
        assert not scores.keep.any()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_decode_step_never_reads_a_noised_logit_it_does_not_need(bad):
    clean, noised = row(9.0, 0.0, 8.5), row(9.0, bad, 9.5)
    assert int(sk.decode_step(clean, noised, StepParams()).status) == Status.OK  # token 1 is no candidate
    assert int(sk.decode_step(clean, noised, PLAIN).status) == Status.OK  # weight 0
    scores = sk.decode_scores(clean, noised, StepParams())
    assert int(scores.status) == Status.OK
    assert float(scores.scores[0, 1]) == 0.0, "without a usable noised logit there is no contrast"
    everything = StepParams(plausibility_beta=0)
    assert int(sk.decode_step(clean, noised, everything).status) == (
        Status.NAN_NOISED if bad != bad else Status.INFINITE
    )


@pytest.mark.parametrize("bias", [2.0, -2.0])
def test_only_tokens_that_pass_the_cut_are_candidates(bias):
    """Token 1 would pass if it were biased as token 2 is; it isn't, so its noised logit means nothing."""
    clean, noised = row(0.0, -3.0, -1.0), row(0.0, NAN, -1.0)
    params, mask = StepParams(refusal_bias=bias), sk.pack_mask([2], 3)
    assert int(sk.decode_step(clean, noised, params, refusal_mask=mask).status) == Status.OK
    assert int(sk.decode_scores(clean, noised, params, refusal_mask=mask).status) == Status.OK
    # With a scope it isn't known before the scores who is biased.
    scoped = StepParams(refusal_bias=bias, bias_scope=1)
    assert int(sk.decode_step(clean, noised, scoped, refusal_mask=mask).status) == Status.NAN_NOISED
    assert int(sk.decode_scores(clean, noised, scoped, refusal_mask=mask).status) == Status.NAN_NOISED


def test_suppressing_the_best_token_makes_candidates_of_what_it_hid():
    clean, noised = row(5.0, 1.0, -0.5), row(5.0, 1.0, NAN)
    mask = sk.pack_mask([0], 3)
    suppressed = sk.decode_step(clean, noised, StepParams(refusal_bias=-6.0), refusal_mask=mask)
    assert int(suppressed.status) == Status.NAN_NOISED
    assert int(sk.decode_step(clean, noised, StepParams(refusal_bias=-1.0), refusal_mask=mask).status) == Status.OK


@pytest.mark.parametrize("filters", [{}, {"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.5}, {"top_p": 0.9, "min_p": 1.0}])
def test_decode_step_temperature_overflow_is_infinite(filters: dict[str, float]):
    result = sk.decode_step(row(1e38, 0.0), None, sampling(temperature=1e-3, **filters), seeds=0)
    assert (int(result.status), int(result.token)) == (Status.INFINITE, 0)


@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 1e-9}])
def test_decode_step_temperature_may_exclude_tokens_by_overflow(filters: dict[str, float]):
    result = sk.decode_step(row(0.0, -3e38), None, sampling(temperature=0.1, **filters), seeds=0)
    assert (int(result.status), int(result.token), int(result.n_kept)) == (Status.OK, 0, 1)
    result = sk.decode_step(row(-3e38, -3e38), None, sampling(temperature=0.1, **filters), seeds=0)
    assert int(result.status) == Status.NOTHING_FINITE


def test_decode_step_tolerates_masking_with_the_least_finite_number():
    clean, noised = row(LEAST, 1.0, LEAST, 2.0), row(LEAST, 1.0, LEAST, 2.5)
    for weight in (0.43, 1.0, 3.0):
        result = sk.decode_step(clean, noised, StepParams(contrast_weight=weight, plausibility_beta=0))
        assert (int(result.status), int(result.n_kept)) == (Status.OK, 2)


@pytest.mark.parametrize(("scores", "status"), [([NAN, INF], 1), ([0.0, INF], 4), ([-INF, -INF], 3), ([0.0, -INF], 0)])
def test_draw_status(scores, status):
    for greedy in (True, False):
        result = sk.draw(torch.tensor([scores]), seeds=3, greedy=greedy)
        assert (int(result.status), int(result.token)) == (status, 0)
        assert int(result.n_kept) == (0 if status else 1)


# --- exclusion and ties ---------------------------------------------------------------------------------------------


def test_decode_step_excludes_minus_infinity_before_subtracting():
    clean, noised = row(-INF, -5.0, -INF), row(-INF, -5.0, 3.0)
    result = sk.decode_step(clean, noised, StepParams(plausibility_beta=0))
    assert (int(result.token), int(result.n_kept), float(result.logprob)) == (1, 1, 0.0)


def test_decode_step_minus_infinity_noised_contributes_no_contrast():
    scores = sk.decode_scores(row(2.0, 1.0), row(-INF, 0.0), StepParams(contrast_weight=0.5)).scores
    assert scores.tolist() == [[2.0, 1.5]]


def test_decode_step_ties_take_the_lowest_id():
    clean = torch.full((1, 100), -4.0)
    clean[0, [17, 40, 99]] = 3.0
    assert int(sk.decode_step(clean, None, PLAIN).token) == 17
    assert int(sk.decode_step(clean, clean, StepParams()).token) == 17
    assert int(sk.draw(clean, greedy=True).token) == 17


def test_decode_step_single_survivor_and_single_token():
    clean = torch.full((1, 40), -INF)
    clean[0, 39] = -1e30
    for params in (PLAIN, sampling(top_p=0.1, top_k=1, min_p=1.0)):
        result = sk.decode_step(clean, None, params, seeds=1)
        assert (int(result.token), float(result.logprob), int(result.n_kept)) == (39, 0.0, 1)
    assert int(sk.decode_step(row(-7.0), row(3.0), StepParams()).token) == 0


def test_decode_step_all_negative_logits_are_not_beaten_by_padding():
    clean = torch.linspace(-90.0, -80.0, 33).unsqueeze(0)
    assert int(sk.decode_step(clean, None, StepParams()).token) == 32
    assert kept(clean, sampling(top_k=2)) == [31, 32]


# --- filters --------------------------------------------------------------------------------------------------------


def test_top_k_keeps_every_tie_of_the_kth():
    assert kept(row(1.0, 2.0, 1.0, 3.0, 1.0, 0.0), sampling(top_k=3)) == [0, 1, 2, 3, 4]
    assert kept(row(1.0, 2.0, 1.0, 3.0), sampling(top_k=2)) == [1, 3]
    assert kept(row(1.0, 1.5, -INF), sampling(top_k=50)) == [0, 1]


def test_top_p_breaks_ties_by_id_and_keeps_while_the_mass_before_is_below():
    equal = row(0.0, 0.0, 0.0, 0.0)
    assert kept(equal, sampling(top_p=0.25)) == [0]
    assert kept(equal, sampling(top_p=0.26)) == [0, 1]
    assert kept(equal, sampling(top_p=0.74)) == [0, 1, 2]
    assert kept(equal, sampling(top_p=1e-9)) == [0]
    shares = torch.tensor([[0.1, 0.5, 0.1, 0.3]]).log()
    assert kept(shares, sampling(top_p=0.45)) == [1]
    assert kept(shares, sampling(top_p=0.75)) == [1, 3]
    assert kept(shares, sampling(top_p=0.85)) == [0, 1, 3]


def test_top_p_mass_is_that_of_all_tokens_after_top_k():
    shares = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert kept(shares, sampling(top_p=0.5)) == [0, 1]
    assert kept(shares, sampling(top_p=0.5, top_k=2)) == [0]  # 0.4 of 0.7


def test_top_p_counts_a_long_flat_tail():
    clean = torch.zeros(1, 10_000)
    clean[0, 5000] = math.log(10_000.0)  # half of the mass
    assert int(sk.decode_step(clean, None, sampling(top_p=0.49), seeds=0).n_kept) == 1
    assert int(sk.decode_step(clean, None, sampling(top_p=0.75), seeds=0).n_kept) == pytest.approx(5000, abs=2)


def test_top_p_mass_is_float64():
    tail = torch.tensor([-6.3])
    share = 1 / (1 + 1000 * math.exp(float(tail)))  # of the best token; float32 would miss it by more than 1e-9
    clean = torch.cat([torch.zeros(1), tail.expand(1000)]).unsqueeze(0)
    assert int(sk.decode_step(clean, None, sampling(top_p=share - 1e-9), seeds=0).n_kept) == 1
    assert int(sk.decode_step(clean, None, sampling(top_p=share + 1e-9), seeds=0).n_kept) == 2


def test_min_p_is_relative_to_the_best():
    shares = torch.tensor([[0.5, 0.26, 0.14, 0.1]]).log()
    assert kept(shares, sampling(min_p=0.5)) == [0, 1]
    assert kept(shares, sampling(min_p=0.25)) == [0, 1, 2]
    assert kept(row(1.0, 1.0, 0.9), sampling(min_p=1.0)) == [0, 1]


def test_temperature_comes_before_the_filters():
    shares = torch.tensor([[0.5, 0.26, 0.14, 0.1]]).log()
    assert kept(shares, sampling(min_p=0.5, temperature=4.0)) == [0, 1, 2, 3]
    assert kept(shares, sampling(top_p=0.6, temperature=0.1)) == [0]


def test_temperature_divides_and_is_not_multiplied_by_the_reciprocal():
    temperature = torch.tensor(1.7)
    below = torch.arange(1, 2000) / 128
    above = torch.nextafter(below, torch.tensor(math.inf))
    merged = below / temperature == above / temperature
    merged &= below * temperature.reciprocal() != above * temperature.reciprocal()
    rows = torch.stack([below, above], dim=1)[merged]
    assert len(rows) > 10, "no pair of scores tells division and multiplication apart"
    params = sampling(temperature=float(temperature), top_k=1)
    assert (sk.decode_step(rows, None, params, seeds=0).n_kept == 2).all()


def test_greedy_ignores_the_filters_and_reports_temperature_one():
    clean = row(0.0, 1.0, 2.0)
    odd = StepParams(contrast_weight=0, plausibility_beta=0, temperature=9.0, top_k=1, top_p=0.1, min_p=1.0)
    result = sk.decode_step(clean, None, odd)
    assert int(result.n_kept) == 3
    assert float(result.logprob) == pytest.approx(float(clean.log_softmax(-1)[0, 2]), abs=1e-6)


# --- contrast, bias, cut --------------------------------------------------------------------------------------------


def test_contrast_prefers_what_the_image_grounds():
    clean, noised = row(5.0, 4.9, 0.0), row(6.0, 1.0, 0.0)
    assert int(sk.decode_step(clean, noised, StepParams(contrast_weight=0)).token) == 0
    assert int(sk.decode_step(clean, noised, StepParams()).token) == 1
    assert int(sk.decode_step(noised, clean, StepParams(plausibility_beta=0)).token) == 0


def test_plausibility_cut_follows_the_clean_row():
    clean, noised = row(10.0, 9.0, 0.0), row(10.0, 9.0, -90.0)
    assert int(sk.decode_step(clean, noised, StepParams()).token) == 0
    assert int(sk.decode_step(clean, noised, StepParams(plausibility_beta=0)).token) == 2
    assert int(sk.decode_step(clean, noised, StepParams()).n_kept) == 2


def test_cut_includes_the_bias_so_that_a_boost_can_produce_an_implausible_refusal():
    answer, refusal = 0.0, math.log(0.01)  # refusal at a hundredth of the answer, beta a tenth
    clean = row(answer, refusal, -9.0)
    params = StepParams(contrast_weight=0, plausibility_beta=0.1, refusal_bias=6.0)
    mask = sk.pack_mask([1], 3)
    assert int(sk.decode_step(clean, None, params, refusal_mask=mask).token) == 1
    assert int(sk.decode_step(clean, None, params, refusal_mask=mask, mask_id=-1).token) == 0


def test_cut_includes_the_bias_so_that_suppression_has_an_alternative():
    clean = row(math.log(0.01), math.log(0.99))
    params = StepParams(contrast_weight=0, plausibility_beta=0.1, refusal_bias=-6.0)
    result = sk.decode_step(clean, None, params, refusal_mask=sk.pack_mask([1], 2))
    assert (int(result.token), int(result.n_kept)) == (0, 2)
    assert int(sk.decode_step(clean, None, StepParams(contrast_weight=0)).n_kept) == 1


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_bias_that_overflows_a_score_is_a_status(beta):
    clean, mask = row(3e38, 1.0), sk.pack_mask([0], 2)
    params = StepParams(contrast_weight=0, plausibility_beta=beta, refusal_bias=3e38)
    assert int(sk.decode_step(clean, None, params, refusal_mask=mask).status) == Status.INFINITE
    assert int(sk.decode_scores(clean, None, params, refusal_mask=mask).status) == Status.INFINITE


def test_bias_scope_biases_only_the_best():
    clean = row(4.0, 3.0, 2.0, 1.0)
    mask = sk.pack_mask([2, 3], 4)
    for scope, expected in ((0, [4.0, 3.0, 9.0, 8.0]), (3, [4.0, 3.0, 9.0, 1.0]), (2, [4.0, 3.0, 2.0, 1.0])):
        params = StepParams(contrast_weight=0, plausibility_beta=0, refusal_bias=7.0, bias_scope=scope)
        assert sk.decode_scores(clean, None, params, refusal_mask=mask).scores.tolist() == [expected]


def test_bias_scope_keeps_every_tie_and_counts_contrasted_scores():
    clean, noised = row(1.0, 1.0, 1.0, 5.0), row(1.0, 1.0, 1.0, 20.0)  # contrast sends token 3 to the last place
    params = StepParams(contrast_weight=0.5, plausibility_beta=0, refusal_bias=2.0, bias_scope=1)
    scores = sk.decode_scores(clean, noised, params, refusal_mask=sk.pack_mask([1, 2, 3], 4))
    assert scores.scores.tolist() == [[1.0, 3.0, 3.0, -2.5]]
    assert scores.biased_clean.tolist() == [[1.0, 3.0, 3.0, 5.0]]


def test_plausible_takes_the_maximum_over_what_is_still_allowed():
    biased_clean = row(9.0, 3.0, 2.9, -4.0)
    allowed = torch.tensor([[False, True, True, True]])
    assert sk.plausible(biased_clean, allowed, 0.1).tolist() == [[False, True, True, False]]
    assert sk.plausible(biased_clean, allowed, 0.0).tolist() == allowed.tolist()
    per_row = sk.plausible(biased_clean.expand(2, -1), allowed.expand(2, -1), torch.tensor([1.0, 0.5]))
    assert per_row.tolist() == [[False, True, False, False], [False, True, True, False]]


def test_plausible_keeps_a_forced_token_that_the_model_excludes():
    assert sk.plausible(row(1.0, -INF), torch.tensor([[False, True]]), 0.1).tolist() == [[False, True]]


def test_every_call_returns_empty_for_an_empty_batch():
    empty = torch.empty(0, 50)
    masks = sk.pack_mask([3], 50)
    params = StepParams(greedy=False, refusal_bias=1.0)
    step = sk.decode_step(empty, empty, params, refusal_mask=masks, mask_id=[], seeds=[])
    assert [tuple(t.shape) for t in step] == [(0,)] * 4
    assert [t.dtype for t in step] == [torch.int64, torch.float32, torch.int32, torch.int32]
    scores = sk.decode_scores(empty, empty, params, refusal_mask=masks, mask_id=[])
    assert [tuple(t.shape) for t in scores] == [(0, 50), (0, 50), (0, 50), (0,)]
    assert scores.keep.dtype == torch.bool
    assert sk.draw(empty, seeds=[]).token.shape == (0,)
    assert sk.plausible(empty, empty.bool(), 0.1).shape == (0, 50)


def test_the_biased_logit_of_an_excluded_token_does_not_depend_on_the_batch():
    # The second token's score is inf - inf; the other row has a scope.
    clean, noised = torch.tensor([[0.9, 1.875]] * 2), torch.tensor([[0.9, 2.0]] * 2)
    params = StepParams(contrast_weight=(3e38, 1.0), plausibility_beta=0.1, refusal_bias=-6.0, bias_scope=(0, 1))
    scores = sk.decode_scores(clean, noised, params, refusal_mask=sk.pack_mask([1], 2))
    assert scores.status.tolist()[0] == Status.OK
    assert scores.scores[0, 1] == -INF
    assert scores.biased_clean[0].tolist() == [pytest.approx(0.9), -4.125]
