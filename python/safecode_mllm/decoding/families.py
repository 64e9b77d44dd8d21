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
        decoder: attribute of the language model that does all but the prompt's pass and owns `generate`; "" for a model
            that does so itself.
        attends_to_images: the text attends to image states in every pass; they travel beside the KV cache.
    """

    title: str
    multimodal_rope: bool = False
    decoder: str = ""
    attends_to_images: bool = False


FAMILIES: dict[str, Family] = {
    "llava": Family("LLaVA 1.5"),
    "llava_next": Family("LLaVA-NeXT"),
    "qwen2_vl": Family("Qwen2-VL", multimodal_rope=True),
    "qwen2_5_vl": Family("Qwen2.5-VL", multimodal_rope=True),
    "qwen3_vl": Family("Qwen3-VL", multimodal_rope=True),
    "instructblip": Family("InstructBLIP", decoder="language_model"),
    "idefics": Family("IDEFICS", attends_to_images=True),
}

# Configuration fields that hold tokens standing for images or video: never text, so never to be generated.
_IMAGE_FIELDS = ("image_token_id", "image_token_index")
_PLACEHOLDER_FIELDS = (
    *_IMAGE_FIELDS,
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


def decoder_of(model: Any) -> Any:
    """Return the module that does every pass behind the prompt's and owns `generate`: the model or a part of it.

    Raises:
        UnsupportedModelError: that part is an encoder and a decoder.
    """
    name = family_of(model).decoder
    decoder = getattr(model, name) if name else model
    if getattr(decoder.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} on {type(decoder).__name__} is not supported yet: its language model has an "
            "encoder; use a checkpoint with a decoder-only one"
        )
    return decoder


def placeholder_ids(model: Any) -> list[int]:
    """Return the ids of the image and video placeholder tokens of a model, sorted."""
    return _token_ids(model, _PLACEHOLDER_FIELDS)


def image_token_ids(model: Any) -> list[int]:
    """Return the ids of the tokens of a model that stand for image features, sorted."""
    return _token_ids(model, _IMAGE_FIELDS)


def _token_ids(model: Any, fields: tuple[str, ...]) -> list[int]:
    found = {getattr(model.config, field, None) for field in fields}
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


@dataclass(frozen=True)
class ImageStates:
    """What the text attends to in every pass beside the KV cache.

    Attributes:
        argument: name under which `forward` takes the states.
        states: floating [R, I, S, H], for I images of S states.
        visible: int64 [R, 1, I], which images the newest column sees.
    """

    argument: str
    states: Tensor
    visible: Tensor

    def rows(self, index: Tensor | slice) -> ImageStates:
        """Return the states of the rows of `index`, int64 [N] or a slice."""
        return ImageStates(self.argument, self.states[index], self.visible[index])

    def load(self, other: ImageStates) -> None:
        """Take over the values of others of the same shape."""
        self.states.copy_(other.states)
        self.visible.copy_(other.visible)

    def seeing(self, visible: Tensor) -> ImageStates:
        """Return the same states for a newest column that sees the images of `visible`, int64 [R, 1, I]."""
        return ImageStates(self.argument, self.states, visible)

    def arguments(self, columns: int) -> dict[str, Tensor]:
        """Return the arguments of a forward pass over `columns` new columns that see what the newest one sees."""
        return {self.argument: self.states, "image_attention_mask": self.visible.expand(-1, columns, -1)}


def prefill(model: Any, **inputs: Any) -> tuple[Tensor, ImageStates | None]:
    """Run the prompt's forward pass, images included, over an empty KV cache.

    Args:
        model: the Hugging Face model.
        inputs: arguments of its `forward`: processor output, mask, positions, cache.

    Returns:
        logits [B, V] as `forward` returns them, and the image states that later passes need, or None.
    """
    # A wrapper hands on to its decoder the arguments that it does not name itself.
    output = _run(model, decoder_of(model), 0, inputs)
    if not family_of(model).attends_to_images:
        return output.logits[:, -1], None
    argument = "perceiver_embeddings" if model.config.use_resampler else "image_encoder_embeddings"
    visible = inputs["image_attention_mask"][:, -1:]
    return output.logits[:, -1], ImageStates(argument, output.image_hidden_states, visible)


def forward(decoder: Any, *, cached: int | Tensor, **inputs: Any) -> Tensor:
    """Run one forward pass behind the prompt's, over a KV cache, and return the logits of the last position.

    Args:
        decoder: as `decoder_of` returns it.
        cached: number of positions already in the cache, or the place of the one new column, int64 [1] (transformers 4
            wants to be told).
        inputs: arguments of the decoder's `forward`.

    Returns:
        logits [B, V] of the last position, in the model's dtype: a fresh tensor that the caller may write to.
    """
    return _run(decoder, decoder, cached, inputs).logits[:, -1]


def _run(module: Any, taker: Any, cached: int | Tensor, inputs: dict[str, Any]) -> Any:
    taker_class: Any = type(taker)
    accepted = forward_parameters(taker_class)
    # transformers 4 lists cache_position in every multimodal forward; version 5 removed it.
    if "cache_position" in accepted:
        ids = inputs["input_ids"]
        if not isinstance(cached, Tensor):
            cached = torch.arange(cached, cached + ids.shape[1], device=ids.device)
        inputs["cache_position"] = cached
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = 1
    return module(use_cache=True, return_dict=True, **inputs)
