"""Tiny random models of the families that are tested on the newest transformers only."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from tiny_parts import Images, TinyTokens, llama, random_words

_VIT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
_PICTURE = 16
_PATCH = 4


def siglip(size: int = _PICTURE) -> dict[str, Any]:
    return _VIT | dict(model_type="siglip_vision_model", image_size=size, patch_size=_PATCH)


def square_pictures(count: int, size: int) -> Images:
    """One picture of `size` pixels each row, worth `count` tokens."""

    def images(rows: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        return [count] * rows, {"pixel_values": torch.randn(rows, 3, size, size, generator=generator)}

    return images


def idefics3(tokens: TinyTokens, patch: int, name: str = "Idefics3") -> tuple[Any, type, Any]:
    config = getattr(transformers, f"{name}Config")(
        vision_config=_VIT | dict(image_size=_PICTURE, patch_size=_PATCH), text_config=llama(tokens),
        image_token_id=tokens.image, scale_factor=2, pad_token_id=tokens.pad, tie_word_embeddings=False,
    )  # fmt: skip

    def images(rows: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        # Two tiles and one in turn; a tile that a row lacks is all zeros, which is how the model knows it.
        tiles = [2 - row % 2 for row in range(rows)]
        pixels = torch.zeros(rows, max(tiles), 3, _PICTURE, _PICTURE)
        seen = torch.zeros(rows, max(tiles), _PICTURE, _PICTURE, dtype=torch.long)
        for row, count in enumerate(tiles):
            pixels[row, :count] = torch.randn(count, 3, _PICTURE, _PICTURE, generator=generator)
            seen[row, :count] = 1
        return [4 * count for count in tiles], {"pixel_values": pixels, "pixel_attention_mask": seen}

    return config, getattr(transformers, f"{name}ForConditionalGeneration"), images


def smolvlm(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    return idefics3(tokens, patch, "SmolVLM")


def idefics2(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    config = transformers.Idefics2Config(
        vision_config=_VIT | dict(image_size=_PICTURE, patch_size=_PATCH),
        perceiver_config=dict(
            hidden_size=64, resampler_n_latents=4, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=16,
            num_key_value_heads=1,
        ),
        text_config=llama(tokens, model_type="mistral", sliding_window=None), image_token_id=tokens.image,
        tie_word_embeddings=False,
    )  # fmt: skip

    def images(rows: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        pixels = torch.randn(rows, 1, 3, _PICTURE, _PICTURE, generator=generator)
        seen = torch.ones(rows, 1, _PICTURE, _PICTURE, dtype=torch.long)
        # Every second picture is less wide: the rest is padding.
        pixels[1::2, ..., 12:], seen[1::2, ..., 12:] = 0, 0
        return [4] * rows, {"pixel_values": pixels, "pixel_attention_mask": seen}

    return config, transformers.Idefics2ForConditionalGeneration, images


def llava_onevision(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    config = transformers.LlavaOnevisionConfig(
        vision_config=siglip(8), text_config=llama(tokens, model_type="qwen2"), image_token_index=tokens.image,
        video_token_index=tokens.video, vision_feature_layer=-1, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9", tie_word_embeddings=False,
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
    )  # fmt: skip

    def images(rows: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        sizes = [(16, 16) if row % 2 == 0 else (8, 16) for row in range(rows)]
        tiles = [5 if size == (16, 16) else 3 for size in sizes]
        # The whole picture, then its tiles with one token at the end of each line.
        counts = [4 + 4 * 5 if size == (16, 16) else 4 + 2 * 5 for size in sizes]
        pixels = torch.zeros(rows, max(tiles), 3, 8, 8)
        for row, count in enumerate(tiles):
            pixels[row, :count] = torch.randn(count, 3, 8, 8, generator=generator)
        return counts, {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}

    return config, transformers.LlavaOnevisionForConditionalGeneration, images


def internvl(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    config = transformers.InternVLConfig(
        vision_config=_VIT | dict(model_type="internvl_vision", image_size=[_PICTURE] * 2, patch_size=[_PATCH] * 2),
        text_config=llama(tokens, model_type="qwen2"), image_token_id=tokens.image, downsample_ratio=0.5,
        vision_feature_layer=-1, tie_word_embeddings=False,
    )  # fmt: skip
    return config, transformers.InternVLForConditionalGeneration, square_pictures(4, _PICTURE)


def gemma3(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    text = llama(tokens, model_type="gemma3_text", num_hidden_layers=4) | dict(
        head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2, query_pre_attn_scalar=16
    )
    config = transformers.Gemma3Config(
        text_config=text, vision_config=siglip(), mm_tokens_per_image=4, image_token_index=tokens.image,
        boi_token_index=tokens.vision_start, eoi_token_index=tokens.vision_end, tie_word_embeddings=False,
    )  # fmt: skip
    return config, transformers.Gemma3ForConditionalGeneration, square_pictures(4, _PICTURE)


def paligemma(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    config = transformers.PaliGemmaConfig(
        text_config=llama(tokens, model_type="gemma", head_dim=16), vision_config=siglip() | dict(projection_dim=64),
        image_token_index=tokens.image, projection_dim=64, hidden_size=64, vocab_size=tokens.size,
        tie_word_embeddings=False,
    )  # fmt: skip
    return config, transformers.PaliGemmaForConditionalGeneration, square_pictures(16, _PICTURE)


def _pixtral_pictures(merge: int, end_of_line: int) -> Images:
    def images(rows: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        sizes = [(16, 16) if row % 2 == 0 else (8, 16) for row in range(rows)]
        pixels = torch.zeros(rows, 3, max(height for height, _ in sizes), 16)
        for row, (height, width) in enumerate(sizes):
            pixels[row, :, :height, :width] = torch.randn(3, height, width, generator=generator)
        side = _PATCH * merge
        counts = [(height // side) * (width // side + end_of_line) for height, width in sizes]
        return counts, {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}

    return images


def _pixtral_tower() -> dict[str, Any]:
    return _VIT | dict(model_type="pixtral", image_size=_PICTURE, patch_size=_PATCH, head_dim=16)


def mistral3(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    config = transformers.Mistral3Config(
        vision_config=_pixtral_tower(), text_config=llama(tokens, model_type="mistral", sliding_window=None),
        image_token_index=tokens.image, spatial_merge_size=2, vision_feature_layer=-1, tie_word_embeddings=False,
    )  # fmt: skip
    return config, transformers.Mistral3ForConditionalGeneration, _pixtral_pictures(2, 0)


def pixtral(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    config = transformers.LlavaConfig(
        vision_config=_pixtral_tower(), text_config=llama(tokens, model_type="mistral", sliding_window=None),
        image_token_index=tokens.image, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return config, transformers.LlavaForConditionalGeneration, _pixtral_pictures(1, 0)


_QFORMER = _VIT | dict(encoder_hidden_size=32, cross_attention_frequency=1)
_QUERIES = 8


def blip_2(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    text = dict(
        model_type="opt", vocab_size=tokens.size, hidden_size=64, ffn_dim=96, num_hidden_layers=3,
        num_attention_heads=4, word_embed_proj_dim=64, max_position_embeddings=256, pad_token_id=tokens.pad,
        bos_token_id=tokens.bos, eos_token_id=tokens.eos, tie_word_embeddings=False,
    )  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=_VIT | dict(image_size=28, patch_size=7), qformer_config=_QFORMER | dict(vocab_size=tokens.size),
        text_config=text, num_query_tokens=_QUERIES, image_token_index=tokens.image,
    )  # fmt: skip
    return config, transformers.Blip2ForConditionalGeneration, square_pictures(_QUERIES, 28)


def _t5(tokens: TinyTokens) -> dict[str, Any]:
    return dict(
        model_type="t5", vocab_size=tokens.size, d_model=64, d_kv=16, d_ff=96, num_layers=3, num_decoder_layers=3,
        num_heads=4, pad_token_id=tokens.pad, eos_token_id=tokens.eos, decoder_start_token_id=tokens.pad,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip


def instructblip_t5(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    config = transformers.InstructBlipConfig(
        vision_config=_VIT | dict(image_size=28, patch_size=7), qformer_config=_QFORMER | dict(vocab_size=tokens.size),
        text_config=_t5(tokens), num_query_tokens=_QUERIES, image_token_index=tokens.image,
    )  # fmt: skip

    def images(rows: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        words = torch.tensor([random_words(5, generator) for _ in range(rows)])
        counts, inputs = square_pictures(_QUERIES, 28)(rows, generator)
        return counts, inputs | {"qformer_input_ids": words, "qformer_attention_mask": torch.ones_like(words)}

    return config, transformers.InstructBlipForConditionalGeneration, images


def blip_2_t5(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    config = transformers.Blip2Config(
        vision_config=_VIT | dict(image_size=28, patch_size=7), qformer_config=_QFORMER | dict(vocab_size=tokens.size),
        text_config=_t5(tokens), num_query_tokens=_QUERIES, image_token_index=tokens.image,
    )  # fmt: skip
    return config, transformers.Blip2ForConditionalGeneration, square_pictures(_QUERIES, 28)


# All that fit into four tiles, in the order of the image processor.
_RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]


def mllama(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    text = dict(
        vocab_size=tokens.size, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, cross_attention_layers=[1, 3], max_position_embeddings=512, pad_token_id=tokens.pad,
        bos_token_id=tokens.bos, eos_token_id=tokens.eos, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=48, attention_heads=2, num_hidden_layers=2, num_global_layers=1,
        image_size=_PICTURE, patch_size=_PATCH, max_num_tiles=4, supported_aspect_ratios=_RATIOS,
        intermediate_layers_indices=[0, 1], vision_output_dim=96,
    )  # fmt: skip
    config = transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=tokens.image)

    def images(rows: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        # Two tiles side by side and one in turn.
        tiles = [2 - row % 2 for row in range(rows)]
        pixels = torch.zeros(rows, 1, 4, 3, _PICTURE, _PICTURE)
        for row, count in enumerate(tiles):
            pixels[row, 0, :count] = torch.randn(count, 3, _PICTURE, _PICTURE, generator=generator)
        ratio_ids = torch.tensor([[2 if count == 2 else 1] for count in tiles])
        ratio_mask = torch.tensor([[[1] * count + [0] * (4 - count)] for count in tiles])
        return [1] * rows, {"pixel_values": pixels, "aspect_ratio_ids": ratio_ids, "aspect_ratio_mask": ratio_mask}

    return config, transformers.MllamaForConditionalGeneration, images


BUILDERS = {
    "blip_2": blip_2,
    "blip_2_t5": blip_2_t5,
    "gemma3": gemma3,
    "idefics2": idefics2,
    "idefics3": idefics3,
    "instructblip_t5": instructblip_t5,
    "internvl": internvl,
    "llava_onevision": llava_onevision,
    "mistral3": mistral3,
    "mllama": mllama,
    "paligemma": paligemma,
    "pixtral": pixtral,
    "smolvlm": smolvlm,
}
