"""Kernels of the decode step. B rows, V tokens, S slices per row; places.py has the tensors between them.

    scan_slices    grid (B, S)    candidates of each slice, or x of rows without a cut
    finish_rows    grid (B)       the result of rows whose candidates fit in a tile
    decode_rows    grid (B)       both in one program per row, for many rows
    rest_rows      grid (B)       the other rows; of rows without a cut perhaps only what has to race
    race_slices    grid (B, S)    that race, in slices
    merge_slices   grid (B)       its result

The last two are launched only if a row may have beta 0. A program of rest_rows that finds nothing to do ends at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .candidates import gather_range
from .draws import Keys, load_key
from .finish import finish_row, write_failure, write_result
from .memory import race_range, score_range
from .numbers import LOWEST, MAX_TOKEN, NEG_INF, OK, status_of_rank, value_of
from .places import DONE, MAX_SLICES, UNCUT, logits_of_row, plan_of_row, result_of_row, scratch_of_row
from .rest import rest_of_row
from .rows import Parameters, is_scoped, load_contrast, load_sampler
from .shapes import NOT_SPECIALIZED
from .tile import logprob_of


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def scan_slices(
    clean, clean_stride, noised, noised_stride, has_noised, packed, words, words_per_row, mask_ids,
    ints, floats,
    batch, vocab_size, padded_size, slice_size, some_uncut,
    BLOCK: tl.constexpr, MEMORY_BLOCK: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Write the candidates of one slice of one row; its x if it has beta 0 and `some_uncut` says that rows may."""
    row = tl.program_id(0)
    index = tl.program_id(1)
    logits = logits_of_row(clean, clean_stride, noised, noised_stride, vocab_size, row)
    parameters = Parameters(packed, batch, has_noised, words, words_per_row, mask_ids)
    contrast = load_contrast(parameters, row)
    scratch = scratch_of_row(ints, floats, padded_size, ROOM, row)
    begin = index * slice_size
    end = tl.minimum(begin + slice_size, vocab_size)
    if (contrast.log_beta == NEG_INF) & (some_uncut != 0):
        temperature = load_sampler(parameters, row).temperature
        later = is_scoped(contrast)  # then bias and temperature have to wait for the best scores of the row
        bias_now = tl.where(later, 0.0, contrast.bias)
        temperature_now = tl.where(later, 1.0, temperature)
        fault, rank, best = score_range(
            logits, begin, end, LOWEST, NEG_INF, contrast, bias_now, temperature_now, scratch.row_x, MEMORY_BLOCK
        )
        tl.store(scratch.ranks + index, rank)
        tl.store(scratch.counts + index, fault)
        tl.store(scratch.best_x + index, best)
    else:
        rank, count = gather_range(
            logits, begin, end, contrast, scratch.row_tokens + begin, scratch.row_x + begin, False, BLOCK
        )
        tl.store(scratch.ranks + index, rank)
        tl.store(scratch.counts + index, count)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def finish_rows(
    clean, clean_stride, noised, noised_stride, has_noised, packed, words, words_per_row, mask_ids,
    seeds, streams, steps, step_of_all: tl.int64,
    ints, floats, plan_left,
    out_token, out_logprob, out_n_kept, out_status,
    batch, vocab_size, padded_size, slice_size, column_bits, some_uncut,
    TILE: tl.constexpr, LOG_ROOM: tl.constexpr,
):  # fmt: skip
    """Write the result of one row whose candidates fit in a tile, and to plan_left what else there is to do."""
    row = tl.program_id(0)
    logits = logits_of_row(clean, clean_stride, noised, noised_stride, vocab_size, row)
    parameters = Parameters(packed, batch, has_noised, words, words_per_row, mask_ids)
    contrast = load_contrast(parameters, row)
    if (contrast.log_beta == NEG_INF) & (some_uncut != 0):
        tl.store(plan_left + row, UNCUT)
    else:
        scratch = scratch_of_row(ints, floats, padded_size, 2**LOG_ROOM, row)
        result = result_of_row(out_token, out_logprob, out_n_kept, out_status, row)
        keys = Keys(seeds, streams, steps, step_of_all)
        state = finish_row(
            logits, contrast, parameters, keys, row, scratch, result, slice_size, column_bits, TILE, LOG_ROOM
        )
        tl.store(plan_left + row, state)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def decode_rows(
    clean, clean_stride, noised, noised_stride, has_noised, packed, words, words_per_row, mask_ids,
    seeds, streams, steps, step_of_all: tl.int64,
    ints, floats, plan_left,
    out_token, out_logprob, out_n_kept, out_status,
    batch, vocab_size, padded_size, column_bits,
    BLOCK: tl.constexpr, TILE: tl.constexpr, LOG_ROOM: tl.constexpr,
):  # fmt: skip
    """Read one whole row, then as finish_rows."""
    row = tl.program_id(0)
    logits = logits_of_row(clean, clean_stride, noised, noised_stride, vocab_size, row)
    parameters = Parameters(packed, batch, has_noised, words, words_per_row, mask_ids)
    contrast = load_contrast(parameters, row)
    scratch = scratch_of_row(ints, floats, padded_size, 2**LOG_ROOM, row)
    result = result_of_row(out_token, out_logprob, out_n_kept, out_status, row)
    rank, count = gather_range(logits, 0, vocab_size, contrast, scratch.row_tokens, scratch.row_x, True, BLOCK)
    tl.store(scratch.ranks, rank)
    tl.store(scratch.counts, count)
    tl.debug_barrier()
    keys = Keys(seeds, streams, steps, step_of_all)
    state = finish_row(
        logits, contrast, parameters, keys, row, scratch, result, padded_size, column_bits, TILE, LOG_ROOM
    )
    tl.store(plan_left + row, state)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def rest_rows(
    clean, clean_stride, noised, noised_stride, has_noised, packed, words, words_per_row, mask_ids,
    seeds, streams, steps, step_of_all: tl.int64,
    ints, floats, plan_left, plan_listed, plan_ranks,
    out_token, out_logprob, out_n_kept, out_status,
    batch, vocab_size, padded_size,
    MEMORY_BLOCK: tl.constexpr, LOG_ROOM: tl.constexpr,
):  # fmt: skip
    """Decode one row that has no result yet, in passes over memory."""
    row = tl.program_id(0)
    state = tl.load(plan_left + row)
    if state != DONE:
        parameters = Parameters(packed, batch, has_noised, words, words_per_row, mask_ids)
        rest_of_row(
            state,
            logits_of_row(clean, clean_stride, noised, noised_stride, vocab_size, row),
            load_contrast(parameters, row),
            load_sampler(parameters, row),
            load_key(Keys(seeds, streams, steps, step_of_all), row),
            scratch_of_row(ints, floats, padded_size, 2**LOG_ROOM, row),
            result_of_row(out_token, out_logprob, out_n_kept, out_status, row),
            plan_of_row(plan_left, plan_listed, plan_ranks, row),
            MEMORY_BLOCK,
            LOG_ROOM,
        )


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def race_slices(
    scores, scores_stride, tokens, packed, seeds, streams, steps, step_of_all: tl.int64,
    plan_left, plan_listed, plan_ranks,
    race_value, race_token, race_score, race_mass, race_count,
    batch, vocab_size,
    MEMORY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Let one slice of the scores of one row race, as planned; the best score of the row is the largest plan rank.

    scores and tokens [B, V] have the same stride; tokens are read only where they are a list.
    """
    row = tl.program_id(0)
    index = tl.program_id(1)
    plan = plan_of_row(plan_left, plan_listed, plan_ranks, row)
    count = tl.load(plan.left)
    best_rank = tl.max(tl.load(plan.ranks + tl.arange(0, MAX_SLICES)), 0)
    if (count > 0) & (status_of_rank(best_rank) == OK):
        share = tl.cdiv(tl.cdiv(count, tl.num_programs(1)), MEMORY_BLOCK) * MEMORY_BLOCK
        begin = index * share
        end = tl.minimum(begin + share, count)
        row64 = row.to(tl.int64)
        sampler = load_sampler(Parameters(packed, batch, None, None, None, None), row)
        key = load_key(Keys(seeds, streams, steps, step_of_all), row)
        here = row64 * scores_stride
        n_kept, mass, value, token, score = race_range(
            scores + here, tokens + here, begin, end, vocab_size, tl.load(plan.listed), value_of(best_rank), key,
            sampler, MEMORY_BLOCK,
        )  # fmt: skip
        place = row64 * MAX_SLICES + index
        tl.store(race_value + place, value)
        tl.store(race_token + place, token)
        tl.store(race_score + place, score)
        tl.store(race_mass + place, mass)
        tl.store(race_count + place, n_kept)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def merge_slices(
    plan_left, plan_listed, plan_ranks,
    race_value, race_token, race_score, race_mass, race_count,
    out_token, out_logprob, out_n_kept, out_status,
    slices,
):  # fmt: skip
    """Write the result of a row from the races of its slices."""
    row = tl.program_id(0)
    plan = plan_of_row(plan_left, plan_listed, plan_ranks, row)
    result = result_of_row(out_token, out_logprob, out_n_kept, out_status, row)
    slot = tl.arange(0, MAX_SLICES)
    if tl.load(plan.left) > 0:
        best_rank = tl.max(tl.load(plan.ranks + slot), 0)
        status = status_of_rank(best_rank)
        if status == OK:
            place = row.to(tl.int64) * MAX_SLICES + slot
            used = slot < slices
            value = tl.load(race_value + place, mask=used, other=NEG_INF)
            token = tl.load(race_token + place, mask=used, other=MAX_TOKEN)
            score = tl.load(race_score + place, mask=used, other=NEG_INF)
            mass = tl.sum(tl.load(race_mass + place, mask=used, other=0.0), 0)
            n_kept = tl.sum(tl.load(race_count + place, mask=used, other=0), 0)
            winner = tl.min(tl.where(value == tl.max(value, 0), token, MAX_TOKEN), 0)
            best_score = tl.max(tl.where(token == winner, score, NEG_INF), 0)
            write_result(result, winner, logprob_of(best_score, value_of(best_rank), mass), n_kept)
        else:
            write_failure(result, status)
