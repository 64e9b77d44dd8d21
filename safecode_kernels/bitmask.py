"""Sets of tokens as int32 words: bit i of word w stands for token 32 * w + i."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from .errors import ArgumentError, ArgumentTypeError

WORD_BITS = 32  # int32 and not uint32: torch has no shifts for uint32 on the CPU


def words_per_row(vocab_size: int) -> int:
    """Return how many words hold one bit per token: ceil(vocab_size / 32)."""
    return -(-vocab_size // WORD_BITS)


def pack_mask(token_ids: Iterable[int] | Tensor, vocab_size: int) -> Tensor:
    """Return one set of tokens as a mask of one row, int32 [1, ceil(V / 32)], on the CPU.

    Args:
        token_ids: ids in [0, vocab_size), any order, duplicates allowed, may be empty.
        vocab_size: V >= 1.
    """
    return pack_masks([token_ids], vocab_size)


def pack_masks(token_id_sets: Sequence[Iterable[int] | Tensor], vocab_size: int) -> Tensor:
    """Return M sets of tokens as int32 words [M, ceil(V / 32)], on the CPU.

    Args:
        token_id_sets: M sets of ids in [0, vocab_size); each may be empty.
        vocab_size: V >= 1.

    Raises:
        ArgumentError: an id is outside the vocabulary.
    """
    if vocab_size < 1:
        raise ArgumentError(f"vocab_size={vocab_size} is out of range; legal: an integer >= 1")
    packed = [_pack_row(ids, vocab_size) for ids in token_id_sets]
    return torch.tensor(packed, dtype=torch.int32).reshape(len(packed), words_per_row(vocab_size))


def _pack_row(token_ids: Iterable[int] | Tensor, vocab_size: int) -> list[int]:
    ids = token_ids.flatten().tolist() if isinstance(token_ids, Tensor) else list(token_ids)
    words = [0] * words_per_row(vocab_size)
    for item in ids:
        if not isinstance(item, Integral) or isinstance(item, bool):
            raise ArgumentTypeError(f"token id {item!r} is a {type(item).__name__}; legal: an integer")
        token = int(item)
        if not 0 <= token < vocab_size:
            raise ArgumentError(f"token id {token} is out of range; legal: an integer in [0, {vocab_size})")
        words[token // WORD_BITS] |= 1 << (token % WORD_BITS)
    return [word - (1 << WORD_BITS) if word >> (WORD_BITS - 1) else word for word in words]


def unpack_mask(words: Tensor, vocab_size: int) -> Tensor:
    """Return a mask as booleans.

    Args:
        words: int32 [M, ceil(V / 32)], any device.
        vocab_size: V; bits at and beyond it are ignored.

    Returns:
        bool [M, V] on the same device.
    """
    bits = torch.arange(WORD_BITS, device=words.device, dtype=torch.int32)
    flags = (words.unsqueeze(-1) >> bits) & 1
    return flags.flatten(1)[:, :vocab_size].bool()


def contains(words: Tensor, token_ids: Tensor) -> Tensor:
    """Return whether each row's mask has the tokens: words int32 [B, W], token_ids int64 [B, C] -> bool [B, C]."""
    word = words.gather(1, token_ids // WORD_BITS)
    return ((word >> (token_ids % WORD_BITS).to(torch.int32)) & 1).bool()
