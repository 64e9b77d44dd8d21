"""Any number of tokens, in passes over memory: rows whose candidates do not fit in registers, and rows without a cut.

`values` float32 holds a score per token, -inf = excluded. keep_above may shorten it to a list: then `tokens` int32
holds whose scores they are, in ascending order, and `listed` is not 0. A pass that writes ends with a barrier: what one
thread of the program has written, another one reads in the next pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .draws import gumbel, race_bound, token_bits
from .numbers import (
    FAULT_INFINITE,
    LOWEST,
    MAX_TOKEN,
    NEG_INF,
    NO_FAULT,
    RANK_NEG_INF,
    rank_of,
    value_of,
)
from .rows import biased, biased_clean_of, contrasted, cut_floor, is_gathered, overflows
from .tile import kth_best


@triton.jit
def best_biased_range(logits, begin, end, floor, contrast, BLOCK: tl.constexpr):
    """Return the best clean logit of what is gathered among [begin, end), with all of the mask biased."""
    best = tl.full([BLOCK], NEG_INF, tl.float32)
    lane = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        z = tl.load(logits.clean + start + lane, mask=lane < end - start, other=NEG_INF).to(tl.float32)
        gathered = is_gathered(z, floor, contrast)
        best = tl.maximum(best, tl.where(gathered, biased_clean_of(z, start + lane, gathered, contrast), NEG_INF))
    return tl.max(best, 0)


@triton.jit
def score_range(logits, begin, end, floor, cut, contrast, bias, temperature, values, BLOCK: tl.constexpr):
    """Write (contrast + bias) / temperature of the tokens [begin, end), -inf if no candidate: all of x but the cut.

    Candidates reach the floor, and with all of the mask biased `cut`. Return fault, best clean rank, best x.
    """
    fault = tl.full([BLOCK], NO_FAULT, tl.int32)
    best_rank = tl.full([BLOCK], RANK_NEG_INF, tl.int32)
    best_x = tl.full([BLOCK], NEG_INF, tl.float32)
    lane = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        inside = lane < end - start
        z = tl.load(logits.clean + start + lane, mask=inside, other=NEG_INF).to(tl.float32)
        best_rank = tl.maximum(best_rank, rank_of(z))
        candidate = is_gathered(z, floor, contrast)
        if cut > NEG_INF:
            candidate = candidate & (biased_clean_of(z, start + lane, candidate, contrast) >= cut)
        s, found = contrasted(z, logits.noised + start + lane, inside, candidate, contrast)
        s, _biased_clean = biased(s, z, start + lane, inside, NEG_INF, bias, contrast)
        found = tl.maximum(found, tl.where(overflows(s, candidate), FAULT_INFINITE, NO_FAULT))
        fault = tl.maximum(fault, found)
        x = tl.where(candidate, tl.div_rn(s, temperature), NEG_INF)
        best_x = tl.maximum(best_x, x)
        tl.store(values + start + lane, x, mask=inside)
    return tl.max(fault, 0), tl.max(best_rank, 0), tl.max(best_x, 0)


@triton.jit
def bias_range(logits, begin, end, threshold, contrast, values, BLOCK: tl.constexpr):
    """Return the fault of the scores once they are biased, and the best biased clean logit among those allowed."""
    fault = tl.full([BLOCK], NO_FAULT, tl.int32)
    best = tl.full([BLOCK], NEG_INF, tl.float32)
    lane = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        inside = lane < end - start
        s = tl.load(values + start + lane, mask=inside, other=NEG_INF)
        z = tl.load(logits.clean + start + lane, mask=inside, other=NEG_INF).to(tl.float32)
        s, biased_clean = biased(s, z, start + lane, inside, threshold, contrast.bias, contrast)
        fault = tl.maximum(fault, tl.where(overflows(s, inside), FAULT_INFINITE, NO_FAULT))
        best = tl.maximum(best, tl.where(s > NEG_INF, biased_clean, NEG_INF))
    return tl.max(fault, 0), tl.max(best, 0)


@triton.jit
def cut_range(logits, begin, end, threshold, best, contrast, temperature, values, BLOCK: tl.constexpr):
    """Turn scores before the bias into x after bias, cut and temperature; return the best x."""
    best_x = tl.full([BLOCK], NEG_INF, tl.float32)
    lane = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        inside = lane < end - start
        s = tl.load(values + start + lane, mask=inside, other=NEG_INF)
        z = tl.load(logits.clean + start + lane, mask=inside, other=NEG_INF).to(tl.float32)
        s, biased_clean = biased(s, z, start + lane, inside, threshold, contrast.bias, contrast)
        keep = (s > NEG_INF) & (biased_clean >= cut_floor(best, contrast.log_beta))
        x = tl.where(keep, tl.div_rn(s, temperature), NEG_INF)
        best_x = tl.maximum(best_x, x)
        tl.store(values + start + lane, x, mask=inside)
    tl.debug_barrier()
    return tl.max(best_x, 0)


@triton.jit
def largest_reaching(values, count, BY_MASS: tl.constexpr, target, lowest, best, BLOCK: tl.constexpr):
    """Return the largest t such that the tokens with x >= t reach the target, and what those with x > t reach.

    They are counted, or weighed with exp(x - best) in float64. The tokens with x >= lowest reach the target; best is
    not below any x, for the weights it is the largest.
    """
    low = rank_of(lowest).to(tl.int64)
    high = rank_of(best).to(tl.int64) + 1
    above = tl.full([], 0.0, tl.float64)
    lane = tl.arange(0, BLOCK)
    while high - low > 1:
        middle = (low + high) >> 1
        t = value_of(middle.to(tl.int32))
        reached = tl.full([BLOCK], 0.0, tl.float64)
        for start in range(0, count, BLOCK):
            x = tl.load(values + start + lane, mask=lane < count - start, other=NEG_INF)
            weight = tl.full([BLOCK], 1.0, tl.float64)
            if BY_MASS:
                weight = tl.exp(x.to(tl.float64) - best.to(tl.float64))
            reached += tl.where(x >= t, weight, 0.0)
        total = tl.sum(reached, 0)
        enough = total >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        above = tl.where(enough, above, total)
    return value_of(low.to(tl.int32)), above


@triton.jit
def kth_of_row(values, count, k, best, chosen_x, BLOCK: tl.constexpr, ROOM: tl.constexpr):
    """Return the K-th largest x, -inf if there are fewer finite ones; best is not below any.

    The K-th largest of the lanes' maxima is not above it, and few tokens reach that: these are looked at alone.
    """
    lane = tl.arange(0, BLOCK)
    lanes = tl.full([BLOCK], NEG_INF, tl.float32)
    for start in range(0, count, BLOCK):
        lanes = tl.maximum(lanes, tl.load(values + start + lane, mask=lane < count - start, other=NEG_INF))
    bound = tl.maximum(kth_best(lanes, k), LOWEST)
    found = tl.full([], 0, tl.int32)
    for start in range(0, count, BLOCK):
        x = tl.load(values + start + lane, mask=lane < count - start, other=NEG_INF)
        hit = x >= bound
        more = tl.sum(hit.to(tl.int32), 0)
        if more > 0:
            position = found + tl.cumsum(hit.to(tl.int32), 0) - 1
            tl.store(chosen_x + position, x, mask=hit & (position < ROOM))
            found += more
    tl.debug_barrier()
    kth = tl.full([], NEG_INF, tl.float32)
    if found > ROOM:
        kth, _above = largest_reaching(values, count, False, k.to(tl.float64), bound, best, BLOCK)
    elif found >= k:
        i = tl.arange(0, ROOM)
        kth = kth_best(tl.load(chosen_x + i, mask=i < found, other=NEG_INF), k)
    tl.debug_barrier()
    return kth


@triton.jit
def keep_above(values, tokens, count, listed, t, ties, BLOCK: tl.constexpr):
    """Shorten the row to a list of what is above t and the first `ties` that equal t; return its length.

    In place: a block is read before anything is written, and never behind what is written.
    """
    lane = tl.arange(0, BLOCK)
    kept = tl.full([], 0, tl.int32)
    met = tl.full([], 0, tl.int32)
    for start in range(0, count, BLOCK):
        inside = lane < count - start
        x = tl.load(values + start + lane, mask=inside, other=NEG_INF)
        token = start + lane
        if listed != 0:
            token = tl.load(tokens + start + lane, mask=inside, other=0)
        tie = inside & (x == t)
        nth_tie = met + tl.cumsum(tie.to(tl.int32), 0)
        keep = inside & ((x > t) | (tie & (nth_tie <= ties)))
        met += tl.sum(tie.to(tl.int32), 0)
        position = kept + tl.cumsum(keep.to(tl.int32), 0) - 1
        kept += tl.sum(keep.to(tl.int32), 0)
        tl.debug_barrier()
        tl.store(values + position, x, mask=keep)
        tl.store(tokens + position, token, mask=keep)
    tl.debug_barrier()
    return kept


@triton.jit
def mass_of_row(values, count, best, BLOCK: tl.constexpr):
    """Return the sum of exp(x - best) in float64."""
    lane = tl.arange(0, BLOCK)
    mass = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(0, count, BLOCK):
        x = tl.load(values + start + lane, mask=lane < count - start, other=NEG_INF)
        mass += tl.exp(x.to(tl.float64) - best.to(tl.float64))
    return tl.sum(mass, 0)


@triton.jit
def filter_row(values, tokens, count, best, sampler, chosen_x, BLOCK: tl.constexpr, ROOM: tl.constexpr):
    """Apply top_k, and top_p to what does not fit in a tile, in memory; best is the largest x.

    Return the count and whether it is a list, whether top_p is still to be applied to it, which then fits in a tile,
    and the mass of all tokens if some that top_p would drop are gone already, else 0.
    """
    listed = tl.full([], 0, tl.int32)
    mass = tl.full([], 0.0, tl.float64)
    if sampler.top_k > 0:
        kth = kth_of_row(values, count, sampler.top_k, best, chosen_x, BLOCK, ROOM)
        count = keep_above(values, tokens, count, listed, tl.maximum(kth, LOWEST), MAX_TOKEN, BLOCK)
        listed += 1
    needs_top_p = sampler.top_p < 1
    if needs_top_p & ((listed == 0) | (count > ROOM)):
        mass = mass_of_row(values, count, best, BLOCK)
        # All tokens below this weight together hold less than half of 1 - top_p: none can be kept.
        hopeless = tl.log(0.5 * (1 - sampler.top_p) / count * mass) + best
        count = keep_above(values, tokens, count, listed, tl.maximum(hopeless.to(tl.float32), LOWEST), MAX_TOKEN, BLOCK)
        listed += 1
        if count > ROOM:
            target = sampler.top_p * mass
            lowest = tl.full([], LOWEST, tl.float32)
            t, above = largest_reaching(values, count, True, target, lowest, best, BLOCK)
            ties = tl.ceil((target - above) / tl.exp(t.to(tl.float64) - best.to(tl.float64)))
            count = keep_above(values, tokens, count, listed, t, tl.minimum(ties, count).to(tl.int32), BLOCK)
            needs_top_p &= False
    return count, listed, needs_top_p, mass


@triton.jit
def race_range(values, tokens, begin, end, size, listed, best, key, sampler, BLOCK: tl.constexpr):
    """Apply min_p to the tokens at [begin, end) and let them race; return count, mass, best value, token, its score.

    Loads are bounded by `size`, the room there is: unlike `end` it may be known to be a multiple of 16, which makes
    them wide. The float64 logarithms are taken only where an upper bound in float32 says that the block may hold a new
    best.
    """
    lane = tl.arange(0, BLOCK)
    count = tl.full([BLOCK], 0, tl.int32)
    mass = tl.full([BLOCK], 0.0, tl.float32)
    best_value = tl.full([], NEG_INF, tl.float64)
    winner = tl.full([], MAX_TOKEN, tl.int32)
    score = tl.full([], NEG_INF, tl.float32)
    floor = tl.maximum(best + sampler.log_min_p, LOWEST)
    for start in range(begin, end, BLOCK):
        x = tl.load(values + start + lane, mask=lane < size - start, other=NEG_INF).to(tl.float32)
        token = start + lane
        if listed != 0:
            token = tl.load(tokens + start + lane, mask=lane < size - start, other=0)
        keep = (lane < end - start) & (x >= floor)
        count += keep.to(tl.int32)
        mass += tl.where(keep, tl.exp(x - best), 0.0)
        bits = tl.full([BLOCK], 0, tl.uint32)
        bound = x
        if sampler.greedy == 0:
            bits = token_bits(token, key)
            bound = race_bound(x, bits)
        if tl.max(tl.where(keep, bound, NEG_INF), 0).to(tl.float64) > best_value:
            value = x.to(tl.float64)
            if sampler.greedy == 0:
                value += gumbel(bits)
            value = tl.where(keep, value, NEG_INF)
            block_best = tl.max(value, 0)
            if block_best > best_value:  # a tie goes to the earlier block, which has the lower tokens
                best_value = block_best
                winner = tl.min(tl.where(keep & (value == block_best), token, MAX_TOKEN), 0)
                score = tl.max(tl.where(keep & (token == winner), x, NEG_INF), 0)
    return tl.sum(count, 0), tl.sum(mass, 0), best_value, winner, score
