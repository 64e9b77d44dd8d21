"""The draws are what they claim to be: distributed as the softmax, and able to reach every token."""

from __future__ import annotations

import math

import pytest
import torch

import safecode_kernels as sk
from safecode_kernels import StepParams, rng
from safecode_kernels.testing import CHI_SQUARE_MIN_P, chi_square_p, make_case

pytestmark = pytest.mark.usefixtures("backend")

REAL_VOCAB = 32_064
LARGE_VOCAB = 152_064


def sampling(**fields) -> StepParams:
    return StepParams(**{"contrast_weight": 0, "plausibility_beta": 0, "greedy": False, **fields})


def draws_of(logits: torch.Tensor, params: StepParams, count: int, chunk: int, first_seed: int = 0) -> torch.Tensor:
    """`count` draws from one row of logits, each with its own seed."""
    rows = logits.expand(chunk, -1)
    tokens = [
        sk.decode_step(rows, None, params, seeds=list(range(start, start + chunk)), step=3).token
        for start in range(first_seed, first_seed + count, chunk)
    ]
    return torch.cat(tokens)


def test_draws_over_a_whole_real_vocabulary_pass_chi_square():
    logits = make_case(1, batch=1, vocab_size=REAL_VOCAB).clean
    tokens = draws_of(logits, sampling(temperature=2.0), count=3000, chunk=50)
    p = (logits.double()[0] / 2.0).softmax(-1)
    by_slice, by_lane = torch.arange(REAL_VOCAB) * 200 // REAL_VOCAB, torch.arange(REAL_VOCAB) % 32
    by_rank = torch.empty(REAL_VOCAB, dtype=torch.int64)
    by_rank[p.argsort(descending=True)] = torch.arange(REAL_VOCAB)
    for bins in (by_slice, by_lane, by_rank.clamp(max=300)):
        counts = torch.bincount(bins[tokens], minlength=int(bins.max()) + 1)
        assert (
            chi_square_p(counts, torch.zeros(len(counts), dtype=torch.float64).index_add_(0, bins, p))
            > CHI_SQUARE_MIN_P
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"plausibility_beta": 0.1, "contrast_weight": 0.43, "temperature": 1.3},
        {"plausibility_beta": 0.02, "contrast_weight": 1.0, "top_p": 0.8, "refusal_bias": 2.0},
        {"top_k": 40, "temperature": 0.7, "min_p": 0.05},
    ],
)
def test_draws_with_every_filter_at_a_real_vocabulary_pass_chi_square(fields):
    params = sampling(**fields)
    case = make_case(2, batch=1, vocab_size=REAL_VOCAB, params=params)
    args = {"refusal_mask": case.refusal_mask, "mask_id": [0]}
    scores = sk.decode_scores(case.clean, case.noised, params, **args)
    x = scores.scores[0].double().masked_fill(~scores.keep[0], -math.inf) / params.temperature
    if params.top_k:
        x[x < x.topk(params.top_k).values[-1]] = -math.inf
    if params.top_p < 1:
        ordered, order = x.softmax(-1).sort(descending=True)
        x[order[(ordered.cumsum(-1) - ordered) >= params.top_p]] = -math.inf
    if params.min_p:
        x[x < x.max() + math.log(params.min_p)] = -math.inf
    expected = x.softmax(-1)

    count, chunk = 6000, 200
    counts = torch.zeros(REAL_VOCAB, dtype=torch.int64)
    args["mask_id"] = 0
    for start in range(0, count, chunk):
        seeds = list(range(start, start + chunk))
        rows = [t.expand(chunk, -1) for t in (case.clean, case.noised)]
        result = sk.decode_step(*rows, params, seeds=seeds, **args)
        counts += torch.bincount(result.token, minlength=REAL_VOCAB)
        assert (result.n_kept == int((expected > 0).sum())).all()
        torch.testing.assert_close(result.logprob.double(), expected[result.token].log(), atol=1e-5, rtol=0)
    assert chi_square_p(counts, expected) > CHI_SQUARE_MIN_P


