"""Packing of token sets."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import safecode_kernels as sk
from safecode_kernels import bitmask


@given(data=st.data(), vocab_size=st.integers(1, 200), as_tensor=st.booleans())
def test_pack_masks_round_trip(data, vocab_size, as_tensor):
    sets = data.draw(st.lists(st.lists(st.integers(0, vocab_size - 1), max_size=60), min_size=1, max_size=4))
    words = sk.pack_masks([torch.tensor(ids, dtype=torch.int64) if as_tensor else ids for ids in sets], vocab_size)
    assert words.dtype == torch.int32
    assert words.shape == (len(sets), -(-vocab_size // 32))
    flags = sk.unpack_mask(words, vocab_size)
    assert flags.shape == (len(sets), vocab_size)
    assert [set(row.nonzero().flatten().tolist()) for row in flags] == [set(ids) for ids in sets]
    every = torch.arange(vocab_size).expand(len(sets), -1)
    assert bitmask.contains(words, every).equal(flags)


def test_pack_mask_bit_layout():
    assert sk.pack_mask([0], 40).tolist() == [[1, 0]]
    assert sk.pack_mask([31], 40).tolist() == [[-(2**31), 0]]
    assert sk.pack_mask([32, 39, 39], 40).tolist() == [[0, 0b10000001]]
    assert sk.pack_mask([], 40).tolist() == [[0, 0]]
    assert sk.pack_mask(range(64), 64).tolist() == [[-1, -1]]


def test_unpack_mask_ignores_bits_beyond_the_vocabulary():
    assert sk.unpack_mask(torch.tensor([[-1]], dtype=torch.int32), 5).tolist() == [[True] * 5]


def test_unpack_mask_last_bit_of_a_large_vocabulary():
    flags = sk.unpack_mask(sk.pack_mask([152_063], 152_064), 152_064)
    assert flags.nonzero().tolist() == [[0, 152_063]]


@pytest.mark.parametrize("token", [-1, 40])
def test_pack_mask_id_out_of_range(token):
    with pytest.raises(sk.ArgumentError, match=rf"token id {token} is out of range; legal: an integer in \[0, 40\)"):
        sk.pack_mask([3, token], 40)


def test_pack_mask_wrong_types():
    with pytest.raises(sk.ArgumentTypeError, match=r"token id 1.5 is a float"):
        sk.pack_mask([1.5], 40)
    with pytest.raises(sk.ArgumentError, match="vocab_size=0"):
        sk.pack_mask([], 0)
