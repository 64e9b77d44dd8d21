"""What a generation makes a model do, counted by hooks: nothing here looks at the product's code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from safecode_mllm.decoding.families import decoder_of

_TOWERS = ("vision_tower", "vision_model", "visual")


@dataclass
class Counts:
    """Calls of the vision tower, and (rows, columns) of every pass of the language model and of its output head."""

    vision: int = 0
    passes: list[tuple[int, int]] = field(default_factory=list)
    heads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def positions(self) -> int:
        """Positions that the language model processed."""
        return sum(rows * columns for rows, columns in self.passes)


@contextmanager
def counted(model: Any) -> Iterator[Counts]:
    """Count what happens to a model inside the block."""
    counts = Counts()
    inner = decoder_of(model).model
    tower = next(found for owner in (inner, model) for name in _TOWERS if (found := getattr(owner, name, None)))
    text = next((found for name in ("language_model", "text_model") if (found := getattr(inner, name, None))), inner)
    layer = text.layers[0]

    def seen(states: Tensor) -> tuple[int, int]:
        return states.shape[0], states.shape[1]

    def on_vision(module: Any, arguments: Any, output: Any) -> None:
        counts.vision += 1

    hooks = [
        tower.register_forward_hook(on_vision),
        layer.register_forward_pre_hook(lambda _, arguments: counts.passes.append(seen(arguments[0]))),
        decoder_of(model).get_output_embeddings().register_forward_pre_hook(
            lambda _, arguments: counts.heads.append(seen(arguments[0]))
        ),
    ]  # fmt: skip
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