@pytest.mark.parametrize("vary", ["seeds", "stream", "step"])
def test_draws_along_each_part_of_the_key_pass_chi_square(vary):
    logits = make_case(3, batch=1, vocab_size=64).clean
    count = 20_000
    if vary == "step":
        tokens = torch.tensor([int(sk.draw(logits, seeds=1, step=step).token) for step in range(count // 10)])
    else:
        key = {"seeds": 1, "stream": 0, vary: torch.arange(count)}
        tokens = sk.draw(logits.expand(count, -1), **key).token
    assert chi_square_p(torch.bincount(tokens, minlength=64), logits[0].double().softmax(-1)) > CHI_SQUARE_MIN_P


def test_neighbouring_seeds_and_steps_are_independent():
    logits, count = torch.zeros(1, 8), 20_000
    rows = logits.expand(count, -1)
    seeds = torch.arange(count)
    here = sk.draw(rows, seeds=seeds, step=0).token
    for other in (
        sk.draw(rows, seeds=seeds + 1, step=0).token,
        sk.draw(rows, seeds=seeds, step=1).token,
        sk.draw(rows, seeds=seeds, stream=1).token,
    ):
        pairs = torch.bincount(here * 8 + other, minlength=64)
        assert chi_square_p(pairs, torch.full((64,), 1 / 64, dtype=torch.float64)) > CHI_SQUARE_MIN_P


def test_every_token_of_a_small_vocabulary_is_reached():
    vocab_size = 1023
    tokens = draws_of(torch.zeros(1, vocab_size), sampling(), count=14 * vocab_size, chunk=vocab_size)
    assert len(tokens.unique()) == vocab_size


def edge_tokens() -> list[int]:
    """Both sides of every lane, cipher call, group of 32, power of two and of usual slices, and the two ends."""
    edges = {*range(40), *range(LARGE_VOCAB - 40, LARGE_VOCAB)}
    for boundary in [2**k for k in range(6, 18)] + [3 * 4096, 5 * 8192, 76_032, 131_072 + 8]:
        edges |= {boundary - 1, boundary, boundary + 7, boundary + 8}
    return sorted(token for token in edges if token < LARGE_VOCAB)


def test_every_lane_block_and_slice_edge_of_a_large_vocabulary_is_reached():
    edges = edge_tokens()
    logits = torch.full((1, LARGE_VOCAB), -math.inf)
    logits[0, edges] = 1.5
    tokens = draws_of(logits, sampling(), count=15 * len(edges), chunk=len(edges))
    assert set(tokens.tolist()) == set(edges)


def test_the_dense_race_equals_the_compact_one_at_the_edges():
    """Tokens 20 below the edges stay in the race, so nothing is compacted, yet almost never win."""
    edges = edge_tokens()
    sparse = torch.full((1, LARGE_VOCAB), -math.inf)
    sparse[0, edges] = 20.0
    dense = sparse.clamp(min=0.0)
    dense_tokens, sparse_tokens = (draws_of(x, sampling(), count=24, chunk=8) for x in (dense, sparse))
    assert dense_tokens.equal(sparse_tokens)
    assert len(dense_tokens.unique()) > 12


def test_what_the_race_leaves_out_could_not_win():
    """A token just inside the span wins if it draws the best and all others the worst value; outside it cannot."""
    best, worst = rng.gumbel(torch.tensor([0, 2**32 - 1])).tolist()
    assert best - worst < rng.GUMBEL_SPAN
    # A token far outside changes neither the others' draws nor, if it never wins, the frequencies.
    near = torch.tensor([[0.0, -1.0, 0.5, -rng.GUMBEL_SPAN - 0.01]])
    assert int((draws_of(near, sampling(), 4000, 1000) == 3).sum()) == 0


def test_mixed_greedy_and_sampling_rows():
    logits = make_case(4, batch=1, vocab_size=300).clean.expand(200, -1)
    params = sampling(greedy=[row % 2 == 0 for row in range(200)])
    tokens = sk.decode_step(logits, None, params, seeds=list(range(200))).token
    assert (tokens[::2] == int(logits[0].argmax())).all()
    assert len(tokens[1::2].unique()) > 20
    alone = sk.decode_step(logits[1::2], None, sampling(), seeds=list(range(1, 200, 2))).token
    assert tokens[1::2].equal(alone)


def test_step_may_differ_by_row():
    case = make_case(8, batch=6, vocab_size=700, params=sampling())
    steps = [0, 3, 2**40, 7, 2**63 - 1, 3]
    alone = [sk.decode_step(case.clean[[i]], None, case.params, seeds=5, step=step) for i, step in enumerate(steps)]
    interleaved = torch.stack([torch.tensor(steps), torch.zeros(6, dtype=torch.int64)], dim=1)[:, 0]
    for step in (steps, torch.tensor(steps), interleaved):
        together = sk.decode_step(case.clean, None, case.params, seeds=5, step=step)
        assert together.token.equal(torch.cat([result.token for result in alone]))
        assert sk.draw(case.clean, seeds=5, step=step).token.equal(together.token)
    prepared = case.prepare(seeds=[5] * 6, stream=0, refusal_mask=None)
    assert prepared(case.clean, step=torch.tensor(steps)).token.equal(together.token)
    with pytest.raises(sk.ArgumentError, match=r"step\[2\]=-1 is out of range"):
        prepared(case.clean, step=torch.tensor([0, 1, -1, 0, 0, 0]))
