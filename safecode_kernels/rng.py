"""The counter-based generator behind every draw, in eager torch: Philox4x32-10 (Salmon et al., SC 2011).

Every back end draws these bits. The 32 random bits of a token are a pure function of (seed, stream, step, token):

    key     = (seed & 0xffffffff, seed >> 32)                      seed in [0, 2**63)
    counter = (block, stream, step & 0xffffffff, step >> 32)       stream in [0, 2**32), step in [0, 2**63)
    block   = (token >> 5) * 8 + (token & 7)
    x       = philox4x32_10(counter, key)[(token >> 3) & 3]

One call of the cipher serves four tokens that lie 8 apart, so that 8 neighbouring tokens are one vector register of one
output word. The place of the row in its batch, the batch size and the thread are no part of it.

The draw is a Gumbel race: the token with the largest score / T + gumbel wins, where gumbel = -log(E),
E = -log1p(-q), q = (x + 0.5) * 2**-32, all in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_TOKENS_PER_GROUP = 32  # 8 cipher calls of 4 words
_CALLS_PER_GROUP = 8

MAX_SEED = 2**63 - 1
MAX_STREAM = 2**32 - 1
MAX_STEP = 2**63 - 1
# No two Gumbel values of 32-bit draws are further apart: a score this far below the best can never win. (+0.1 covers
# the rounding of the subtraction that it is compared with.)
GUMBEL_SPAN = math.log(2**33) + math.log(33 * math.log(2)) + 0.1

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Return the four output words of Philox4x32-10.

    Args:
        counter: four int64 tensors of values in [0, 2**32) that broadcast together.
        key: two such tensors.

    Returns:
        Four int64 tensors of values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def _multiply(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of x * multiplier.

    The multiplier is taken 2**32 smaller, hence negative, so that the product never leaves int64; x is what the high
    word then lacks.
    """
    product = x * (multiplier - (1 << 32))
    return (product >> 32) + x, product & _MASK32


def token_bits(token_ids: Tensor, *, seeds: Tensor, stream: Tensor, step: int | Tensor) -> Tensor:
    """Return the 32 random bits of the given tokens.

    Args:
        token_ids: int64 [B, C], ids >= 0.
        seeds: int64 [B] in [0, 2**63).
        stream: int64 [B] in [0, 2**32).
        step: in [0, 2**63), one for all rows or int64 [B].

    Returns:
        int64 [B, C] in [0, 2**32).
    """
    block = (token_ids >> 5) * _CALLS_PER_GROUP + (token_ids & 7)
    words = torch.stack(_cipher(block, seeds, stream, step))
    return words.gather(0, ((token_ids >> 3) & 3).unsqueeze(0)).squeeze(0)


def row_bits(vocab_size: int, *, seeds: Tensor, stream: Tensor, step: int | Tensor) -> Tensor:
    """Return the 32 random bits of every token: token_bits for ids 0..V-1, at a quarter of the work, int64 [B, V]."""
    groups = -(-vocab_size // _TOKENS_PER_GROUP)
    block = torch.arange(groups * _CALLS_PER_GROUP, device=seeds.device).expand(len(seeds), -1)
    words = torch.stack(_cipher(block, seeds, stream, step), dim=-1)
    by_group = words.reshape(len(seeds), groups, _CALLS_PER_GROUP, 4).transpose(2, 3)
    return by_group.reshape(len(seeds), groups * _TOKENS_PER_GROUP)[:, :vocab_size]


def _cipher(block: Tensor, seeds: Tensor, stream: Tensor, step: int | Tensor) -> Words:
    seed = seeds.unsqueeze(1)
    steps = step.unsqueeze(1) if isinstance(step, Tensor) else torch.full_like(seed, step)
    counter = (block, stream.unsqueeze(1), steps & _MASK32, steps >> 32)
    return philox4x32(counter, (seed & _MASK32, seed >> 32))


def gumbel(bits: Tensor) -> Tensor:
    """Return the Gumbel value of 32 random bits: int64 in [0, 2**32) -> float64."""
    uniform = (bits.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))
