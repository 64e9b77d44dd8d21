"""The probability of a label, from what could have stood where it begins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

# What each label counts towards P(unsafe).
Weights = Mapping[str, float]
SAFE_UNSAFE_WEIGHTS: Weights = {"safe": 0.0, "unsafe": 1.0}

# Below this share of the mass on the labels the model was about to say something else.
MIN_LABEL_MASS = 0.05
# What tokenizers put before the letters of a token: marks of a space or a line, quotes, white space.
_LEADING = "\u2581\u0120\u010a \t\n\"'*`"


def label_of_token(token: str, labels: Iterable[str] = SAFE_UNSAFE_WEIGHTS) -> str | None:
    """Return the one label that a token begins, None if there is none or more than one."""
    text = token.lstrip(_LEADING).casefold()
    # "un" begins "unsafe" alone and "s" begins "safe" alone; "safely" begins neither.
    begun = [label for label in labels if text and (label.startswith(text) or _spells(text, label))]
    return begun[0] if len(begun) == 1 else None


def _spells(text: str, label: str) -> bool:
    """Whether a token holds the whole label and nothing that goes on with it."""
    return text.startswith(label) and not text[len(label) :][:1].isalnum()


def p_unsafe(candidates: Iterable[tuple[str, float]], weights: Weights = SAFE_UNSAFE_WEIGHTS) -> float | None:
    """Return P(unsafe) among the labels, None where they hold too little mass to tell.

    Args:
        candidates: tokens that could stand where the label begins, each with its log-probability.
        weights: the labels, and what each counts.
    """
    mass = dict.fromkeys(weights, 0.0)
    for token, logprob in candidates:
        label = label_of_token(token, weights)
        if label is not None and math.isfinite(logprob):
            mass[label] += math.exp(min(0.0, logprob))
    return weighted(mass, weights)


def weighted(mass: Mapping[str, float], weights: Weights) -> float | None:
    """Return P(unsafe) from the probability mass of each label."""
    total = math.fsum(mass.values())
    if not total >= MIN_LABEL_MASS:  # also when NaN
        return None
    return math.fsum(mass[label] * weight for label, weight in weights.items()) / total
