"""What differs between model classes. The only file that knows model names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

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
        image_mask: key of the processor's output that says which images each token sees, where `forward` wants it in
            every pass.
        image_states: the text attends to image states that travel beside the KV cache.
        reads_ahead: tokens of the prompt see those behind them, so that a prompt cannot be continued as a prompt.
        verified: whether tests of this package compare it with plain decoding; if not, `probe` does so at first use.
        pixels: what the image inputs are ordered by, so that text before the image can be shared by rows and by packed
            pairs: "image" (dimension 0 counts images), "patch" (it counts patches; image_grid_thw says whose) or "row"
            (dimension 1 counts a row's images); None where it has not been shown that sharing changes nothing.
    """

    title: str
    multimodal_rope: bool = False
    decoder: str = ""
    image_mask: str = ""
    image_states: bool = False
    reads_ahead: bool = False
    verified: bool = True
    pixels: Literal["image", "patch", "row"] | None = None


FAMILIES: dict[str, Family] = {
    "llava": Family("LLaVA 1.5, Pixtral", pixels="image"),
    "llava_next": Family("LLaVA-NeXT", pixels="image"),
    "qwen2_vl": Family("Qwen2-VL", multimodal_rope=True, pixels="patch"),
    "qwen2_5_vl": Family("Qwen2.5-VL", multimodal_rope=True, pixels="patch"),
    "qwen3_vl": Family("Qwen3-VL", multimodal_rope=True, pixels="patch"),
    "instructblip": Family("InstructBLIP", decoder="language_model"),
    "idefics": Family("IDEFICS", image_mask="image_attention_mask", image_states=True, pixels="row"),
    "idefics3": Family("Idefics3", pixels="row"),
    "llava_onevision": Family("LLaVA-OneVision"),
    "qwen3_vl_moe": Family("Qwen3-VL MoE", multimodal_rope=True),
    "blip-2": Family("BLIP-2", decoder="language_model"),
    "idefics2": Family("Idefics2"),
    "smolvlm": Family("SmolVLM"),
    "internvl": Family("InternVL"),
    "gemma3": Family("Gemma 3"),
    "paligemma": Family("PaliGemma", reads_ahead=True),
    "mllama": Family("Mllama (Llama 3.2 Vision)", image_mask="cross_attention_mask"),
    "mistral3": Family("Mistral 3"),
}

# Arguments of a `forward` that takes images.
_IMAGE_ARGUMENTS = frozenset({"pixel_values", "image_embeds", "image_patches", "flattened_patches"})
# Configuration fields that hold tokens standing for images or video: never text, so never to be generated.
_IMAGE_FIELDS = ("image_token_id", "image_token_index")
_PICTURE_FIELDS = (*_IMAGE_FIELDS, "video_token_id", "video_token_index")
_PLACEHOLDER_FIELDS = (
    *_PICTURE_FIELDS,
    "vision_start_token_id",
    "vision_end_token_id",
)


def family_of(model: Any) -> Family:
    """Return the family of a Hugging Face model, a generic one for a class that is not listed.

    Raises:
        UnsupportedModelError: the model takes no images.
    """
    known = FAMILIES.get(_model_type(model.config))
    if known is not None:
        return known
    model_class: Any = type(model)
    accepted = forward_parameters(model_class)
    if not accepted & _IMAGE_ARGUMENTS:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model type {_model_type(model.config)!r}) takes no images; use a vision-language "
            f"model, for instance of the types {', '.join(sorted(FAMILIES))}"
        )
    return Family(
        type(model).__name__,
        multimodal_rope=hasattr(getattr(model, "model", None), "get_rope_index"),
        # A wrapper without a cache of its own hands everything to the language model inside.
        decoder="" if "past_key_values" in accepted or not hasattr(model, "language_model") else "language_model",
        image_mask=next((name for name in ("cross_attention_mask", "image_attention_mask") if name in accepted), ""),
        verified=False,
    )


