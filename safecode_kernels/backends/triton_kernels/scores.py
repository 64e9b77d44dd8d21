"""Kernels of scores mode and of the draw from processed scores. B rows, V tokens, S slices per row.

    max_slices      grid (B, S)    best rank of each slice
    gather_slices   grid (B, S)    best biased clean logit of each slice; the scores before a bias that has a scope
    bound_rows      grid (B)       what a candidate must reach, and the score from which on the bias is given
    score_slices    grid (B, S)    scores, biased clean logits
    keep_slices     grid (B, S)    which tokens pass the cut, and the row's status

The second and third are launched only if a row may have a bias. The draw is max_slices, then race_slices and
merge_slices of step.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import best_biased_range, kth_of_row, score_range
from .numbers import (
    FAULT_INFINITE,
    INF,
    NEG_INF,
    NO_FAULT,
    OK,
    RANK_NEG_INF,
    rank_of,
    status_of_best,
    status_of_fault,
    status_of_rank,
    value_of,
)
from .places import MAX_SLICES, logits_of_row
from .rows import (
    LOG_BETA,
    Parameters,
    biased,
    biased_clean_of,
    contrasted,
    cut_floor,
    gather_floor,
    is_gathered,
    is_scoped,
    load_contrast,
    narrows,
    overflows,
)
from .shapes import NOT_SPECIALIZED


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def max_slices(logits, stride, ranks, vocab_size, slice_size, BLOCK: tl.constexpr):
    """Write the largest rank of one slice of one row to ranks int32 [B, 64]."""
    row = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    begin = index * slice_size
    end = tl.minimum(begin + slice_size, vocab_size)
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], RANK_NEG_INF, tl.int32)
    for start in range(begin, end, BLOCK):
        x = tl.load(logits + row * stride + start + lane, mask=lane < end - start, other=NEG_INF).to(tl.float32)
        best = tl.maximum(best, rank_of(x))
    tl.store(ranks + row * MAX_SLICES + index, tl.max(best, 0))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def gather_slices(
    clean, clean_stride, noised, noised_stride, has_noised, packed, words, words_per_row, mask_ids,
    ranks, scratch_x, best_gathered,
    batch, vocab_size, padded_size, slice_size,
    MEMORY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the best biased clean logit of what one slice gathers to best_gathered float32 [B, 64].

    If its bias has a scope: the scores of these tokens before it to scratch_x [B, padded V], others -inf.
    """
    row = tl.program_id(0)
    index = tl.program_id(1)
    contrast = load_contrast(Parameters(packed, batch, has_noised, words, words_per_row, mask_ids), row)
    logits = logits_of_row(clean, clean_stride, noised, noised_stride, vocab_size, row)
    floor = gather_floor(_best_of_row(ranks, row), contrast)
    begin = index * slice_size
    end = tl.minimum(begin + slice_size, vocab_size)
    if is_scoped(contrast):
        out = scratch_x + row.to(tl.int64) * padded_size
        score_range(logits, begin, end, floor, NEG_INF, contrast, 0.0, 1.0, out, MEMORY_BLOCK)
    elif narrows(contrast):
        best = best_biased_range(logits, begin, end, floor, contrast, MEMORY_BLOCK)
        tl.store(best_gathered + row.to(tl.int64) * MAX_SLICES + index, best)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def bound_rows(
    has_noised, packed, words, words_per_row, mask_ids, scratch_x, best_gathered, chosen_x, cuts, thresholds,
    batch, vocab_size, padded_size,
    MEMORY_BLOCK: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Write what candidates of one row must reach to cuts, the score that earns the bias to thresholds, float32 [B]."""
    row = tl.program_id(0)
    contrast = load_contrast(Parameters(packed, batch, has_noised, words, words_per_row, mask_ids), row)
    threshold = tl.full([], NEG_INF, tl.float32)
    cut = tl.full([], NEG_INF, tl.float32)
    row64 = row.to(tl.int64)
    if is_scoped(contrast):
        x = scratch_x + row64 * padded_size
        best = tl.full([], INF, tl.float32)  # nothing is better, and more is not known
        threshold = kth_of_row(x, vocab_size, contrast.scope, best, chosen_x + row64 * ROOM, MEMORY_BLOCK, ROOM)
    elif narrows(contrast):
        slot = row64 * MAX_SLICES + tl.arange(0, MAX_SLICES)
        cut = cut_floor(tl.max(tl.load(best_gathered + slot), 0), contrast.log_beta)
    tl.store(thresholds + row, threshold)
    tl.store(cuts + row, cut)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def score_slices(
    clean, clean_stride, noised, noised_stride, has_noised, packed, words, words_per_row, mask_ids,
    ranks, cuts, thresholds, out_scores, out_biased_clean, faults, best_scores, best_biased,
    batch, vocab_size, slice_size,
    MEMORY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write scores and biased clean logits of one slice, and per slice their fault and the best of both."""
    row = tl.program_id(0)
    index = tl.program_id(1)
    logits = logits_of_row(clean, clean_stride, noised, noised_stride, vocab_size, row)
    contrast = load_contrast(Parameters(packed, batch, has_noised, words, words_per_row, mask_ids), row)
    floor = gather_floor(_best_of_row(ranks, row), contrast)
    cut = tl.load(cuts + row)
    threshold = tl.load(thresholds + row)
    out = row.to(tl.int64) * vocab_size
    begin = index * slice_size
    end = tl.minimum(begin + slice_size, vocab_size)
    lane = tl.arange(0, MEMORY_BLOCK)
    fault = tl.full([MEMORY_BLOCK], NO_FAULT, tl.int32)
    best_s = tl.full([MEMORY_BLOCK], NEG_INF, tl.float32)
    best = tl.full([MEMORY_BLOCK], NEG_INF, tl.float32)
    for start in range(begin, end, MEMORY_BLOCK):
        inside = lane < end - start
        z = tl.load(logits.clean + start + lane, mask=inside, other=NEG_INF).to(tl.float32)
        candidate = is_gathered(z, floor, contrast)
        if cut > NEG_INF:
            candidate = candidate & (biased_clean_of(z, start + lane, candidate, contrast) >= cut)
        s, found = contrasted(z, logits.noised + start + lane, inside, candidate, contrast)
        s, biased_clean = biased(s, z, start + lane, inside, threshold, contrast.bias, contrast)
        found = tl.maximum(found, tl.where(overflows(s, candidate), FAULT_INFINITE, NO_FAULT))
        fault = tl.maximum(fault, found)
        s = tl.where(s < INF, s, NEG_INF)
        best_s = tl.maximum(best_s, s)
        best = tl.maximum(best, tl.where(s > NEG_INF, biased_clean, NEG_INF))
        tl.store(out_scores + out + start + lane, s, mask=inside)
        tl.store(out_biased_clean + out + start + lane, biased_clean, mask=inside)
    place = row.to(tl.int64) * MAX_SLICES + index
    tl.store(faults + place, tl.max(fault, 0))
    tl.store(best_scores + place, tl.max(best_s, 0))
    tl.store(best_biased + place, tl.max(best, 0))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def keep_slices(
    packed, ranks, faults, best_scores, best_biased, out_scores, out_biased_clean, out_keep, out_status,
    batch, vocab_size, slice_size,
    MEMORY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write which tokens of one slice pass the cut; a row that failed is emptied."""
    row = tl.program_id(0)
    index = tl.program_id(1)
    slot = row.to(tl.int64) * MAX_SLICES + tl.arange(0, MAX_SLICES)
    status = status_of_rank(tl.max(tl.load(ranks + slot), 0))
    status = tl.where(status == OK, status_of_fault(tl.max(tl.load(faults + slot), 0)), status)
    failed = status != OK
    status = tl.where(failed, status, status_of_best(tl.max(tl.load(best_scores + slot), 0)))
    log_beta = tl.load(packed + row + LOG_BETA * batch).to(tl.float32)
    floor = cut_floor(tl.max(tl.load(best_biased + slot), 0), log_beta)
    place = row.to(tl.int64) * vocab_size
    begin = index * slice_size
    end = tl.minimum(begin + slice_size, vocab_size)
    lane = tl.arange(0, MEMORY_BLOCK)
    for start in range(begin, end, MEMORY_BLOCK):
        inside = lane < end - start
        here = place + start + lane
        if failed:
            tl.store(out_scores + here, NEG_INF, mask=inside)
            tl.store(out_biased_clean + here, NEG_INF, mask=inside)
            tl.store(out_keep + here, tl.full([MEMORY_BLOCK], False, tl.int1), mask=inside)
        else:
            s = tl.load(out_scores + here, mask=inside, other=NEG_INF)
            b = tl.load(out_biased_clean + here, mask=inside, other=NEG_INF)
            tl.store(out_keep + here, (s > NEG_INF) & (b >= floor), mask=inside)
    if index == 0:
        tl.store(out_status + row, status)


@triton.jit
def _best_of_row(ranks, row):
    """Return the best clean logit of a row, NaN if one is NaN."""
    slot = row.to(tl.int64) * MAX_SLICES + tl.arange(0, MAX_SLICES)
    return value_of(tl.max(tl.load(ranks + slot), 0))
