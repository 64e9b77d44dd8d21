"""The result of a row whose candidates fit in a tile."""

from __future__ import annotations

import triton
import triton.language as tl

from .candidates import collect, score_chosen
from .draws import load_key
from .numbers import NEG_INF, NO_FAULT, OK, status_of_best, status_of_fault, status_of_rank, value_of
from .places import DONE, MAX_SLICES, TOO_MANY
from .rows import gather_floor, is_gathered, load_sampler
from .tile import choose


@triton.jit
def write_result(result, token, logprob, n_kept):
    """Write the result of a row that could be decoded."""
    tl.store(result.token, token.to(tl.int64))
    tl.store(result.logprob, logprob)
    tl.store(result.n_kept, n_kept)
    tl.store(result.status, OK)


@triton.jit
def write_failure(result, status):
    """Write the result of a row that could not be decoded."""
    tl.store(result.token, tl.full([], 0, tl.int64))
    tl.store(result.logprob, NEG_INF)
    tl.store(result.n_kept, 0)
    tl.store(result.status, status)


@triton.jit
def finish_row(
    logits, contrast, parameters, keys, row, scratch, result, slice_size, column_bits,
    TILE: tl.constexpr, LOG_ROOM: tl.constexpr,
):  # fmt: skip
    """Write a row's result from the candidates of its slices, unless there are too many; return DONE or TOO_MANY.

    Sampler and key are loaded where they are needed: before, they would take up registers.
    """
    slot = tl.arange(0, MAX_SLICES)
    ranks = tl.load(scratch.ranks + slot)
    best_rank = tl.max(ranks, 0)
    status = status_of_rank(best_rank)
    state = tl.full([], DONE, tl.int32)
    if status == OK:
        floor = gather_floor(value_of(best_rank), contrast)
        matters = is_gathered(value_of(ranks), floor, contrast)
        most = tl.max(tl.where(matters, tl.load(scratch.counts + slot), 0), 0)
        count = collect(scratch, most, slice_size, column_bits, floor, contrast, TILE, 2**LOG_ROOM)
        if count <= 2**LOG_ROOM:
            sampler = load_sampler(parameters, row)
            key = load_key(keys, row)
            x, token, fault = score_chosen(count, logits, contrast, sampler.temperature, scratch, 2**LOG_ROOM)
            status = tl.where(fault == NO_FAULT, status_of_best(tl.max(x, 0)), status_of_fault(fault))
            if status == OK:
                winner, logprob, n_kept = choose(x, token, 0.0, key, sampler, LOG_ROOM)
                write_result(result, winner, logprob, n_kept)
        else:
            state += TOO_MANY - DONE
    if status != OK:
        write_failure(result, status)
    return state
