"""The generator: published vectors, the layout of the counter, and the Gumbel value at its ends."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import naive_step
from safecode_kernels import rng

ONES = 0xFFFFFFFF
# Known answers that Random123 publishes for philox4x32 with 10 rounds: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def tensors(values):
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, output):
    assert tuple(int(word) for word in rng.philox4x32(tensors(counter), tensors(key))) == output
    assert naive_step.philox(counter, key) == output


@pytest.mark.parametrize("step", [0, 1, 2**32 - 1, 2**32, 2**63 - 1])
def test_token_bits_follow_the_documented_layout(step):
    ids = torch.tensor([[0, 1, 7, 8, 9, 31, 32, 33, 1023, 152_063, 2**31 - 2]]).expand(3, -1)
    seeds, stream = torch.tensor([0, 5, 2**63 - 1]), torch.tensor([0, 2**32 - 1, 3])
    actual = rng.token_bits(ids, seeds=seeds, stream=stream, step=step).tolist()
    for row in range(3):
        expected = [naive_step.bits(token, int(seeds[row]), int(stream[row]), step) for token in ids[row].tolist()]
        assert actual[row] == expected


@pytest.mark.parametrize("vocab_size", [1, 8, 31, 32, 33, 1023])
def test_row_bits_are_the_token_bits_of_every_token(vocab_size):
    key = {"seeds": torch.tensor([3, 4]), "stream": torch.tensor([0, 1]), "step": 9}
    ids = torch.arange(vocab_size).expand(2, -1)
    assert rng.row_bits(vocab_size, **key).equal(rng.token_bits(ids, **key))


def test_bits_change_with_each_part_of_the_key():
    ids = torch.arange(64).unsqueeze(0)

    def bits(seed=1, stream=0, step=0):
        return rng.token_bits(ids, seeds=torch.tensor([seed]), stream=torch.tensor([stream]), step=step)

    variants = [bits(), bits(seed=2), bits(seed=1 + 2**32), bits(stream=1), bits(step=1), bits(step=2**32)]
    values = [set(v.flatten().tolist()) for v in variants]
    assert all(len(v) == 64 for v in values), "tokens of a row share bits"
    assert len(set.union(*values)) == 64 * len(variants), "two keys share bits"


def test_gumbel_is_finite_at_both_ends_and_its_span_is_the_constant():
    low, high = rng.gumbel(torch.tensor([2**32 - 1, 0])).tolist()
    assert high == pytest.approx(33 * math.log(2), abs=1e-9)
    assert low == pytest.approx(-math.log(33 * math.log(2)), abs=1e-9)
    assert high - low < rng.GUMBEL_SPAN < high - low + 0.2


def test_gumbel_matches_the_naive_value():
    values = rng.gumbel(torch.tensor([naive_step.bits(t, 7, 0, 3) for t in range(50)])).tolist()
    assert values == pytest.approx([naive_step.gumbel(t, 7, 0, 3) for t in range(50)], abs=1e-12)