def family_of_config(config: Any) -> Family:
    """Return the family that a configuration names, before any weight is loaded.

    Raises:
        UnsupportedModelError: transformers knows no image-text-to-text model of this type.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as LOADABLE

    model_type = _model_type(config)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in LOADABLE:
        return Family(model_type, verified=False)
    raise UnsupportedModelError(
        f"model type {model_type!r} is not supported: this version of transformers has no model of it that takes images"
        f" and text; types that are tested: {', '.join(sorted(FAMILIES))}"
    )


def _model_type(config: Any) -> str:
    return str(getattr(config, "model_type", None))


def decoder_of(model: Any) -> Any:
    """Return the module that does every pass behind the prompt's and owns `generate`: the model or a part of it."""
    name = family_of(model).decoder
    return getattr(model, name) if name else model


def has_encoder(decoder: Any) -> bool:
    """Whether the language model reads the prompt with an encoder and writes with a decoder, like T5."""
    return bool(getattr(decoder.config, "is_encoder_decoder", False))


def image_layers(decoder: Any) -> frozenset[int]:
    """Return the layers whose cache holds images instead of columns of text."""
    return frozenset(getattr(decoder.config.get_text_config(decoder=True), "cross_attention_layers", None) or ())


def placeholder_ids(model: Any) -> list[int]:
    """Return the ids of the image and video placeholder tokens of a model, sorted."""
    return _token_ids(model, _PLACEHOLDER_FIELDS)


def image_token_ids(model: Any) -> list[int]:
    """Return the ids of the tokens of a model that stand for image features, sorted."""
    return _token_ids(model, _IMAGE_FIELDS)


def logit_width(model: Any) -> int:
    """Return V, the width of a model's logits; a head's weight may be packed, so it is not looked at."""
    head = model.get_output_embeddings()
    return int(head.out_features) + int(getattr(head, "out_additional_features", 0))


def _token_ids(model: Any, fields: tuple[str, ...]) -> list[int]:
    found = {getattr(model.config, field, None) for field in fields}
    return sorted(token for token in found if isinstance(token, int) and token >= 0)


