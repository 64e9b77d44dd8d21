"""Where the tensors of a row are: pointers to its first element."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .shapes import MAX_SLICES as _MAX_SLICES

MAX_SLICES = tl.constexpr(_MAX_SLICES)

# What is left to do for a row, if it is not a number of tokens that have to race.
DONE = tl.constexpr(-1)  # it has its result
UNCUT = tl.constexpr(-2)  # it has beta 0: its slices hold x
TOO_MANY = tl.constexpr(-3)  # it has more candidates than fit in a tile


class Logits(NamedTuple):
    """A row of both logits, and the vocabulary size."""

    clean: Any
    noised: Any
    size: Any


class Scratch(NamedTuple):
    """A row's room: numbers of its slices, a tile of tokens, and the whole vocabulary, each as tokens and their x."""

    ranks: Any  # int32 [64], best clean rank of a slice
    counts: Any  # int32 [64], its candidates; in a row without a cut its fault
    best_x: Any  # float32 [64], its best x in a row without a cut
    chosen_tokens: Any  # int32 [ROOM]
    chosen_x: Any  # float32 [ROOM]
    row_tokens: Any  # int32 [padded V]
    row_x: Any  # float32 [padded V]


class Plan(NamedTuple):
    """What is left to do for a row."""

    left: Any  # int32, number of tokens that have to race, or a state
    listed: Any  # int32, whether these tokens are a list
    ranks: Any  # int32 [64], the largest is the rank of the best x


class Result(NamedTuple):
    """A row's place in the four tensors of contract.StepResult."""

    token: Any
    logprob: Any
    n_kept: Any
    status: Any


@triton.jit
def logits_of_row(clean, clean_stride, noised, noised_stride, vocab_size, row):
    """Return a row of logits [B, V]."""
    row = row.to(tl.int64)
    return Logits(clean + row * clean_stride, noised + row * noised_stride, vocab_size)


@triton.jit
def scratch_of_row(ints, floats, padded_size, ROOM: tl.constexpr, row):
    """Return a row of ints and floats, both [B, 2 * 64 + ROOM + padded V]."""
    first = row.to(tl.int64) * (2 * MAX_SLICES + ROOM + padded_size)
    ints += first
    floats += first
    chosen = 2 * MAX_SLICES
    return Scratch(
        ints,
        ints + MAX_SLICES,
        floats,
        ints + chosen,
        floats + chosen,
        ints + chosen + ROOM,
        floats + chosen + ROOM,
    )


@triton.jit
def plan_of_row(left, listed, ranks, row):
    """Return a row of the plans."""
    return Plan(left + row, listed + row, ranks + row.to(tl.int64) * MAX_SLICES)


@triton.jit
def result_of_row(token, logprob, n_kept, status, row):
    """Return a row of the results."""
    return Result(token + row, logprob + row, n_kept + row, status + row)
