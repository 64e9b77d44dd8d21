"""Branches over a KV cache of fixed size: buffers that never move, so that a step can be captured or compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from safecode_mllm.decoding import kv
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.families import ImageStates, forward

# Caches are this much longer at a time, so that answers of similar length have steps of the same shape. On a GPU a
# shape is captured once, so that there should be few. On a CPU nothing is captured, and unused columns cost attention.
LENGTH_STEPS = {"cuda": 128, "cpu": 16}


def static_length(columns: int, device: torch.device) -> int:
    """Return the length of the cache for so many columns."""
    step = LENGTH_STEPS.get(device.type, LENGTH_STEPS["cuda"])
    return -(-columns // step) * step


class StaticBranches:
    """The decode phase of `Branches`, from a prefilled prompt on; takes the same calls.

    The mask is constant: unwritten columns are ones, and causality hides them. Positions, tokens and the present column
    are buffers that a step changes in place, and nothing in a step looks at a value on the host.

    Args:
        branches: after `prefill` and `expand`; its cache is moved layer by layer and may not be used any more.
        columns: columns that prompt and answer have at most.

    Raises:
        UnsupportedModelError: the model has layers whose cache cannot be of fixed size; see kv.static_obstacle.
    """

    def __init__(self, branches: Branches, columns: int) -> None:
        device = branches.mask.device
        self.decoder, self.rows, self.length = branches.decoder, branches.rows, static_length(columns, device)
        self.row_dim, self._all_copies = branches.row_dim, branches.copies
        self._layers = kv.StaticLayers(branches.cache, self.decoder, self.length)
        self._whole_mask = branches.mask.new_ones(len(branches.mask), self.length)
        self._whole_positions = torch.cat([branches.next_positions] * branches.copies, self.row_dim)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.tokens = torch.zeros(self.rows, dtype=torch.long, device=device)
        self._whole_images: ImageStates | None = None
        self.load(branches)

    def load(self, branches: Branches) -> None:
        """Take over another prompt of the same shape of rows; its cache may not be used any more."""
        prompt = branches.mask.shape[1]
        self._layers.load(branches.cache)
        self.cache = self._layers.cache
        self._whole_mask[:, :prompt] = branches.mask
        self._whole_mask[:, prompt:] = 1
        self._whole_positions.copy_(torch.cat([branches.next_positions] * branches.copies, self.row_dim))
        self.mask, self.positions = self._whole_mask, self._whole_positions
        self.column.fill_(prompt)
        if branches.images is not None:
            self._whole_images = self._whole_images or branches.images
            self._whole_images.load(branches.images)
        self.copies, self.images = self._all_copies, self._whole_images

    @property
    def has_noised(self) -> bool:
        """Whether the noised rows are still running."""
        return self.copies == 2

    @property
    def bytes(self) -> int:
        """Memory of the cache."""
        return self._layers.bytes

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Feed one token per row, int64 [R], to every branch; returns clean and noised logits [R, V]."""
        self.tokens.copy_(tokens)
        return self.advance()

    def advance(self) -> tuple[Tensor, Tensor | None]:
        """Feed the tokens that lie in `tokens`; the same operations on the same buffers each time."""
        images: dict[str, Any] = self.images.arguments(1) if self.images is not None else {}
        logits = forward(
            self.decoder,
            cached=self.column,
            input_ids=self.tokens.repeat(self.copies)[:, None],
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            **images,
        )
        self.positions.add_(1)
        self.column.add_(1)
        return logits[: self.rows], logits[self.rows :] if self.has_noised else None

    def drop_noised(self) -> None:
        """Go on with the clean rows only: views of the same buffers."""
        if self.has_noised:
            kv.keep_first_rows(self.cache, self.rows)
            self.mask = self.mask[: self.rows]
            self.positions = self.positions.narrow(self.row_dim, 0, self.rows)
            self.images = self.images and self.images.rows(slice(self.rows))
            self.copies = 1