def text_columns(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return how many columns of each row, padding included, stand before its first image or video: int64 [B].

    Rows without either have none: nothing says where their image is.
    """
    ids, family = inputs["input_ids"], family_of(model)
    if family.image_states and family.image_mask in inputs:
        pictured = inputs[family.image_mask].bool().any(-1)
    else:
        pictured = torch.isin(ids, ids.new_tensor(_token_ids(model, _PICTURE_FIELDS)))
    return pictured.long().argmax(-1)


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
    forward = getattr(model_class, "forward", None)
    return frozenset() if forward is None else frozenset(inspect.signature(forward).parameters)


@dataclass(frozen=True)
class ImageStates:
    """What the text attends to in every pass beside the KV cache, or which part of the cache's images it sees.

    Attributes:
        mask: name under which `forward` takes what each column sees.
        visible: int64 [R, 1, I, ..], which of the row's I images (and their tiles) the newest column sees.
        argument: name under which `forward` takes the states; "" where they lie in the cache.
        states: floating [R, I, S, H], for I images of S states, or None.
    """

    mask: str
    visible: Tensor
    argument: str = ""
    states: Tensor | None = None

    @property
    def shape(self) -> tuple[torch.Size, ...]:
        """Of what there is: of what the columns see, and of the states."""
        return tuple(tensor.shape for tensor in (self.visible, self.states) if tensor is not None)

    def rows(self, index: Tensor | slice) -> ImageStates:
        """Return the states of the rows of `index`, int64 [N] or a slice."""
        states = None if self.states is None else self.states[index]
        return replace(self, visible=self.visible[index], states=states)

    def load(self, other: ImageStates) -> None:
        """Take over the values of others of the same shape."""
        if self.states is not None and other.states is not None:
            self.states.copy_(other.states)
        self.visible.copy_(other.visible)

    def seeing(self, visible: Tensor) -> ImageStates:
        """Return the same states for a newest column that sees the images of `visible`, int64 [R, 1, I, ..]."""
        return replace(self, visible=visible)

    def unpacked(self) -> ImageStates:
        """Return the states of rows that held two branches, one behind the other, as rows of one branch each."""
        images = self.visible.shape[2] // 2
        states = None if self.states is None else torch.cat([self.states[:, :images], self.states[:, images:]])
        return replace(self, states=states, visible=torch.cat([self.visible[:, :, images:]] * 2))

    def arguments(self, columns: int) -> dict[str, Any]:
        """Return the arguments of a forward pass over `columns` new columns that see what the newest one sees."""
        found = {self.mask: self.visible.expand(-1, columns, *self.visible.shape[2:])}
        return found if self.states is None else found | {self.argument: self.states}


def prefill(
    model: Any, inputs: Mapping[str, Any], *, cached: int = 0, ends: Sequence[int] = (-1,)
) -> tuple[Tensor, ImageStates | None]:
    """Run the prompt's forward pass, images included.

    Args:
        model: the Hugging Face model.
        inputs: arguments of its `forward`: processor output, mask, positions, cache.
        cached: number of positions that the KV cache holds already.
        ends: columns whose logits are wanted.

    Returns:
        logits [E * B, V] as `forward` returns them, first those of all rows at the first end, and the image states that
        later passes need, or None.
    """
    # A wrapper hands on to its decoder the arguments that it does not name itself.
    logits, output = _run(model, decoder_of(model), cached, ends, dict(inputs))
    family = family_of(model)
    if family.image_mask not in inputs:
        return logits, None
    seen = ImageStates(family.image_mask, inputs[family.image_mask][:, -1:])
    if family.image_states:
        seen = replace(seen, argument=_states_argument(model), states=output.image_hidden_states)
    return logits, seen


def no_images(model: Any, rows: int, columns: int) -> dict[str, Any]:
    """Return the arguments with which a pass over text that sees no image runs without one."""
    family, config = family_of(model), model.config
    if not family.image_states:
        return {}
    latents = config.perceiver_config.resampler_n_latents if config.use_resampler else 1
    states = torch.zeros(rows, 1, latents, config.vision_config.embed_dim, device=model.device, dtype=model.dtype)
    seen = torch.zeros(rows, columns, 1, device=model.device, dtype=torch.long)
    return {_states_argument(model): states, family.image_mask: seen}


def _states_argument(model: Any) -> str:
    return "perceiver_embeddings" if model.config.use_resampler else "image_encoder_embeddings"


def forward(decoder: Any, *, cached: int | Tensor, ends: Sequence[int] = (-1,), **inputs: Any) -> Tensor:
    """Run one forward pass behind the prompt's, over a KV cache, and return the logits of the last position.

    Args:
        decoder: as `decoder_of` returns it.
        cached: number of positions already in the cache, or the place of the one new column, int64 [1] (transformers 4
            wants to be told).
        ends: columns whose logits are wanted instead.
        inputs: arguments of the decoder's `forward`.

    Returns:
        logits [E * B, V] in the model's dtype, first those of all rows at the first end: a fresh tensor that the caller
        may write to.
    """
    return _run(decoder, decoder, cached, ends, inputs)[0]


def _run(
    module: Any, taker: Any, cached: int | Tensor, ends: Sequence[int], inputs: dict[str, Any]
) -> tuple[Tensor, Any]:
    taker_class: Any = type(taker)
    accepted = forward_parameters(taker_class)
    # transformers 4 lists cache_position in every multimodal forward; version 5 removed it.
    if "cache_position" in accepted:
        ids = inputs["input_ids"] if "input_ids" in inputs else inputs["decoder_input_ids"]
        if not isinstance(cached, Tensor):
            cached = torch.arange(cached, cached + ids.shape[1], device=ids.device)
        inputs["cache_position"] = cached
    known = FAMILIES.get(_model_type(module.config))
    last = tuple(ends) == (-1,)
    wanted: Any = slice(-1, None) if last else list(ends)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = 1 if last else torch.tensor(ends, device=inputs["input_ids"].device)
        output = module(use_cache=True, return_dict=True, **inputs)
        logits = output.logits
    elif known is not None and known.pixels is not None:
        # Classes of transformers 4 that would put every position through the output head, and do no more there.
        output = module.model(use_cache=True, return_dict=True, **inputs)
        logits = module.get_output_embeddings()(output.last_hidden_state[:, wanted])
    else:
        output = module(use_cache=True, return_dict=True, **inputs)
        logits = output.logits[:, wanted]
    return logits.transpose(0, 1).flatten(0, 1), output
