"""Branches of a model whose language model reads with an encoder and writes with a decoder, like InstructBLIP on T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.decoding import kv
from safecode_mllm.decoding.branches import Branches, stack, with_suffixes
from safecode_mllm.decoding.families import decoder_of, forward, has_encoder, prefill
from safecode_mllm.decoding.prefix_store import PrefixStore
from safecode_mllm.decoding.probe import verify_once
from safecode_mllm.errors import UnsupportedModelError


class EncoderBranches(Branches):
    """Takes the calls of `Branches`: image and prompt of both branches are encoded once, as one batch.

    What grows is the decoder's own text. It starts with one start token, so no row is padded.
    """

    prefilled = "branches side by side: an encoder reads image and text together"

    def __init__(self, model: Any, clean: Mapping[str, Tensor], noised: Mapping[str, Tensor] | None, cache: Any):
        kv.check_cache(cache)
        self.model, self.decoder, self.cache = model, decoder_of(model), cache
        self.rows = clean["input_ids"].shape[0]
        self.copies = 1 if noised is None else 2
        self._clean = dict(clean)
        self._inputs = self._clean if noised is None else stack(clean, noised)
        self.mask = self._inputs["attention_mask"]
        self.images = None
        self._states: Any = None

    def prefill(self) -> tuple[Tensor, Tensor | None]:
        """Encode the prompts of both branches and feed the start token; returns clean and noised logits [R, V]."""
        caught: list[Tensor] = []
        hook = self.decoder.get_encoder().register_forward_hook(lambda *call: caught.append(call[-1][0]))
        try:
            start = {"decoder_input_ids": self._start(len(self.mask)), "past_key_values": self.cache}
            logits, _ = prefill(self.model, self._inputs | start)
        finally:
            hook.remove()
        self._states, self._inputs = caught[0], {}
        return self._split(logits)

    def step(self, tokens: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Feed tokens to the decoder of every branch, int64 [R] or [R, n]; returns clean and noised logits [R, V]."""
        from transformers.modeling_outputs import BaseModelOutput

        tokens = tokens if tokens.ndim == 2 else tokens[:, None]
        logits = forward(
            self.decoder,
            cached=kv.cached_length(self.cache),
            decoder_input_ids=tokens.repeat(self.copies, 1),
            encoder_outputs=BaseModelOutput(self._states),
            attention_mask=self.mask,
            past_key_values=self.cache,
        )
        return self._split(logits)

    def rewind(self, columns: int) -> None:
        """Forget the last `columns` tokens that the decoders of all branches were fed."""
        written = kv.encoder_decoder_parts(self.cache)
        assert written is not None
        kv.keep_first_columns(written[0], kv.cached_length(self.cache) - columns)

    def drop_noised(self) -> None:
        """Go on with the clean rows only."""
        if self.has_noised:
            kv.keep_first_rows(self.cache, self.rows)
            self.mask, self._states = self.mask[: self.rows], self._states[: self.rows]
            self.copies = 1

    def expand(self, times: int) -> None:
        """Repeat each row `times` times in place ([A, B] becomes [A, A, B, B]), after the prefill."""
        if times == 1:
            return
        index = torch.arange(len(self.mask), device=self.mask.device).repeat_interleave(times)
        kv.select_rows(self.cache, index)
        self.mask, self._states = self.mask[index], self._states[index]
        self.rows *= times

    def ask(self, suffixes: Sequence[Sequence[int]], hidden: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Ask about the clean prompts as `Branches.ask` does, with a pass of its own: what an encoder read is fixed."""
        inputs = with_suffixes(self._clean, suffixes, hidden, rows)
        return prefill(self.model, inputs | {"decoder_input_ids": self._start(len(rows))})[0]

    def _start(self, rows: int) -> Tensor:
        token = start_token(self.decoder)
        return torch.full((rows, 1), token, dtype=torch.long, device=self.mask.device)


def start_token(decoder: Any) -> int:
    """Return the token that a decoder's answers start with."""
    for config in (decoder.generation_config, decoder.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token = getattr(config, name, None)
            if token is not None:
                return int(token)
    return 0


def make_branches(
    model: Any,
    clean: Mapping[str, Tensor],
    noised: Mapping[str, Tensor] | None,
    cache: Any,
    prefix_store: PrefixStore | None = None,
) -> Branches:
    """Return the branches that fit a model; arguments as for `Branches`.

    Raises:
        UnsupportedModelError: the model is of a class that this package has no tests for, and its branches do not do
            what the model does alone; or there is a video among the inputs.
    """
    videos = [key for key in clean if "video" in key]
    if videos:
        raise UnsupportedModelError(
            f"inputs hold {', '.join(videos)}: videos are not supported; pass frames as pictures"
        )
    verify_once(model, clean, noised, plain_branches)
    return plain_branches(model, clean, noised, cache, prefix_store)


def plain_branches(
    model: Any,
    clean: Mapping[str, Tensor],
    noised: Mapping[str, Tensor] | None,
    cache: Any,
    prefix_store: PrefixStore | None = None,
) -> Branches:
    """Return what `make_branches` does, unverified."""
    if has_encoder(decoder_of(model)):
        return EncoderBranches(model, clean, noised, cache)
    return Branches(model, clean, noised, cache, prefix_store)


def prompt_columns(model: Any, clean: Mapping[str, Tensor]) -> int:
    """Return how many columns of what `generate()` returns stand before the answer."""
    return 1 if has_encoder(decoder_of(model)) else clean["input_ids"].shape[1]


def generate_arguments(model: Any, clean: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what `generate()` of the model's decoder is told about the prompts."""
    if not has_encoder(decoder_of(model)):
        return {"input_ids": clean["input_ids"], "attention_mask": clean["attention_mask"]}
    from transformers.modeling_outputs import BaseModelOutput

    # Stands for what the encoder read, so that generate() does not encode ids without their image; only its number of
    # rows is used.
    mask = clean["attention_mask"][:, :1]
    return {"encoder_outputs": BaseModelOutput(mask[..., None].float()), "attention_mask": mask}
