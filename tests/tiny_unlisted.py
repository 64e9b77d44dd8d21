"""Tiny random models of real classes that the package does not list."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tiny_models import TinyModel, randomise, tiny_prompts
from tiny_parts import TinyTokens, clip, llama
from tiny_tier2 import siglip, square_pictures

_TOKENS = TinyTokens()


def _vipllava() -> tuple[Any, type, Any]:
    config = transformers.VipLlavaConfig(
        vision_config=clip(28), text_config=llama(_TOKENS), image_token_index=_TOKENS.image,
        vision_feature_layers=[-2, -1],
    )  # fmt: skip
    return config, transformers.VipLlavaForConditionalGeneration, square_pictures(16, 28)


def _aya_vision() -> tuple[Any, type, Any]:
    layers = ["sliding_attention", "full_attention", "full_attention"]
    config = transformers.AyaVisionConfig(
        vision_config=siglip(), text_config=llama(_TOKENS, model_type="cohere2", sliding_window=8, layer_types=layers),
        image_token_index=_TOKENS.image, downsample_factor=2, vision_feature_layer=-1,
        vision_feature_select_strategy="full", adapter_layer_norm_eps=1e-6, tie_word_embeddings=False,
    )  # fmt: skip
    return config, transformers.AyaVisionForConditionalGeneration, square_pictures(4, 16)


def _lfm2_vl() -> tuple[Any, type, Any]:
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.Lfm2VlConfig(
        vision_config=vision | dict(model_type="siglip2_vision_model", num_patches=16, patch_size=4),
        text_config=llama(_TOKENS, model_type="lfm2") | dict(layer_types=["conv", "full_attention", "conv"]),
        image_token_id=_TOKENS.image, downsample_factor=2,
    )  # fmt: skip

    def images(rows: int, generator: torch.Generator) -> tuple[list[int], dict[str, torch.Tensor]]:
        return [4] * rows, {
            "pixel_values": torch.randn(rows, 16, 48, generator=generator),
            "pixel_attention_mask": torch.ones(rows, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * rows),
        }

    return config, transformers.Lfm2VlForConditionalGeneration, images


_BUILDERS = {"vipllava": _vipllava, "aya_vision": _aya_vision, "lfm2_vl": _lfm2_vl}


def unlisted_model(name: str) -> TinyModel:
    """Build the tiny model of a class that the package does not list."""
    torch.manual_seed(0)
    config, model_class, images = _BUILDERS[name]()
    model = model_class(config).eval()
    model.set_attn_implementation("sdpa")
    randomise(model, _TOKENS, 0)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = _TOKENS.pad, _TOKENS.eos
    return TinyModel(name, model, tiny_prompts(name, images))
