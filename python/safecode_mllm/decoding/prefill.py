"""How a prompt is processed: both branches side by side, packed into one row, or behind a text that is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.decoding import families, kv
from safecode_mllm.decoding.families import ImageStates
from safecode_mllm.decoding.packed import PACKED_MIN_PREFIX, packed_prefill, packing_obstacle
from safecode_mllm.decoding.prefix_store import Layers, PrefixStore
from safecode_mllm.decoding.prompt import Prompt


def prefill(prompt: Prompt, cache: Any, store: PrefixStore | None) -> tuple[Tensor, ImageStates | None, str]:
    """Process a prompt into an empty DynamicCache: its rows are clean first, then noised.

    Returns:
        logits [copies * R, V] behind the prompt, what later passes attend to beside the cache, and a sentence that says
        which way was taken and why.
    """
    note = ""
    if store is not None:
        obstacle = _fill_from_store(prompt, cache, store)
        if obstacle is None:
            rest = prompt.stacked(prompt.shared) | {"past_key_values": cache}
            logits, images = families.prefill(prompt.model, rest, cached=prompt.shared)
            return logits, images, f"behind {prompt.shared} stored columns: {store.explain()}"
        note = f"; nothing stored: {obstacle}"
    obstacle = packing_obstacle(prompt)
    if obstacle is None:
        logits, images = packed_prefill(prompt, cache)
        return logits, images, f"both branches in one row behind {prompt.shared} columns that they share{note}"
    logits, images = families.prefill(prompt.model, prompt.stacked() | {"past_key_values": cache})
    return logits, images, f"branches side by side: {obstacle}{note}"


def explain_prefill(store: PrefixStore | None) -> str:
    """Say in a sentence how prompts are processed; a generation's notes say what was done and why."""
    if store is not None:
        return f"behind the text before the image, which is kept: {store.explain()}"
    return f"branches side by side, or in one row where {PACKED_MIN_PREFIX} columns or more stand before the image"


def _fill_from_store(prompt: Prompt, cache: Any, store: PrefixStore) -> str | None:
    """Put the shared columns into an empty cache; returns why that is not possible, in a sentence."""
    if prompt.shared == 0:
        return "no text stands before the image"
    family = families.family_of(prompt.model)
    if family.pixels is None:
        return f"for {family.title} it has not been shown that storing changes nothing"
    if kv.has_sliding_window(families.decoder_of(prompt.model)):
        return "the model has layers with a sliding window, which keep a part of their columns"
    prefixes = [prefix_ids(prompt, row, prompt.text_columns[row]) for row in range(len(prompt.ids))]
    keys = store.keys(prompt.model, type(cache).__name__, prefixes)
    if keys is None:
        return "weights on the meta device, or made in inference mode, do not tell when they change"
    found = {key: store.get(key) for key in dict.fromkeys(keys)}
    missing = [key for key, layers in found.items() if layers is None]
    if missing:
        for key, layers in zip(missing, _process(prompt, [key.ids for key in missing]), strict=True):
            found[key] = layers
            store.put(key, layers)
    rows = [found[key] for key in keys]
    padding = (prompt.mask == 0).sum(-1).tolist()
    kv.fill(cache, [row for row in rows if row is not None], padding, prompt.shared, prompt.copies)
    return None


def prefix_ids(prompt: Prompt, row: int, columns: int) -> list[int]:
    """Return the token ids of a row's first columns without its padding: text, whatever the picture shows.

    Raises:
        ValueError: one of these columns is part of the row's image or stands behind it.
    """
    if columns > prompt.text_columns[row]:
        raise ValueError(
            f"columns={columns} of row {row} reach to its image, which begins at column {prompt.text_columns[row]}: "
            "only text before an image is the same for every picture"
        )
    return prompt.ids[row, :columns][prompt.mask[row, :columns] == 1].tolist()


def _process(prompt: Prompt, prefixes: Sequence[Sequence[int]]) -> list[Layers]:
    """Return keys and values of texts that stand before all images, processed as one batch."""
    from transformers import DynamicCache

    model, device = prompt.model, prompt.ids.device
    # Padded at the end, where no earlier column sees it.
    width = max(map(len, prefixes))
    ids = torch.tensor([[*prefix, *[0] * (width - len(prefix))] for prefix in prefixes], device=device)
    # Text in front of all images has the same position on every axis.
    positions = torch.arange(width, device=device).expand(*prompt.positions.shape[:-2], len(prefixes), width)
    cache = DynamicCache()
    families.forward(
        families.decoder_of(model),
        cached=0,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=positions,
        past_key_values=cache,
        **families.no_images(model, *ids.shape),
    )
    return [kv.first_columns(cache, row, len(prefix)) for row, prefix in enumerate(prefixes)]
