"""Random calls of the kernels: sizes, layouts, parameters and logits that nobody would write down."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

import safecode_kernels as sk
from safecode_kernels import StepParams
from safecode_kernels.testing import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Most rows are small, where edges are: words of 32 tokens, chunks of 256, blocks of 4096.
SIZES = (1, 2, 7, 31, 32, 33, 63, 64, 65, 255, 256, 257, 300, 511, 513, 1023, 1025, 2047, 2049, 4095, 4097, 5000)
SPECIAL = (math.nan, -math.nan, math.inf, -math.inf, 3.38e38, -3.38e38, 1e-45, -0.0, 0.0, 65504.0)


@dataclass(frozen=True)
class FuzzCase:
    """A case, and how to call the back end with it."""

    case: Case
    threads: int
    loops: str


def fuzz_cases(seed: int, count: int, loops: tuple[str, ...]):
    """Yield `count` cases; the same seed gives the same ones. `loops` are the instruction sets to choose from."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        case = _case(choose, generator)
        yield FuzzCase(case, choose.choice((1, 1, 1, 3)), choose.choice(loops))


def _case(choose: random.Random, generator: torch.Generator) -> Case:
    vocab_size, batch = choose.choice(SIZES), choose.choice((1, 1, 1, 2, 3, 5))
    dtype = choose.choice(DTYPES)
    clean = _logits(choose, generator, batch, vocab_size)
    closeness = choose.choice((0.0, 0.3, 1.0, 10.0))
    noised = clean + closeness * torch.randn(batch, vocab_size, generator=generator)
    for logits in (clean, noised):
        _spoil(choose, generator, logits)
    n_masks = choose.choice((1, 1, 3))
    masks = sk.pack_masks([_mask(choose, vocab_size) for _ in range(n_masks)], vocab_size)
    return Case(
        clean=_laid_out(choose, clean.to(dtype)),
        noised=None if choose.random() < 0.1 else _laid_out(choose, noised.to(dtype)),
        params=_params(choose, batch),
        refusal_mask=masks,
        mask_id=torch.tensor([choose.randrange(-1, n_masks) for _ in range(batch)]),
        seeds=torch.tensor([choose.choice((0, 1, 2**63 - 1, choose.getrandbits(63))) for _ in range(batch)]),
        stream=torch.tensor([choose.choice((0, 1, 2**32 - 1)) for _ in range(batch)]),
        step=choose.choice((0, 1, 77, 2**32, 2**63 - 1)),
    )


def _logits(choose: random.Random, generator: torch.Generator, batch: int, vocab_size: int) -> torch.Tensor:
    scale = choose.choice((0.0, 0.05, 1.0, 2.5, 2.5, 30.0))
    logits = scale * torch.randn(batch, vocab_size, generator=generator) + choose.choice((0.0, 0.0, -200.0, 25.0))
    return logits.round() if choose.random() < 0.2 else logits


def _spoil(choose: random.Random, generator: torch.Generator, logits: torch.Tensor) -> None:
    """Write special values into some rows, at random places and at the best token."""
    if choose.random() < 0.2:
        logits[torch.rand(logits.shape, generator=generator) < choose.choice((0.05, 0.9))] = -math.inf
    for row in range(len(logits)):
        if choose.random() < 0.15:
            place = choose.choice((choose.randrange(logits.shape[1]), int(logits[row].nan_to_num().argmax())))
            logits[row, place] = choose.choice(SPECIAL)
        if choose.random() < 0.02:
            logits[row] = choose.choice((-math.inf, math.nan, torch.finfo(torch.float32).min))


def _mask(choose: random.Random, vocab_size: int) -> list[int]:
    share = choose.choice((0.0, 0.01, 0.1, 0.5, 1.0))
    return [token for token in range(vocab_size) if choose.random() < share]


def _laid_out(choose: random.Random, logits: torch.Tensor) -> torch.Tensor:
    """The same values with another stride or start in memory."""
    layout = choose.randrange(5)
    batch, vocab_size = logits.shape
    if layout == 0:
        return logits.T.contiguous().T
    if layout in (1, 2):  # rows start at addresses that are no multiple of 16 bytes
        wide = torch.full((batch, vocab_size + 3 + layout), math.nan, dtype=logits.dtype)
        wide[:, layout : layout + vocab_size] = logits
        return wide[:, layout : layout + vocab_size]
    if layout == 3:  # every other row of a larger batch
        tall = torch.full((2 * batch, vocab_size), math.nan, dtype=logits.dtype)
        tall[::2] = logits
        return tall[::2]
    return logits


def _params(choose: random.Random, batch: int) -> StepParams:
    values = {
        "contrast_weight": (0.0, 0.43, 1.0, 7.5, 3e38),
        "plausibility_beta": (0.0, 0.0, 1e-30, 0.01, 0.1, 0.1, 0.5, 1.0),
        "refusal_bias": (0.0, 1.0, -1.0, 6.0, -6.0, 80.0, 3.4e38, -3.4e38),
        "bias_scope": (0, 0, 1, 20, 2**31 - 1),
        "temperature": (1.0, 0.8, 1e-6, 1e-3, 1.7, 3e38),
        "top_k": (0, 0, 1, 3, 50, 2**31 - 1),
        "top_p": (1.0, 1.0, 0.9, 0.5, 1e-12),
        "min_p": (0.0, 0.0, 0.05, 1.0),
        "greedy": (True, False, False),
    }
    ordinary = choose.random() < 0.7

    def pick(name: str) -> object:
        usual = values[name][:-2] if ordinary and name in ("contrast_weight", "refusal_bias") else values[name]
        return choose.choice(usual)

    return StepParams(**{name: [pick(name) for _ in range(batch)] for name in values})
