"""One pass over a clean row that keeps the few tokens that can pass the cut, and their scores.

The threshold follows the largest logit met so far and only rises, so what is dropped stays dropped; what is kept too
early is dropped at the end, and so is what only a bias could have lifted over the cut and does not: the scan reads no
mask. The noised row is read at the tokens that are left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import FAULT_INFINITE, NEG_INF, NO_FAULT, RANK_NEG_INF, rank_of, value_of
from .rows import (
    biased,
    biased_clean_of,
    contrasted,
    cut_floor,
    gather_floor,
    is_gathered,
    is_scoped,
    narrows,
    overflows,
)
from .tile import kth_best


@triton.jit
def gather_range(logits, begin, end, contrast, tokens, values, LOADS_AHEAD: tl.constexpr, BLOCK: tl.constexpr):
    """Write the candidates among the tokens [begin, end) to tokens and values; return the best rank and their number.

    tokens int32 and values float32 have room for all of the range. LOADS_AHEAD: the next block is on its way while one
    is looked through, which takes registers and helps where few programs run.
    """
    best_rank = tl.full([], RANK_NEG_INF, tl.int32)
    count = tl.full([], 0, tl.int32)
    lane = tl.arange(0, BLOCK)
    if LOADS_AHEAD:
        following = tl.load(logits.clean + begin + lane, mask=lane < end - begin, other=NEG_INF)
    for start in range(begin, end, BLOCK):
        if LOADS_AHEAD:
            z = following.to(tl.float32)
            ahead = start + BLOCK
            following = tl.load(logits.clean + ahead + lane, mask=lane < end - ahead, other=NEG_INF)
        else:
            z = tl.load(logits.clean + start + lane, mask=lane < end - start, other=NEG_INF).to(tl.float32)
        best_rank = tl.maximum(best_rank, tl.max(rank_of(z), 0))
        # Beyond the end z is -inf, which is never gathered.
        keep = is_gathered(z, gather_floor(value_of(best_rank), contrast), contrast)
        more = tl.sum(keep.to(tl.int32), 0)
        if more > 0:
            position = count + tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(tokens + position, start + lane, mask=keep)
            tl.store(values + position, z, mask=keep)
            count += more
    return best_rank, count


@triton.jit
def collect(scratch, most, slice_size, column_bits, floor, contrast, TILE: tl.constexpr, ROOM: tl.constexpr):
    """Move the candidates among what the slices have gathered to the chosen ones; return their number.

    Slice i has its counts[i] tokens from i * slice_size on. A tile takes 2**column_bits of each slice at a time,
    and no slice that matters has more than `most`. Beyond ROOM they are counted but not written.
    """
    chosen = tl.full([], 0, tl.int32)
    i = tl.arange(0, TILE)
    slice_index = i >> column_bits
    column = i & ((1 << column_bits) - 1)
    count = tl.load(scratch.counts + slice_index)
    place = slice_index.to(tl.int64) * slice_size + column
    cut = tl.full([], NEG_INF, tl.float32)
    if narrows(contrast):
        best = tl.full([TILE], NEG_INF, tl.float32)
        for first in range(0, most, 1 << column_bits):
            inside = column < count - first
            z = tl.load(scratch.row_x + place + first, mask=inside, other=NEG_INF)
            keep = inside & is_gathered(z, floor, contrast)
            token = tl.load(scratch.row_tokens + place + first, mask=keep, other=0)
            best = tl.maximum(best, tl.where(keep, biased_clean_of(z, token, keep, contrast), NEG_INF))
        cut = cut_floor(tl.max(best, 0), contrast.log_beta)
    for first in range(0, most, 1 << column_bits):
        inside = column < count - first
        z = tl.load(scratch.row_x + place + first, mask=inside, other=NEG_INF)
        keep = inside & is_gathered(z, floor, contrast)
        token = tl.load(scratch.row_tokens + place + first, mask=keep, other=0)
        if narrows(contrast):
            keep = keep & (biased_clean_of(z, token, keep, contrast) >= cut)
        position = chosen + tl.cumsum(keep.to(tl.int32), 0) - 1
        fits = keep & (position < ROOM)
        tl.store(scratch.chosen_tokens + position, token, mask=fits)
        tl.store(scratch.chosen_x + position, z, mask=fits)
        chosen += tl.sum(keep.to(tl.int32), 0)
    tl.debug_barrier()  # what one thread has written, another one reads
    return chosen


@triton.jit
def score_chosen(count, logits, contrast, temperature, scratch, ROOM: tl.constexpr):
    """Return x after cut and temperature (-inf = excluded), the tokens, and the row's fault; count <= ROOM."""
    i = tl.arange(0, ROOM)
    inside = i < count
    token = tl.load(scratch.chosen_tokens + i, mask=inside, other=0)
    z = tl.load(scratch.chosen_x + i, mask=inside, other=NEG_INF)
    s, fault = contrasted(z, logits.noised + token, inside, inside, contrast)
    threshold = tl.full([], NEG_INF, tl.float32)
    if is_scoped(contrast):
        threshold = kth_best(tl.where(inside, s, NEG_INF), contrast.scope)
    s, biased_clean = biased(s, z, token, inside, threshold, contrast.bias, contrast)
    fault = tl.maximum(fault, tl.where(overflows(s, inside), FAULT_INFINITE, NO_FAULT))
    allowed = inside & (s > NEG_INF)
    best = tl.max(tl.where(allowed, biased_clean, NEG_INF), 0)
    keep = allowed & (biased_clean >= cut_floor(best, contrast.log_beta))
    return tl.where(keep, tl.div_rn(s, temperature), NEG_INF), token, tl.max(fault, 0)
