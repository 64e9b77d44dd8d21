"""Tiny random models of the real classes, built offline, and prompts for them.

Weights are drawn so that logits spread over a few units and the image moves them visibly: with the library's default
initialisation a lost image or a swapped branch would change nothing and every test would pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

import tiny_tier2
from safecode_mllm.decoding.families import decoder_of
from tiny_parts import (
    BOS,
    IMAGE,
    PAD,
    VISION_END,
    VISION_START,
    Images,
    TinyTokens,
    clip,
    llama,
    random_words,
)
from tiny_processors import PROCESSOR_NAMES, tiny_processor
from tiny_tier2_processors import tier2_processor

_QWEN_PATCH = 4
_NEW_ROPE = int(transformers.__version__.split(".")[0]) >= 5

# Families whose processors take a chat, so that the front door serves them.
CHAT_NAMES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FAMILY_NAMES = (*CHAT_NAMES, "instructblip", "idefics", "idefics3")
# Tested on the newest transformers, in the dynamic loop and with the self-judge.
TIER2_NAMES = (*sorted(set(tiny_tier2.BUILDERS) - set(FAMILY_NAMES)), "qwen3_vl_moe")
_QUERIES_FIRST = ("instructblip", "blip_2", "paligemma")


@dataclass
class TinyModel:
    """A model and the function that makes a left-padded prompt batch of B rows, row b longer by `extra[b]` words."""

    name: str
    model: Any
    prompts: Callable[..., dict[str, Tensor]]


def tiny_model(name: str, seed: int = 0) -> TinyModel:
    """Build the tiny model of a family and its prompts of random words."""
    model, images = build(name, TinyTokens(), _QWEN_PATCH, seed)

    return TinyModel(name, model, tiny_prompts(name, images))


def tiny_prompts(name: str, images: Images) -> Callable[..., dict[str, Tensor]]:
    """Return the function that makes a family's prompt batches, see TinyModel."""

    def prompts(rows: int = 1, extra: tuple[int, ...] = (), seed: int = 1) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        counts, pixels = images(rows, generator)
        ids = []
        for row, count in enumerate(counts):
            before = random_words(6 + (extra[row] if extra else 0), generator)
            ids.append(_arrange(name, before, [IMAGE] * count, random_words(5, generator)))
        batch = _left_pad(ids)
        return batch | _along_tokens(name, batch["input_ids"], pixels) | pixels

    return prompts


def _arrange(name: str, before: list[int], image: list[int], after: list[int]) -> list[int]:
    """Put words and image tokens into the order that the family's processor gives them."""
    if name.startswith(_QUERIES_FIRST):  # stand-ins for what the text model is given of the image
        return [*image, BOS, *before, *after]
    if name.startswith("qwen"):
        return [*before, VISION_START, *image, VISION_END, *after]
    return [BOS, *before, *image, *after]


def _along_tokens(name: str, ids: Tensor, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a processor says about each token beside its id."""
    is_image = ids == IMAGE
    seen = is_image.cumsum(-1) > 0
    if name.startswith("qwen") and _NEW_ROPE:
        return {"mm_token_type_ids": is_image.int()}
    if name == "gemma3":
        return {"token_type_ids": is_image.long()}
    if name == "paligemma":
        return {"token_type_ids": torch.zeros_like(ids)}
    if name == "idefics":  # every token from the image on attends to it
        return {"image_attention_mask": seen[..., None].long()}
    if name == "mllama":  # and to each of its tiles
        return {"cross_attention_mask": seen[..., None, None] * pixels["aspect_ratio_mask"][:, None]}
    return {}


def build(name: str, tokens: TinyTokens, patch: int, seed: int = 0) -> tuple[Any, Any]:
    """Build the model of a family for a vocabulary and (Qwen) a patch size; returns it and its picture maker."""
    torch.manual_seed(seed)
    config, model_class, images = _BUILDERS[name](tokens, patch)
    model = model_class(config).eval()
    decoder_of(model).set_attn_implementation("sdpa")  # not all parts of InstructBLIP know another one
    randomise(model, tokens, seed)
    for owner in {model, decoder_of(model)}:
        generation = owner.generation_config
        generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = tokens.pad, tokens.bos, tokens.eos
    return model, images


def build_class(name: str) -> tuple[Any, type]:
    """Return configuration and class of a family's tiny model, without building it."""
    config, model_class, _ = _BUILDERS[name](TinyTokens(), _QWEN_PATCH)
    return config, model_class


def tiny_chat_model(name: str, seed: int = 0) -> tuple[Any, Any]:
    """Return a tiny random model that fits the tiny processor of its family, and that processor."""
    if name not in PROCESSOR_NAMES:
        return _tier2_chat_model(name, seed)
    processor = tiny_processor(name)
    ids = processor.tokenizer.convert_tokens_to_ids
    qwen = name.startswith("qwen")
    tokens = TinyTokens(
        len(processor.tokenizer),
        processor.tokenizer.pad_token_id,
        processor.tokenizer.pad_token_id if qwen else processor.tokenizer.bos_token_id,
        processor.tokenizer.eos_token_id,
        ids("<|image_pad|>" if qwen else "<image>"),
        *(ids(token) for token in ("<|video_pad|>", "<|vision_start|>", "<|vision_end|>") if qwen),
    )
    patch = processor.image_processor.patch_size if qwen else 0
    return build(name, tokens, patch, seed)[0], processor


def _tier2_chat_model(name: str, seed: int) -> tuple[Any, Any]:
    processor = tier2_processor(name)
    tokenizer = processor.tokenizer

    def token(*roles: str) -> int:
        """The first of these tokens that there is; an id that nothing writes without any."""
        found = [getattr(tokenizer, f"{role}_token", None) for role in roles]
        return next((tokenizer.convert_tokens_to_ids(text) for text in found if text), tokenizer.unk_token_id)

    tokens = TinyTokens(
        len(tokenizer), tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id,
        token("image", "context_image"), token("video"), token("boi", "start_image"), token("eoi", "end_image"),
    )  # fmt: skip
    return build(name, tokens, 0, seed)[0], processor


def noised_copy(inputs: dict[str, Tensor], seed: int = 7, std: float = 2.0) -> dict[str, Tensor]:
    """The same prompt with noised pixels; exact-zero padding stays zero."""
    noise = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(seed)) * std
    pixels = inputs["pixel_values"]
    return dict(inputs, pixel_values=torch.where(pixels == 0, pixels, pixels + noise))


