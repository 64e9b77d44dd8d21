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

from safecode_mllm.decoding.families import decoder_of
from tiny_processors import tiny_processor

VOCAB = 200
PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END = 0, 1, 2, 5, 6, 7, 8
_FIRST_WORD = 10  # ids below are special
_QWEN_PATCH = 4
_NEW_ROPE = int(transformers.__version__.split(".")[0]) >= 5

# Families whose processors take a chat, so that the front door serves them.
CHAT_NAMES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FAMILY_NAMES = (*CHAT_NAMES, "instructblip", "idefics")


@dataclass(frozen=True)
class TinyTokens:
    """Vocabulary size and special ids of a tiny model."""

    size: int = VOCAB
    pad: int = PAD
    bos: int = BOS
    eos: int = EOS
    image: int = IMAGE
    video: int = VIDEO
    vision_start: int = VISION_START
    vision_end: int = VISION_END

    def placeholders(self) -> list[int]:
        return [self.image, self.video, self.vision_start, self.vision_end]


@dataclass
class TinyModel:
    """A model and the function that makes a left-padded prompt batch of B rows, row b longer by `extra[b]` words."""

    name: str
    model: Any
    prompts: Callable[..., dict[str, Tensor]]


def tiny_model(name: str, seed: int = 0) -> TinyModel:
    """Build the tiny model of a family and its prompts of random words."""
    model, images = build(name, TinyTokens(), _QWEN_PATCH, seed)

    def prompts(rows: int = 1, extra: tuple[int, ...] = (), seed: int = 1) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        counts, pixels = images(rows, generator)
        words = [[_words(6 + (extra[row] if extra else 0), generator), _words(5, generator)] for row in range(rows)]
        mrope = name.startswith("qwen")
        opening, closing = ([VISION_START], [VISION_END]) if mrope else ([], [])
        if name == "instructblip":  # the query tokens stand in front of everything
            ids = [
                [*[IMAGE] * count, BOS, *before, *after] for (before, after), count in zip(words, counts, strict=True)
            ]
        else:
            ids = [
                [*([] if mrope else [BOS]), *before, *opening, *[IMAGE] * count, *closing, *after]
                for (before, after), count in zip(words, counts, strict=True)
            ]
        batch = _left_pad(ids)
        if mrope and _NEW_ROPE:
            batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
        if name == "idefics":  # every token from the image on attends to it
            seen = (batch["input_ids"] == IMAGE).cumsum(-1) > 0
            batch["image_attention_mask"] = seen[..., None].long()
        return batch | pixels

    return TinyModel(name, model, prompts)


def build(name: str, tokens: TinyTokens, patch: int, seed: int = 0) -> tuple[Any, Any]:
    """Build the model of a family for a vocabulary and (Qwen) a patch size; returns it and its picture maker."""
    torch.manual_seed(seed)
    config, model_class, images = _BUILDERS[name](tokens, patch)
    model = model_class(config).eval()
    decoder_of(model).set_attn_implementation("sdpa")  # not all parts of InstructBLIP know another one
    _randomise(model, tokens, seed)
    for owner in {model, decoder_of(model)}:
        generation = owner.generation_config
        generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = tokens.pad, tokens.bos, tokens.eos
    return model, images


def tiny_chat_model(name: str, seed: int = 0) -> tuple[Any, Any]:
    """Return a tiny random model that fits the tiny processor of its family, and that processor."""
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


def noised_copy(inputs: dict[str, Tensor], seed: int = 7, std: float = 2.0) -> dict[str, Tensor]:
    """The same prompt with noised pixels; exact-zero padding stays zero."""
    noise = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(seed)) * std
    pixels = inputs["pixel_values"]
    return dict(inputs, pixel_values=torch.where(pixels == 0, pixels, pixels + noise))


def extended(inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """The prompt continued to `ids` [B, L + n] for a forward pass without a cache."""
    added = ids.shape[1] - inputs["input_ids"].shape[1]
    longer = dict(inputs, input_ids=ids)
    for key, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if key in longer:
            tail = torch.full((ids.shape[0], added), fill, dtype=longer[key].dtype)
            longer[key] = torch.cat([longer[key], tail], 1)
    if "image_attention_mask" in longer:
        seen = longer["image_attention_mask"]
        longer["image_attention_mask"] = torch.cat([seen, seen[:, -1:].expand(-1, added, -1)], 1)
    return longer


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(_FIRST_WORD, VOCAB - 10, (count,), generator=generator).tolist()


def _left_pad(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _llama(tokens: TinyTokens, **changes: Any) -> dict[str, Any]:
    return dict(
        model_type="llama", vocab_size=tokens.size, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=tokens.pad,
        bos_token_id=tokens.bos,
        eos_token_id=tokens.eos,
    ) | changes  # fmt: skip


def _clip(size: int) -> dict[str, Any]:
    return dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=2, image_size=size, patch_size=7, projection_dim=32,
    )  # fmt: skip


def _llava(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    config = transformers.LlavaConfig(
        vision_config=_clip(28), text_config=_llama(tokens), image_token_index=tokens.image, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=16,
    )  # fmt: skip
    config.image_token_id = tokens.image

    def images(rows: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        return [16] * rows, {"pixel_values": torch.randn(rows, 3, 28, 28, generator=generator)}

    return config, transformers.LlavaForConditionalGeneration, images


def _llava_next(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    config = transformers.LlavaNextConfig(
        vision_config=_clip(14), text_config=_llama(tokens, model_type="mistral", sliding_window=None),
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
    text = _llama(tokens, **text)
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


def _instructblip(tokens: TinyTokens, patch: int) -> tuple[Any, type, Any]:
    layers = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.InstructBlipConfig(
        vision_config=layers | dict(image_size=28, patch_size=7),
        qformer_config=layers | dict(vocab_size=tokens.size, encoder_hidden_size=32, cross_attention_frequency=1),
        text_config=_llama(tokens), num_query_tokens=8, image_token_index=tokens.image,
    )  # fmt: skip

    def images(rows: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        pixels = torch.randn(rows, 3, 28, 28, generator=generator)
        words = torch.tensor([_words(5, generator) for _ in range(rows)])
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
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "instructblip": _instructblip,
    "idefics": _idefics,
}


@torch.no_grad()
def _randomise(model: Any, tokens: TinyTokens, seed: int) -> None:
    """Redraw all weights: norms near one, biases small, matrices scaled to keep activations, a wide output head."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if "alpha" in name:  # the gates of cross-attention
            weight.copy_(0.8 + 0.1 * noise)
        elif "query_tokens" in name or "latents" in name:
            weight.copy_(noise)
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
