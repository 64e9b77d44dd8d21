"""The random bits of a token and its Gumbel value: the twin of safecode_kernels/rng.py, which says what and why."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...rng import GUMBEL_SPAN as _GUMBEL_SPAN

GUMBEL_SPAN = tl.constexpr(_GUMBEL_SPAN)
LN2 = tl.constexpr(0.6931471805599453)
# q >= 2 (bits / 2) 2**-32, and the exponent of a float is too large by 127; the rest covers the rounding in float32.
BOUND_OFFSET = tl.constexpr(0.6931471805599453 * (31 + 127) + 1e-3)
BOUND_SLACK = tl.constexpr(1e-6)


class Key(NamedTuple):
    """What a row's draw depends on besides the token: int64 scalars."""

    seed: Any
    stream: Any
    step: Any


class Keys(NamedTuple):
    """The keys of all rows, as pointers to int64 [B]; a step of all rows >= 0 stands for theirs."""

    seeds: Any
    streams: Any
    steps: Any
    step_of_all: Any


@triton.jit
def load_key(keys, row):
    """Return the key of a row."""
    step = tl.where(keys.step_of_all < 0, tl.load(keys.steps + row), keys.step_of_all.to(tl.int64))
    return Key(tl.load(keys.seeds + row), tl.load(keys.streams + row), step)


@triton.jit
def token_bits(token, key):
    """Return the 32 random bits of each token, uint32."""
    block = (((token >> 5) << 3) + (token & 7)).to(tl.uint32)
    same = block * 0
    stream = same + key.stream.to(tl.uint32)
    step_low = same + (key.step & 0xFFFFFFFF).to(tl.uint32)
    step_high = same + (key.step >> 32).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(key.seed, block, stream, step_low, step_high)
    word = (token >> 3) & 3
    return tl.where(word < 2, tl.where(word == 0, word0, word1), tl.where(word == 2, word2, word3))


@triton.jit
def gumbel(bits):
    """Return the Gumbel value of random bits, float64."""
    q = (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2**-32
    return -tl.log(-tl.log(1.0 - q))  # 1 - q is exact


@triton.jit
def race_bound(x, bits):
    """Return an upper bound of x + gumbel(bits) in float32, without a logarithm.

    gumbel = -log(-log1p(-q)) <= -log(q), and the bits of a float, read as an integer, bound its binary logarithm from
    below: log2(1 + f) >= f.
    """
    half = (bits >> 1).to(tl.int32).to(tl.float32)
    log2_half = half.to(tl.int32, bitcast=True).to(tl.float32) * 1.1920928955078125e-07  # 2**-23
    return (log2_half * -LN2 + BOUND_OFFSET) + x + tl.abs(x) * BOUND_SLACK