def extended(inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """The prompt continued to `ids` [B, L + n] for a forward pass without a cache."""
    added = ids.shape[1] - inputs["input_ids"].shape[1]
    longer = dict(inputs, input_ids=ids)
    # PaliGemma's prompt is of type 0 and its answer of type 1; where there are images in the types, text is 0.
    answer = int("token_type_ids" in longer and not longer["token_type_ids"].any())
    for key, fill in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", answer)):
        if key in longer:
            tail = torch.full((ids.shape[0], added), fill, dtype=longer[key].dtype)
            longer[key] = torch.cat([longer[key], tail], 1)
    for key in ("image_attention_mask", "cross_attention_mask"):
        if key in longer:
            seen = longer[key]
            longer[key] = torch.cat([seen, seen[:, -1:].expand(-1, added, *seen.shape[2:])], 1)
    return longer


def _left_pad(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _llava(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    config = transformers.LlavaConfig(
        vision_config=clip(28), text_config=llama(tokens), image_token_index=tokens.image, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=16,
    )  # fmt: skip
    config.image_token_id = tokens.image

    def images(rows: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        return [16] * rows, {"pixel_values": torch.randn(rows, 3, 28, 28, generator=generator)}

    return config, transformers.LlavaForConditionalGeneration, images


def _llava_next(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    config = transformers.LlavaNextConfig(
        vision_config=clip(14), text_config=llama(tokens, model_type="mistral", sliding_window=None),
        image_token_index=tokens.image, vision_feature_layer=-2, vision_feature_select_strategy="default",
        image_grid_pinpoints=[[14, 28], [28, 14], [28, 28]], image_seq_length=4,
    )  # fmt: skip
    config.image_token_id = tokens.image

    def images(rows: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        # Two shapes in turn: numbers of patches and of tokens differ, so patches are padded with zeros.
        sizes = [(28, 28) if row % 2 == 0 else (14, 28) for row in range(rows)]
        patches = [5 if size == (28, 28) else 3 for size in sizes]
        counts = [4 + 4 * 5 if size == (28, 28) else 4 + 2 * 5 for size in sizes]
        pixels = torch.zeros(rows, max(patches), 3, 14, 14)
        for row, count in enumerate(patches):
            pixels[row, :count] = torch.randn(count, 3, 14, 14, generator=generator)
        return counts, {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}

    return config, transformers.LlavaNextForConditionalGeneration, images


def _qwen(tokens: TinyTokens, text: dict[str, Any], vision: dict[str, Any], name: str) -> tuple[Any, type, Any]:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = llama(tokens, **text)
    del text["model_type"]
    if _NEW_ROPE:
        text["rope_parameters"] = rope
    else:
        text["rope_scaling"] = rope | ({} if name == "Qwen3VL" else {"type": "default"})
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision, image_token_id=tokens.image, video_token_id=tokens.video,
        vision_start_token_id=tokens.vision_start, vision_end_token_id=tokens.vision_end,
    )  # fmt: skip

    def images(rows: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        grids = [(1, 4, 6) if row % 2 == 0 else (1, 6, 8) for row in range(rows)]
        patches = sum(height * width for _, height, width in grids)
        pixels = torch.randn(patches, 3 * 2 * vision["patch_size"] ** 2, generator=generator)
        counts = [height * width // 4 for _, height, width in grids]
        return counts, {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}

    return config, getattr(transformers, f"{name}ForConditionalGeneration"), images


def _qwen_vision(patch: int, **changes: Any) -> dict[str, Any]:
    return dict(
        depth=2, patch_size=patch, spatial_merge_size=2, temporal_patch_size=2, num_heads=2, in_channels=3
    ) | changes  # fmt: skip


def _qwen2_vl(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    return _qwen(tokens, {}, _qwen_vision(patch, embed_dim=32, hidden_size=64, mlp_ratio=2), "Qwen2VL")


def _qwen2_5_vl(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    vision = _qwen_vision(
        patch, hidden_size=32, intermediate_size=48, out_hidden_size=64, window_size=4 * patch,
        fullatt_block_indexes=[1], in_chans=3,
    )  # fmt: skip
    return _qwen(tokens, {}, vision, "Qwen2_5_VL")


def _qwen3_vl(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    vision = _qwen_vision(
        patch, depth=3, hidden_size=32, intermediate_size=48, out_hidden_size=64, num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
    )  # fmt: skip
    return _qwen(tokens, {"head_dim": 16}, vision, "Qwen3VL")


def _qwen3_vl_moe(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    vision = _qwen_vision(
        patch, depth=3, hidden_size=32, intermediate_size=48, out_hidden_size=64, num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
    )  # fmt: skip
    text = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return _qwen(tokens, text, vision, "Qwen3VLMoe")


def _instructblip(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    layers = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.InstructBlipConfig(
        vision_config=layers | dict(image_size=28, patch_size=7),
        qformer_config=layers | dict(vocab_size=tokens.size, encoder_hidden_size=32, cross_attention_frequency=1),
        text_config=llama(tokens), num_query_tokens=8, image_token_index=tokens.image,
    )  # fmt: skip

    def images(rows: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        pixels = torch.randn(rows, 3, 28, 28, generator=generator)
        words = torch.tensor([random_words(5, generator) for _ in range(rows)])
        return [8] * rows, {
            "pixel_values": pixels, "qformer_input_ids": words, "qformer_attention_mask": torch.ones_like(words)
        }  # fmt: skip

    return config, transformers.InstructBlipForConditionalGeneration, images


def _idefics(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    resampler = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8}
    config = transformers.IdeficsConfig(
        vocab_size=tokens.size, additional_vocab_size=2, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, cross_layer_interval=2, use_resampler=True, alpha_initializer="ones",
        max_position_embeddings=512, pad_token_id=tokens.pad, bos_token_id=tokens.bos, eos_token_id=tokens.eos,
        vision_config=dict(
            embed_dim=32, image_size=28, intermediate_size=48, patch_size=7, num_hidden_layers=2, num_attention_heads=2
        ),
        perceiver_config={"use_resampler": True, **resampler},
    )  # fmt: skip

    def images(rows: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        return [1] * rows, {"pixel_values": torch.randn(rows, 1, 3, 28, 28, generator=generator)}

    return config, transformers.IdeficsForVisionText2Text, images


_BUILDERS: dict[str, Callable[[TinyTokens, int], tuple[Any, type, Any]]] = {
    **tiny_tier2.BUILDERS,
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "instructblip": _instructblip,
    "idefics": _idefics,
}


@torch.no_grad()
def randomise(model: Any, tokens: TinyTokens, seed: int) -> None:
    """Redraw all weights: norms near one, biases small, matrices scaled to keep activations, a wide output head."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if "alpha" in name:  # the gates of cross-attention
            weight.copy_(0.8 + 0.1 * noise)
        elif "query_tokens" in name or "latents" in name:
            weight.copy_(noise)
        elif weight.dim() == 1 and name.endswith("gate"):  # the gates of cross-attention
            weight.copy_(0.8 + 0.1 * noise)
        elif "experts" in name:
            weight.copy_(noise * 1.2 / weight.shape[-1] ** 0.5)
        elif weight.dim() == 1:
            is_norm = name.endswith("norm.weight") or "layernorm" in name.lower()
            weight.copy_((1.0 if is_norm else 0.0) + 0.05 * noise)
        elif "lm_head" in name:
            weight.copy_(0.2 * noise)
            if len(weight) == tokens.size:
                # Never the best: a stock model that wrote an image token would crash.
                weight[tokens.placeholders()] = 0.0
        elif "embed" in name:
            weight.copy_(0.7 * noise)
        else:
            weight.copy_(noise * 1.2 / (weight.numel() / weight.shape[0]) ** 0.5)
