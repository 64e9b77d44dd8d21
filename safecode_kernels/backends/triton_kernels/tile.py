"""Tokens that fit in registers: the K-th best, order, filters, draw. Blocks of one dimension, padded with x = -inf."""

from __future__ import annotations

import triton
import triton.language as tl

from .draws import gumbel, token_bits
from .numbers import INF, MAX_TOKEN, NEG_INF, RANK_NEG_INF, rank_of, value_of


@triton.jit
def kth_best(x, k):
    """Return the K-th largest of x, -inf if there are fewer finite ones.

    By halving what lies between -inf and the best. What a NaN makes of it does not matter: such a row fails.
    """
    rank = rank_of(x)
    low = tl.full([], RANK_NEG_INF, tl.int64)  # K tokens reach it, or it is -inf
    high = tl.max(rank, 0).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        reached = tl.sum((rank >= middle.to(tl.int32)).to(tl.int32), 0) >= k
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return value_of(low.to(tl.int32))


@triton.jit
def _exchange(cube, ascending, axis: tl.constexpr):
    """Order each pair of neighbours along an axis of length 2."""
    other = tl.sum(cube, axis, keep_dims=True) - cube  # integers: exact, though it may wrap
    shape: tl.constexpr = [1] * axis + [2] + [1] * (len(cube.shape) - axis - 1)
    is_second = tl.reshape(tl.arange(0, 2), shape)
    wants_smaller = (is_second ^ ascending) != 0
    return tl.where(wants_smaller, tl.minimum(cube, other), tl.maximum(cube, other))


@triton.jit
def sort_descending(key, LOG_N: tl.constexpr):
    """Return the 2**LOG_N integers in descending order: a bitonic network over a cube with an axis per bit.

    tl.sort does the same but takes seconds in the interpreter, which knows no quick exclusive-or.
    """
    cube = tl.reshape(key, [2] * LOG_N)
    for stage in tl.static_range(1, LOG_N + 1):
        ascending = 0
        if stage < LOG_N:
            ascending = tl.reshape(tl.arange(0, 2), [1] * (LOG_N - 1 - stage) + [2] + [1] * stage)
        for step in tl.static_range(stage):
            cube = _exchange(cube, ascending, LOG_N - stage + step)
    return tl.reshape(cube, [2**LOG_N])


@triton.jit
def pack(x, token):
    """Return int64 in the order of the filters: score ascending, token descending."""
    rank = rank_of(tl.where(x == 0, 0.0, x))  # the two zeros are one score
    return (rank.to(tl.int64) << 32) | (token ^ MAX_TOKEN).to(tl.int64)


@triton.jit
def unpack(key):
    """Return x and token of what pack returned."""
    return value_of((key >> 32).to(tl.int32)), (key & MAX_TOKEN).to(tl.int32) ^ MAX_TOKEN


@triton.jit
def top_k_top_p(x, best, all_mass, sampler, N: tl.constexpr):
    """Return which of the sorted x pass top_k and then top_p; mass in float64.

    `all_mass` is the mass of all tokens where the caller has already dropped some that top_p would drop, else 0.
    """
    kth = tl.max(tl.where(tl.arange(0, N) == sampler.top_k - 1, x, NEG_INF), 0)
    keep = (x > NEG_INF) & (x >= kth)
    weight = tl.where(keep, tl.exp(x.to(tl.float64) - best.to(tl.float64)), 0.0)
    before = tl.cumsum(weight, 0) - weight
    limit = sampler.top_p * tl.maximum(tl.sum(weight, 0), all_mass)
    return keep & (before < tl.where(sampler.top_p < 1, limit, INF))


@triton.jit
def race(x, token, keep, key, sampler):
    """Return the winner among the tokens kept, and its score: the best, or the best with the Gumbel values added."""
    value = x.to(tl.float64)
    if sampler.greedy == 0:
        value += gumbel(token_bits(token, key))
    value = tl.where(keep, value, NEG_INF)
    winner = tl.min(tl.where(keep & (value == tl.max(value, 0)), token, MAX_TOKEN), 0)
    score = tl.max(tl.where(keep & (token == winner), x, NEG_INF), 0)
    return winner, score


@triton.jit
def choose(x, token, all_mass, key, sampler, LOG_N: tl.constexpr):
    """Return token, log-probability and number of tokens kept, from x after the cut and the temperature.

    There is at least one finite x, and none is +inf or NaN.
    """
    best = tl.max(x, 0)
    keep = x > NEG_INF
    if (sampler.top_k > 0) | (sampler.top_p < 1):
        x, token = unpack(sort_descending(pack(x, token), LOG_N))
        keep = top_k_top_p(x, best, all_mass, sampler, 2**LOG_N)
    keep = keep & (x >= best + sampler.log_min_p)
    count = tl.sum(keep.to(tl.int32), 0)
    mass = tl.sum(tl.where(keep, tl.exp(x - best), 0.0), 0)
    winner, score = race(x, token, keep, key, sampler)
    return winner, logprob_of(score, best, mass), count


@triton.jit
def logprob_of(score, best, mass):
    """Return the natural logarithm of a token's probability; mass is the sum of exp(x - best)."""
    return ((score - best).to(tl.float64) - tl.log(mass.to(tl.float64))).to(tl.float32)
