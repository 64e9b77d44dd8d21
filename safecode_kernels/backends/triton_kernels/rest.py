"""The result of a row that does not fit in a tile: too many candidates, or no cut. See memory.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .finish import write_failure, write_result
from .memory import best_biased_range, bias_range, cut_range, filter_row, kth_of_row, race_range, score_range
from .numbers import NEG_INF, NO_FAULT, OK, rank_of, status_of_best, status_of_fault, status_of_rank, value_of
from .places import DONE, MAX_SLICES, UNCUT
from .rows import cut_floor, gather_floor, is_scoped, narrows
from .tile import choose, logprob_of


@triton.jit
def rest_of_row(
    state, logits, contrast, sampler, key, scratch, result, plan, BLOCK: tl.constexpr, LOG_ROOM: tl.constexpr
):
    """Write a row's result, or to its plan that many tokens have to race, which is better done in slices.

    A row without a cut is planned, since all rows of a batch may be such; the race of one with too many candidates,
    which is seldom, runs here.
    """
    slot = tl.arange(0, MAX_SLICES)
    best_rank = tl.max(tl.load(scratch.ranks + slot), 0)
    status = status_of_rank(best_rank)
    best_x = tl.full([], NEG_INF, tl.float32)
    if status == OK:
        if state == UNCUT:
            fault = tl.max(tl.load(scratch.counts + slot), 0)
            best_x = tl.max(tl.load(scratch.best_x + slot), 0)
        else:
            floor = gather_floor(value_of(best_rank), contrast)
            cut = tl.full([], NEG_INF, tl.float32)
            if narrows(contrast):
                cut = cut_floor(best_biased_range(logits, 0, logits.size, floor, contrast, BLOCK), contrast.log_beta)
            fault, _rank, best_x = score_range(
                logits, 0, logits.size, floor, cut, contrast, 0.0, 1.0, scratch.row_x, BLOCK
            )
            tl.debug_barrier()
        status = tl.where(fault == NO_FAULT, status_of_best(best_x), status_of_fault(fault))
        if (fault == NO_FAULT) & ((state != UNCUT) | is_scoped(contrast)):
            status, best_x = _cut_row(logits, best_x, contrast, sampler, scratch, BLOCK, 2**LOG_ROOM)
    if status == OK:
        _finish_scored(state, logits.size, best_x, sampler, key, scratch, result, plan, BLOCK, LOG_ROOM)
    else:
        write_failure(result, status)
        tl.store(plan.left, DONE)


@triton.jit
def _cut_row(logits, best_s, contrast, sampler, scratch, BLOCK: tl.constexpr, ROOM: tl.constexpr):
    """Turn a row's scores before the bias into x; return its status and the best x. best_s is the largest of them."""
    threshold = tl.full([], NEG_INF, tl.float32)
    if is_scoped(contrast):
        threshold = kth_of_row(scratch.row_x, logits.size, contrast.scope, best_s, scratch.chosen_x, BLOCK, ROOM)
    fault, best = bias_range(logits, 0, logits.size, threshold, contrast, scratch.row_x, BLOCK)
    best_x = cut_range(logits, 0, logits.size, threshold, best, contrast, sampler.temperature, scratch.row_x, BLOCK)
    status = tl.where(fault == NO_FAULT, status_of_best(best_x), status_of_fault(fault))
    return status, best_x


@triton.jit
def _finish_scored(
    state, size, best_x, sampler, key, scratch, result, plan, BLOCK: tl.constexpr, LOG_ROOM: tl.constexpr
):
    """Filter and draw from a row's x."""
    count, listed, needs_top_p, mass = filter_row(
        scratch.row_x, scratch.row_tokens, size, best_x, sampler, scratch.chosen_x, BLOCK, 2**LOG_ROOM
    )
    if (state == UNCUT) & ~needs_top_p:
        tl.store(plan.left, count)
        tl.store(plan.listed, listed)
        tl.store(plan.ranks, rank_of(best_x))
    else:
        tl.store(plan.left, DONE)
        if needs_top_p:
            i = tl.arange(0, 2**LOG_ROOM)
            x = tl.load(scratch.row_x + i, mask=i < count, other=NEG_INF)
            token = tl.load(scratch.row_tokens + i, mask=i < count, other=0)
            winner, logprob, n_kept = choose(x, token, mass, key, sampler, LOG_ROOM)
            write_result(result, winner, logprob, n_kept)
        else:
            n_kept, raced_mass, _value, winner, score = race_range(
                scratch.row_x, scratch.row_tokens, 0, count, size, listed, best_x, key, sampler, BLOCK
            )
            write_result(result, winner, logprob_of(score, best_x, raced_mass), n_kept)
