"""P(unsafe) from the logits of two letters, the question asked in both orders of its labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.errors import SafeCoDeError
from safecode_mllm.judges.question import LABEL_ORDERS, LETTERS

# Below this share of the probability mass on the letters the model did not answer the question (method section 4).
MIN_LETTER_MASS = 0.05
# How tokenizers mark a leading space, so that "A", " A" and "a" count as the same answer.
_SPACE_MARKS = "▁Ġ "


@dataclass(frozen=True)
class Reading:
    """What the read-out of one request gave: P(unsafe) in each label order, and the mass on the letters."""

    p_unsafe: tuple[float, ...]
    letter_mass: tuple[float, ...]

    @property
    def p(self) -> float | None:
        """P(unsafe) over both orders; None if the letters hold too little to tell."""
        p = sum(self.p_unsafe) / len(self.p_unsafe)
        return p if self.mass >= MIN_LETTER_MASS and 0 <= p <= 1 else None  # also None when NaN

    @property
    def mass(self) -> float:
        """Mean mass on the letters."""
        return sum(self.letter_mass) / len(self.letter_mass)


@lru_cache(maxsize=16)
def letter_ids(tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """Return for each letter the ids of all its casing and spacing variants in the vocabulary."""
    found: dict[str, list[int]] = {letter.casefold(): [] for letter in LETTERS}
    for token, index in tokenizer.get_vocab().items():
        text = token.lstrip(_SPACE_MARKS).casefold()
        if text in found:
            found[text].append(index)
    missing = [letter for letter in LETTERS if not found[letter.casefold()]]
    if missing:
        raise SafeCoDeError(
            f"a judge that answers with letters needs a token for each of {LETTERS}; this tokenizer lacks {missing}"
        )
    return tuple(tuple(sorted(found[letter.casefold()])) for letter in LETTERS)


def read_letters(per_order: Sequence[Tensor], letters: Sequence[Sequence[int]]) -> list[Reading]:
    """Turn the logits [B, V] of each label order into one reading per row, in float64."""
    p_orders, mass_orders = [], []
    for logits, labels in zip(per_order, LABEL_ORDERS, strict=True):
        logp = torch.log_softmax(logits.double(), -1)
        sums = torch.stack([logp[:, list(ids)].logsumexp(-1) for ids in letters], -1)
        p_orders.append(sums.softmax(-1)[:, labels.index("unsafe")])
        mass_orders.append(sums.exp().sum(-1))
    p, mass = torch.stack(p_orders, -1).tolist(), torch.stack(mass_orders, -1).tolist()
    return [Reading(tuple(ps), tuple(ms)) for ps, ms in zip(p, mass, strict=True)]
