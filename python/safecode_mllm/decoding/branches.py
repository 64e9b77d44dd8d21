"""Clean and noised rows as one batch over one KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.decoding import kv
from safecode_mllm.decoding.families import (
    ImageStates,
    decoder_of,
    family_of,
    forward,
    has_encoder,
    image_layers,
    prompt_positions,
)
from safecode_mllm.decoding.families import prefill as forward_prompt
from safecode_mllm.decoding.prefill import prefill
from safecode_mllm.decoding.prefix_store import PrefixStore
from safecode_mllm.decoding.prompt import Prompt
from safecode_mllm.decoding.question_layout import Layout, layouts, left_pad
from safecode_mllm.errors import UnsupportedModelError


class Branches:
    """Rows 0..R-1 see the clean image; while `noised` is given, rows R..2R-1 see the noised one.

    Dropping the noised branch is a view.

    Args:
        model: a Hugging Face model of a supported family.
        clean: processor output; `input_ids` and `attention_mask` int64 [B, L], left padded, plus the image keys.
        noised: the same with noised pixels, or None to run the clean branch alone.
        cache: an empty KV cache that the branches own from now on.
        prefix_store: where the text before the image is kept across generations; None keeps nothing.

    Attributes:
        rows: R; num_return_sequences times the requests, after `expand`.
        copies: 2 while the noised rows run, else 1.
        mask: int64 [copies * R, columns], which columns are no padding.
        next_positions: positions of the next column, int64 [R, 1] or [3, R, 1].
        row_dim: their dimension of rows.
        images: what the text attends to beside the cache; None for most families.
        prefilled: after the prefill, how that was done and why, in a sentence.
    """

    prefilled = ""

    def __init__(
        self,
        model: Any,
        clean: Mapping[str, Tensor],
        noised: Mapping[str, Tensor] | None,
        cache: Any,
        prefix_store: PrefixStore | None = None,
    ):
        kv.check_cache(cache)
        self.model = model
        self.decoder = decoder_of(model)
        if has_encoder(self.decoder):
            raise UnsupportedModelError(
                f"{type(model).__name__} on {type(self.decoder).__name__} is not supported here, since its language "
                "model has an encoder; SteeredGeneration takes it"
            )
        self.cache = cache
        self._image_layers = image_layers(self.decoder)
        self._prompt: Prompt | None = Prompt(model, clean, noised)
        self._store = prefix_store
        self.rows, self.copies, self.row_dim = len(self._prompt.ids), self._prompt.copies, self._prompt.row_dim
        self.images: ImageStates | None = None
        self._clean = dict(clean) if family_of(model).reads_ahead else {}
        self._prompt_mask = self._prompt.mask
        self.mask = torch.cat([self._prompt_mask] * self.copies)
        # The last column of a left-padded prompt is always text, where all position axes agree.
        self.next_positions = self._prompt.positions[..., -1:] + 1

    @property
    def has_noised(self) -> bool:
        """Whether the noised rows are still running."""
        return self.copies == 2

    def prefill(self) -> tuple[Tensor, Tensor | None]:
        """Process the prompt of both branches, once; returns clean and noised logits [R, V]."""
        assert self._prompt is not None, "a prompt is prefilled once"
        logits, self.images, self.prefilled = prefill(self._prompt, self.cache, self._store)
        self._prompt = None  # the pixels are not needed again
        return self._split(logits)

    def step(self, tokens: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Feed tokens to every branch; returns clean and noised logits [R, V] behind the last of them.

        Args:
            tokens: int64, one per row [R], or n per row [R, n].
            visible: int64 [R, n, I], for families whose text attends to image states: which of the row's I images each
                token sees; None for those that the token before sees.
        """
        tokens = tokens if tokens.ndim == 2 else tokens[:, None]
        columns = tokens.shape[1]
        cached = kv.cached_length(self.cache)
        kv.spare_columns(self.cache)
        self.mask = torch.cat([self.mask, self.mask.new_ones(self.mask.shape[0], columns)], 1)
        positions = self.next_positions + torch.arange(columns, device=self.next_positions.device)
        logits = forward(
            self.decoder,
            cached=cached,
            input_ids=tokens.repeat(self.copies, 1),
            attention_mask=self.mask,
            position_ids=torch.cat([positions] * self.copies, self.row_dim),
            past_key_values=self.cache,
            **self._image_arguments(columns, visible),
        )
        self.next_positions = self.next_positions + columns
        return self._split(logits)

    def rewind(self, columns: int) -> None:
        """Forget the last `columns` columns of every branch, int >= 0; they must be text without padding."""
        kept = kv.cached_length(self.cache) - columns
        kv.keep_first_columns(self.cache, kept, self._image_layers)
        self.mask = self.mask[:, :kept]
        self.next_positions = self.next_positions - columns

    def drop_noised(self) -> None:
        """Go on with the clean rows only."""
        if self.has_noised:
            kv.keep_first_rows(self.cache, self.rows)
            self.mask = self.mask[: self.rows]
            self.images = self.images and self.images.rows(slice(self.rows))
            self.copies = 1

    def expand(self, times: int) -> None:
        """Repeat each row `times` times in place ([A, B] becomes [A, A, B, B]), after the prefill."""
        if times == 1:
            return
        index = torch.arange(self.copies * self.rows, device=self.mask.device).repeat_interleave(times)
        kv.select_rows(self.cache, index)
        self.mask = self.mask[index]
        self.images = self.images and self.images.rows(index)
        self.next_positions = self.next_positions.repeat_interleave(times, self.row_dim)
        self.rows *= times

    def ask(self, suffixes: Sequence[Sequence[int]], hidden: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Continue the clean prompts with other text on a fork of the cache; the branches stay as they are.

        Must be called between `prefill` and `expand`/`step`.

        Args:
            suffixes: Q sequences of token ids.
            hidden: for each, how many columns at the end of the prompt it must not see.
            rows: for each, the clean row that it continues.

        Returns:
            logits [Q, V] after the last token of each suffix.
        """
        if self._clean:
            return self._ask_anew(suffixes, hidden, rows)
        logits: list[Any] = [None] * len(suffixes)
        for places, layout in layouts(self.model, suffixes, hidden, rows, self.mask.device):
            for place, answer in zip(places, self._ask_together(layout), strict=True):
                logits[place] = answer
        return torch.stack(logits)

    def _ask_together(self, layout: Layout) -> Tensor:
        """Run one pass behind a fork of the cache; returns the logits of its questions."""
        device = self.mask.device
        index, hidden = (torch.tensor(values, device=device) for values in (layout.prompts, layout.hidden))
        length = self._prompt_mask.shape[1] - min(layout.hidden)
        cache = kv.fork(self.cache, layout.prompts)
        kv.keep_first_columns(cache, length, self._image_layers)
        shown = torch.arange(length, device=device) < (self._prompt_mask.shape[1] - hidden)[:, None]
        visible = self._prompt_mask[index, :length] * shown
        # Suffixes are all text: positions go on from the last visible column, the same on every axis.
        start = (self.next_positions[..., 0].index_select(-1, index) - hidden)[..., None]
        columns = layout.ids.shape[1]
        logits = forward(
            self.decoder,
            cached=length,
            ends=layout.ends,
            input_ids=layout.ids,
            attention_mask=layout.mask(self.decoder, visible),
            position_ids=start + layout.depth,
            past_key_values=cache,
            **(self.images.rows(index).arguments(columns) if self.images else {}),
        )
        return logits[layout.places]

    def _ask_anew(self, suffixes: Sequence[Sequence[int]], hidden: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Ask with a pass of its own, where what lies in the cache has seen what it must not see."""
        inputs = with_suffixes(self._clean, suffixes, hidden, rows)
        return forward_prompt(self.model, inputs | {"position_ids": prompt_positions(self.model, inputs)})[0]

    def _image_arguments(self, columns: int, visible: Tensor | None) -> dict[str, Any]:
        if self.images is None:
            return {}
        if visible is None:
            return self.images.arguments(columns)
        visible = visible.repeat(self.copies, *[1] * (visible.ndim - 1))
        self.images = self.images.seeing(visible[:, -1:])
        return {**self.images.arguments(columns), self.images.mask: visible}

    def _split(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        return logits[: self.rows], logits[self.rows :] if self.has_noised else None


def stack(clean: Mapping[str, Tensor], noised: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return clean and noised inputs as one batch: every key, clean rows first."""
    if clean.keys() != noised.keys():
        raise ValueError(f"clean and noised inputs must have the same keys, got {sorted(clean)} and {sorted(noised)}")
    return {key: torch.cat([clean[key], noised[key]]) for key in clean}


def with_suffixes(
    clean: Mapping[str, Tensor], suffixes: Sequence[Sequence[int]], hidden: Sequence[int], rows: Sequence[int]
) -> dict[str, Tensor]:
    """Return the clean prompts of `rows` without their last `hidden` columns and with suffixes, images included.

    Everything that a processor says about each token is for a suffix what it is for the prompt's last token.
    """
    ids, mask = clean["input_ids"], clean["attention_mask"]
    along_tokens = [key for key, value in clean.items() if value.shape == ids.shape]
    asked: dict[str, list[list[int]]] = {key: [] for key in along_tokens}
    for row, suffix, drop in zip(rows, suffixes, hidden, strict=True):
        kept = mask[row, : ids.shape[1] - drop] == 1
        for key in along_tokens:
            added = suffix if key == "input_ids" else [int(clean[key][row, -1])] * len(suffix)
            asked[key].append([*clean[key][row, : ids.shape[1] - drop][kept].tolist(), *added])
    index = torch.tensor(list(rows), device=ids.device)
    return {key: left_pad(asked[key], ids.device)[0] if key in asked else value[index] for key, value in clean.items()}
