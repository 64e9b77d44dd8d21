"""A user's logits processors, split where the method puts its own steps between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# transformers' warpers by class name, in its order; the method's plausibility cut comes just before the first of them.
_WARPERS = (
    "TemperatureLogitsWarper",
    "TopHLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
)
# The warpers that the decode step can do itself: class name -> (attribute of the warper, parameter of the step).
_FUSED = {
    "TemperatureLogitsWarper": ("temperature", "temperature"),
    "TopKLogitsWarper": ("top_k", "top_k"),
    "TopPLogitsWarper": ("top_p", "top_p"),
    "MinPLogitsWarper": ("min_p", "min_p"),
}


@dataclass(frozen=True)
class ProcessorSplit:
    """The processor list of a generation in two parts.

    Attributes:
        before: processors up to the first warper; they see contrast and bias, and the cut sees what they left.
        after: the warpers and everything behind them (watermark, normalisation).
    """

    before: tuple[Any, ...]
    after: tuple[Any, ...]

    def fused_parameters(self) -> dict[str, Any] | None:
        """Return the step parameters that stand for the whole list, or None if a decode step cannot replace it."""
        names = [type(warper).__name__ for warper in self.after]
        in_order = names == [name for name in _FUSED if name in names]
        if self.before or not in_order or any(not _is_plain(warper) for warper in self.after):
            return None
        fused = [(*_FUSED[name], warper) for name, warper in zip(names, self.after, strict=True)]
        return {parameter: getattr(warper, attribute) for attribute, parameter, warper in fused}

    def temperature(self) -> float:
        """Return the temperature that the warpers apply; 1 without one."""
        for warper in self.after:
            if type(warper).__name__ == "TemperatureLogitsWarper":
                return float(warper.temperature)
        return 1.0

    def names_before(self) -> str:
        """Return the class names of the processors before the warpers, for error messages."""
        return ", ".join(type(processor).__name__ for processor in self.before) or "none"


def split_processors(processors: Sequence[Any]) -> ProcessorSplit:
    """Split a processor list at its first warper."""
    first = next((i for i, p in enumerate(processors) if type(p).__name__ in _WARPERS), len(processors))
    return ProcessorSplit(tuple(processors[:first]), tuple(processors[first:]))


def apply(processors: Sequence[Any], ids: Tensor, scores: Tensor) -> Tensor:
    """Run processors over scores [R, V], given all ids so far [R, L]."""
    for processor in processors:
        scores = processor(ids, scores)
    return scores


def cut(scores: Tensor, keep: Tensor) -> Tensor:
    """Set the scores [R, V] of tokens that are not kept to -inf."""
    return torch.where(keep, scores, -torch.inf)


def _is_plain(warper: Any) -> bool:
    return getattr(warper, "filter_value", -torch.inf) == -torch.inf and getattr(warper, "min_tokens_to_keep", 1) == 1
