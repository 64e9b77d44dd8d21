"""Branches over a KV cache of fixed size: buffers that never move, so that a step can be captured or compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from safecode_mllm.decoding import kv
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.families import forward

# Caches are this much longer at a time, so that answers of similar length have steps of the same shape.
LENGTH_STEP = 128


def static_length(columns: int) -> int:
    """Return the length of the cache for so many columns."""
    return -(-columns // LENGTH_STEP) * LENGTH_STEP


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
        self.decoder, self.rows, self.copies = branches.decoder, branches.rows, branches.copies
        self.row_dim, self.images = branches.row_dim, branches.images
        prompt = branches.mask.shape[1]
        device, length = branches.mask.device, static_length(columns)
        self.cache = kv.to_static(branches.cache, self.decoder, length)
        unwritten = branches.mask.new_ones(len(branches.mask), length - prompt)
        self.mask = torch.cat([branches.mask, unwritten], 1)
        self.positions = torch.cat([branches.next_positions] * self.copies, self.row_dim)
        self.column = torch.tensor([prompt], device=device)
        self.tokens = torch.zeros(self.rows, dtype=torch.long, device=device)

    @property
    def has_noised(self) -> bool:
        """Whether the noised rows are still running."""
        return self.copies == 2

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
