"""What differs between model classes. The only file that knows model names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """One group of model classes that decode alike.

    Attributes:
        title: the name people use.
        multimodal_rope: positions have three axes (time, height, width), from the model's own `get_rope_index`.
    """

    title: str
    multimodal_rope: bool = False


FAMILIES: dict[str, Family] = {
    "llava": Family("LLaVA 1.5"),
    "llava_next": Family("LLaVA-NeXT"),
    "qwen2_vl": Family("Qwen2-VL", multimodal_rope=True),
    "qwen2_5_vl": Family("Qwen2.5-VL", multimodal_rope=True),
    "qwen3_vl": Family("Qwen3-VL", multimodal_rope=True),
}

# Configuration fields that hold tokens standing for images or video: never text, so never to be generated.
_PLACEHOLDER_FIELDS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "vision_start_token_id",
    "vision_end_token_id",
)


def family_of(model: Any) -> Family:
    """Return the family of a Hugging Face model; raises UnsupportedModelError for a class that is not known."""
    return family_of_config(model.config)


def family_of_config(config: Any) -> Family:
    """Return the family that a configuration names, before any weight is loaded; raises as `family_of` does."""
    model_type = str(getattr(config, "model_type", None))
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported yet; supported types: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def placeholder_ids(model: Any) -> list[int]:
    """Return the ids of the image and video placeholder tokens of a model, sorted."""
    found = {getattr(model.config, field, None) for field in _PLACEHOLDER_FIELDS}
    return sorted(token for token in found if isinstance(token, int) and token >= 0)


def prompt_positions(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return explicit position ids of a left-padded prompt.

    They are always explicit: without them a second chunk raises on some multimodal-rope classes and is silently
    wrong on others.

    Args:
        model: the Hugging Face model.
        inputs: processor output with `input_ids` and `attention_mask` [B, L] and the image keys.

    Returns:
        int64 [B, L], or [3, B, L] for multimodal rope, on the device of `input_ids`.
    """
    mask = inputs["attention_mask"]
    if not family_of(model).multimodal_rope:
        return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    get_rope_index = model.model.get_rope_index
    accepted = inspect.signature(get_rope_index).parameters
    arguments = {key: inputs[key] for key in ("image_grid_thw", "mm_token_type_ids") if key in inputs}
    if "mm_token_type_ids" in accepted and "mm_token_type_ids" not in arguments:
        arguments["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    arguments = {key: value for key, value in arguments.items() if key in accepted}
    return get_rope_index(inputs["input_ids"], attention_mask=mask, **arguments)[0]


@lru_cache(maxsize=64)
def forward_parameters(model_class: Any) -> frozenset[str]:
    """Return the parameter names of a model class's `forward`; transformers versions differ in them."""
    return frozenset(inspect.signature(model_class.forward).parameters)


def forward(model: Any, *, cached: int, **inputs: Any) -> Tensor:
    """Run one forward pass over a KV cache and return the logits of the last position.

    Args:
        model: the Hugging Face model.
        cached: number of positions already in the cache (transformers 4 wants to be told).
        inputs: arguments of the model's `forward`.

    Returns:
        logits [B, V] of the last position, in the model's dtype: a fresh tensor that the caller may write to.
    """
    model_class: Any = type(model)
    accepted = forward_parameters(model_class)
    # transformers 4 lists cache_position in every multimodal forward; version 5 removed it.
    if "cache_position" in accepted:
        ids = inputs["input_ids"]
        inputs["cache_position"] = torch.arange(cached, cached + ids.shape[1], device=ids.device)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = 1
    return model(use_cache=True, return_dict=True, **inputs).logits[:, -1]
