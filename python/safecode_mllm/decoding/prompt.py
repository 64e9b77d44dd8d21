"""The prompts of one generation as the processor made them, once with clean and once with noised images."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.decoding.families import prompt_positions, text_columns


class Prompt:
    """R prompts of L columns; both branches have the same ids, mask and positions.

    Args:
        model: a Hugging Face model of a supported family.
        clean: processor output; `input_ids` and `attention_mask` int64 [R, L], left padded, plus the image keys.
        noised: the same with noised pixels, or None for the clean branch alone.

    Attributes:
        copies: 2 with a noised branch, else 1.
        positions: explicit positions of one branch, int64 [R, L] or [3, R, L].

    Raises:
        ValueError: the two have different keys.
    """

    def __init__(self, model: Any, clean: Mapping[str, Tensor], noised: Mapping[str, Tensor] | None) -> None:
        if noised is not None and clean.keys() != noised.keys():
            raise ValueError(
                f"clean and noised inputs must have the same keys, got {sorted(clean)} and {sorted(noised)}"
            )
        self.model, self.clean, self.noised = model, clean, noised
        self.copies = 1 if noised is None else 2
        self.positions = prompt_positions(model, clean)

    @property
    def ids(self) -> Tensor:
        """Token ids of one branch, int64 [R, L]."""
        return self.clean["input_ids"]

    @property
    def mask(self) -> Tensor:
        """Which columns of one branch are no padding, int64 [R, L]."""
        return self.clean["attention_mask"]

    @property
    def row_dim(self) -> int:
        """The dimension of rows in `positions`."""
        return self.positions.ndim - 2

    @cached_property
    def text_columns(self) -> list[int]:
        """For each row how many columns, padding included, stand before its image."""
        return [int(columns) for columns in text_columns(self.model, self.clean).tolist()]

    @property
    def shared(self) -> int:
        """C, columns that stand before the image in every row: what both branches have in common."""
        return min(self.text_columns)

    @property
    def sides(self) -> list[Mapping[str, Tensor]]:
        """The processor's output for each branch, the clean one first."""
        return [self.clean] if self.noised is None else [self.clean, self.noised]

    @cached_property
    def text_keys(self) -> frozenset[str]:
        """The keys whose tensors run along the columns: [R, L] or [R, L, ...]."""
        found = (k for k, v in self.clean.items() if not v.is_floating_point() and v.shape[:2] == self.ids.shape)
        return frozenset(found)

    def stacked(self, start: int = 0) -> dict[str, Any]:
        """Return the arguments of a pass over all branches from column `start` on; the mask stays whole.

        Rows are those of the clean branch, then those of the noised one. Every key of a processor runs along the rows,
        images included, so stacking is a plain concatenation.
        """

        def part(key: str, value: Tensor) -> Tensor:
            return value[:, start:] if key in self.text_keys else value

        inputs = {key: torch.cat([part(key, side[key]) for side in self.sides]) for key in self.clean}
        positions = torch.cat([self.positions[..., start:]] * self.copies, self.row_dim)
        return inputs | {"attention_mask": torch.cat([self.mask] * self.copies), "position_ids": positions}
