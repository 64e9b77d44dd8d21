"""Statuses, and floats as integers of the same order: an integer maximum also shows whether there was a NaN."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...contract import Status

OK = tl.constexpr(int(Status.OK))
NAN_CLEAN = tl.constexpr(int(Status.NAN_CLEAN))
NAN_NOISED = tl.constexpr(int(Status.NAN_NOISED))
NOTHING_FINITE = tl.constexpr(int(Status.NOTHING_FINITE))
INFINITE = tl.constexpr(int(Status.INFINITE))

# What may be wrong with some of a row's scores; the largest fault of a row decides its status.
NO_FAULT = tl.constexpr(0)
FAULT_INFINITE = tl.constexpr(1)
FAULT_NAN = tl.constexpr(2)

INF = tl.constexpr(math.inf)
NEG_INF = tl.constexpr(-math.inf)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)

RANK_NAN = tl.constexpr(0x7FFFFFFF)
RANK_INF = tl.constexpr(0x7F800000)
RANK_NEG_INF = tl.constexpr(~0x7F800000)
MAX_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def rank_of(x):
    """Return int32 in the order of the floats x, every NaN above +inf; -0 comes just before 0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), RANK_NAN)


@triton.jit
def value_of(rank):
    """Return the float of a rank."""
    bits = rank ^ ((rank >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def status_of_rank(best_rank):
    """Return the status that the largest rank of a row shows."""
    status = tl.where(best_rank == RANK_INF, INFINITE, OK)
    status = tl.where(best_rank > RANK_INF, NAN_CLEAN, status)
    return tl.where(best_rank <= RANK_NEG_INF, NOTHING_FINITE, status)


@triton.jit
def status_of_best(best):
    """Return the status that the largest score of a row shows."""
    return status_of_rank(rank_of(best))


@triton.jit
def status_of_fault(fault):
    """Return the status of a row with this fault."""
    status = tl.where(fault == FAULT_INFINITE, INFINITE, OK)
    return tl.where(fault == FAULT_NAN, NAN_NOISED, status)
