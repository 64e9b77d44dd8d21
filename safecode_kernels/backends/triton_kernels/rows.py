"""Parameters of a row, and the arithmetic of some of its tokens: gathering, contrast, bias. See csrc/row_math.h.

z is a clean logit, n a noised one, s the score, all float32 blocks of the same shape.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...contract import PACKED_FIELDS
from .numbers import FAULT_INFINITE, FAULT_NAN, INF, LOWEST, NEG_INF, NO_FAULT

WEIGHT = tl.constexpr(PACKED_FIELDS.index("weight"))
ONE_PLUS_WEIGHT = tl.constexpr(PACKED_FIELDS.index("one_plus_weight"))
BIAS = tl.constexpr(PACKED_FIELDS.index("bias"))
SCOPE = tl.constexpr(PACKED_FIELDS.index("scope"))
LOG_BETA = tl.constexpr(PACKED_FIELDS.index("log_beta"))
TEMPERATURE = tl.constexpr(PACKED_FIELDS.index("temperature"))
TOP_K = tl.constexpr(PACKED_FIELDS.index("top_k"))
TOP_P = tl.constexpr(PACKED_FIELDS.index("top_p"))
LOG_MIN_P = tl.constexpr(PACKED_FIELDS.index("log_min_p"))
GREEDY = tl.constexpr(PACKED_FIELDS.index("greedy"))


class Parameters(NamedTuple):
    """Parameters of all rows, as pointers."""

    packed: Any  # float64 [10, B], see contract.PACKED_FIELDS
    batch: Any
    has_noised: Any  # whether there are noised logits
    words: Any  # int32 [M, words_per_row], refusal masks
    words_per_row: Any
    mask_ids: Any  # int64 [B], -1 = none


class Contrast(NamedTuple):
    """Parameters that make the scores and the cut: float32 scalars, words = pointer to the row's mask."""

    weight: Any
    one_plus_weight: Any
    bias: Any
    scope: Any  # int32
    log_beta: Any
    words: Any
    uses_noised: Any  # int32, 0 or 1
    uses_bias: Any


class Sampler(NamedTuple):
    """Parameters of the filters and the draw: float32 scalars, top_k and greedy int32, top_p float64."""

    temperature: Any
    top_k: Any
    top_p: Any
    log_min_p: Any
    greedy: Any


@triton.jit
def load_contrast(parameters, row):
    """Return a row's parameters of the scores: a row without a mask has no bias, without noised logits no contrast."""
    batch = parameters.batch
    field = parameters.packed + row
    mask_id = tl.load(parameters.mask_ids + row)
    weight = tl.load(field + WEIGHT * batch).to(tl.float32)
    bias = tl.load(field + BIAS * batch).to(tl.float32)
    return Contrast(
        weight,
        tl.load(field + ONE_PLUS_WEIGHT * batch).to(tl.float32),
        tl.where(mask_id >= 0, bias, 0.0),
        tl.load(field + SCOPE * batch).to(tl.int32),
        tl.load(field + LOG_BETA * batch).to(tl.float32),
        parameters.words + tl.maximum(mask_id, 0) * parameters.words_per_row,
        tl.where((parameters.has_noised != 0) & (weight != 0), 1, 0),
        tl.where((mask_id >= 0) & (bias != 0), 1, 0),
    )


@triton.jit
def load_sampler(parameters, row):
    """Return a row's parameters of the filters."""
    batch = parameters.batch
    field = parameters.packed + row
    return Sampler(
        tl.load(field + TEMPERATURE * batch).to(tl.float32),
        tl.load(field + TOP_K * batch).to(tl.int32),
        tl.load(field + TOP_P * batch),
        tl.load(field + LOG_MIN_P * batch).to(tl.float32),
        tl.load(field + GREEDY * batch).to(tl.int32),
    )


@triton.jit
def gather_floor(best, contrast):
    """Return what z + max(bias, 0) must reach to be gathered, given the best clean logit; NaN if that is NaN.

    Each sign of the bias stands on the side where the cut adds it again, and rounding is monotone: no token that passes
    the cut is missed by an ulp. At least the lowest finite number, so that -inf is never gathered.
    """
    floor = (best + tl.minimum(contrast.bias, 0.0)) + contrast.log_beta
    return tl.where(floor < LOWEST, LOWEST, floor)


@triton.jit
def is_gathered(z, floor, contrast):
    """Return which tokens can pass the cut."""
    return z + tl.maximum(contrast.bias, 0.0) >= floor


@triton.jit
def cut_floor(best, log_beta):
    """Return what a biased clean logit must reach to pass the cut, given the best one; with beta 0 nothing."""
    return tl.where(log_beta == NEG_INF, NEG_INF, best + log_beta)


@triton.jit
def biased_clean_of(z, token, inside, contrast):
    """Return z with the bias added to all tokens of the row's mask."""
    _s, biased_clean = biased(z, z, token, inside, NEG_INF, contrast.bias, contrast)
    return biased_clean


@triton.jit
def contrasted(z, noised, inside, gathered, contrast):
    """Return (1 + a) z - a n, both products rounded, and what is wrong with the tokens that are gathered.

    `noised` are the addresses of n. Where n cannot be used it counts as z: it is -inf, or it is not finite and the
    token is no candidate. A score that overflows excludes its token.
    """
    s = z
    fault = tl.full(z.shape, NO_FAULT, tl.int32)
    if contrast.uses_noised != 0:
        n = tl.load(noised, mask=inside, other=0).to(tl.float32)
        is_nan, is_infinite = n != n, n == INF
        unusable = (n == NEG_INF) | ((is_nan | is_infinite) & ~gathered)
        scaled = contrast.one_plus_weight * z
        s = tl.where(scaled > NEG_INF, scaled - contrast.weight * tl.where(unusable, z, n), NEG_INF)
        fault = tl.where(gathered & (is_infinite | ~(s < INF)), FAULT_INFINITE, fault)
        fault = tl.where(gathered & is_nan, FAULT_NAN, fault)
        # Before the bias: whether a token gets it must not depend on how its score left the numbers.
        s = tl.where(s < INF, s, NEG_INF)
    return s, fault


@triton.jit
def overflows(s, gathered):
    """Return which scores of candidates are +inf or NaN."""
    return gathered & ~(s < INF)


@triton.jit
def biased(s, z, token, inside, threshold, bias, contrast):
    """Return s and z with `bias` added to the tokens of the row's mask whose score is at least `threshold`."""
    if contrast.uses_bias != 0:
        word = tl.load(contrast.words + (token >> 5), mask=inside, other=0)
        refusal = ((word >> (token & 31)) & 1) != 0
        shift = tl.where(refusal & (s >= threshold), bias, 0.0)
        s += shift
        z += shift
    return s, z


@triton.jit
def is_scoped(contrast):
    """Return whether the bias needs to know the best scores of the row first."""
    return (contrast.uses_bias != 0) & (contrast.scope > 0)


@triton.jit
def narrows(contrast):
    """Return whether fewer tokens are candidates than are gathered: it is known who is biased, and it matters."""
    return (contrast.uses_bias != 0) & (contrast.scope == 0) & (contrast.log_beta != NEG_INF)
