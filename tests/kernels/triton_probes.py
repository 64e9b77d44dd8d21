"""Kernels that show what functions of the back end return; imported only where Triton is."""

from __future__ import annotations

import triton
import triton.language as tl

from safecode_kernels.backends.triton_kernels.draws import Keys, gumbel, load_key, race_bound, token_bits
from safecode_kernels.backends.triton_kernels.tile import pack, sort_descending, unpack


@triton.jit
def bits_of_tokens(tokens, seeds, streams, steps, step_of_all, out, N: tl.constexpr):
    """Write the bits of tokens int32 [N] under the key of each row to out int64 [B, N]."""
    row = tl.program_id(0)
    i = tl.arange(0, N)
    bits = token_bits(tl.load(tokens + i), load_key(Keys(seeds, streams, steps, step_of_all), row))
    tl.store(out + row * N + i, bits.to(tl.int64))


@triton.jit
def gumbel_of_bits(bits, out_value, out_bound, N: tl.constexpr):
    """Write gumbel float64 and its bound float32 of bits int64 [N]."""
    i = tl.arange(0, N)
    word = tl.load(bits + i).to(tl.uint32)
    tl.store(out_value + i, gumbel(word))
    tl.store(out_bound + i, race_bound(tl.full([N], 0.0, tl.float32), word))


@triton.jit
def order_of(x, tokens, out_x, out_tokens, LOG_N: tl.constexpr):
    """Write x float32 and tokens int32 in the order of the filters."""
    i = tl.arange(0, 2**LOG_N)
    ordered_x, ordered_tokens = unpack(sort_descending(pack(tl.load(x + i), tl.load(tokens + i)), LOG_N))
    tl.store(out_x + i, ordered_x)
    tl.store(out_tokens + i, ordered_tokens)
