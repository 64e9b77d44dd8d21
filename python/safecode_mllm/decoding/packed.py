"""Both branches of a prompt in one row, so that the text before the image is
processed once.

A row is [text][clean image][text behind it][noised image][text behind it]. The noised part has the positions of the
clean one and does not see it; afterwards the KV cache is cut into a row per branch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from safecode_mllm.decoding import kv
from safecode_mllm.decoding.families import ImageStates, decoder_of, family_of, prefill
from safecode_mllm.decoding.prompt import Prompt

# Columns before the image from which on a pair is packed, as measured by benchmarks/shared_prefix.py on one CPU thread:
# with 576 image tokens it takes 1.17 of the time of side by side at 64 columns, 1.16 at 256 and 1.00 at 512; with 64
# image tokens 0.90, 0.74 and 0.67. From here on it lost in neither.
PACKED_MIN_PREFIX = 512
# Attention implementations that take a mask of any shape.
_TAKES_ANY_MASK = ("sdpa", "eager")


def packing_obstacle(prompt: Prompt) -> str | None:
    """Return why the branches of a prompt are not packed, in a sentence; None if they are."""
    family, decoder = family_of(prompt.model), decoder_of(prompt.model)
    if prompt.noised is None:
        return "there is one branch only"
    if prompt.shared < PACKED_MIN_PREFIX:
        return f"{prompt.shared} columns stand before the image, and packing pays from {PACKED_MIN_PREFIX} on"
    if family.pixels is None:
        return f"for {family.title} it has not been shown that packing changes nothing"
    if obstacle := mask_obstacle(decoder):
        return obstacle
    images = len(prompt.clean["image_grid_thw" if family.pixels == "patch" else "pixel_values"])
    if images != len(prompt.ids):
        return f"there are {images} images in {len(prompt.ids)} rows: only rows of one image are packed"
    return None


def mask_obstacle(decoder: Any) -> str | None:
    """Return why a language model takes no mask of any shape, in a sentence; None if it does."""
    if kv.has_sliding_window(decoder):
        return "the model has layers with a sliding window, which would count packed columns"
    if _attention(decoder) not in _TAKES_ANY_MASK:
        return f"attention implementation {_attention(decoder)!r} takes no mask of its own"
    return None


def own_mask(decoder: Any, allowed: Tensor) -> Tensor:
    """Return a mask as the decoder's attention takes it.

    Args:
        decoder: a language model without a mask_obstacle.
        allowed: bool [R, Q, K], which column sees which; none sees nothing.

    Returns:
        [R, 1, Q, K]: bool, or in the model's dtype for attention that adds its mask.
    """
    allowed = allowed[:, None]
    if _attention(decoder) == "sdpa":
        return allowed
    dtype = decoder.dtype
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def packed_prefill(prompt: Prompt, cache: Any) -> tuple[Tensor, ImageStates | None]:
    """Process both branches in one pass of R rows, into an empty DynamicCache; there must be no obstacle.

    Returns:
        logits [2R, V] and image states of the 2R rows, and leaves the cache as a pass over the stacked branches does.
    """
    length, shared = prompt.ids.shape[1], prompt.shared
    inputs: dict[str, Any] = {key: _twice(prompt.clean[key], 1, shared) for key in prompt.text_keys} | _images(prompt)
    if "image_attention_mask" in inputs:
        inputs["image_attention_mask"] = _own_images(prompt.clean["image_attention_mask"], shared)
    inputs["attention_mask"] = own_mask(decoder_of(prompt.model), _sees(prompt.mask, shared))
    inputs |= {"position_ids": _twice(prompt.positions, -1, shared), "past_key_values": cache}
    logits, images = prefill(prompt.model, inputs, ends=(length - 1, 2 * length - shared - 1))
    kv.unpack_pairs(cache, shared, length)
    return logits, images and images.unpacked()


def _twice(values: Tensor, dim: int, shared: int) -> Tensor:
    """Append the columns behind the shared ones once more."""
    return torch.cat([values, values.narrow(dim, shared, values.shape[dim] - shared)], dim)


def _own_images(visible: Tensor, shared: int) -> Tensor:
    """Let the first part of each row see its first images and the second part the others: [R, L, I] to [R, Q, 2I]."""
    nothing = torch.zeros_like(visible)
    first, second = torch.cat([visible, nothing], -1), torch.cat([nothing, visible], -1)
    return torch.cat([first, second[:, shared:]], 1)


def _images(prompt: Prompt) -> dict[str, Tensor]:
    """Order both branches' images as a packed row shows them: its clean one, then its noised one."""
    pixels = family_of(prompt.model).pixels
    keys = prompt.clean.keys() - prompt.text_keys
    if pixels == "row":
        return {key: torch.cat([side[key] for side in prompt.sides], 1) for key in keys}
    if pixels == "image":
        return {key: torch.stack([side[key] for side in prompt.sides], 1).flatten(0, 1) for key in keys}
    grids = prompt.clean["image_grid_thw"]
    patches = grids.prod(-1).tolist()
    pairs = zip(*(side["pixel_values"].split(patches) for side in prompt.sides), strict=True)
    in_pairs = torch.cat([image for pair in pairs for image in pair])
    return {"pixel_values": in_pairs, "image_grid_thw": grids.repeat_interleave(2, 0)}


def _sees(mask: Tensor, shared: int) -> Tensor:
    """Return which column sees which, bool [R, Q, Q]."""
    length = mask.shape[1]
    columns = _twice(mask, 1, shared).bool()
    index = torch.arange(columns.shape[1], device=mask.device)
    sees = index[None, :] <= index[:, None]
    sees[length:, shared:length] = False
    # A padding column sees itself: a row of a softmax must not be empty.
    return (sees & columns[:, None, :]) | torch.eye(len(index), dtype=torch.bool, device=mask.device)


def _attention(decoder: Any) -> str:
    return str(decoder.config.get_text_config(decoder=True)._attn_implementation)
