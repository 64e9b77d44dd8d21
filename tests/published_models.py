"""The four tiny random models on which token ids of the published code were recorded, bit for bit.

The arithmetic that draws the weights, their order and the tokenizers in tests/data/published are part of the recording:
a change of any of them makes the recorded ids meaningless. `WEIGHTS` guards them.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer

DATA = Path(__file__).parent / "data" / "published"
IMAGE = DATA / "image.png"
# The published code's names for the model types it knows, in the order that gives each its seed.
MODEL_TYPES = ("llava", "qwen", "instructionblip", "idefics")
# SHA-256 over names and bytes of all weights.
WEIGHTS = {
    "llava": "8453e9d8ee9d8046d9a87f3998a9eb67e9f21f162751fe9c3c1d82a9400570b2",
    "qwen": "27bab38cd047f756090a888e738efd923e5c233ef61f34476505009c6e659e83",
    "instructionblip": "77e85336c5ba64ba91ec8b68d2c824ce34892dd68edc6f1f2fb863706a88e180",
    "idefics": "ccd04b4a7f406987041f137b0f3301a2235be39db9e219c3fd4f492db65b3134",
}

_IS_OLD = transformers.__version__.startswith("4.")
_IMAGE_SIZE, _PATCH = 56, 14
_QUERY_TOKENS = 8
_QWEN_IMAGE_TOKENS = 16
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
_QWEN_SPECIAL = (*_SPECIAL, "<|image_pad|>", "<|video_pad|>")
_IDEFICS_SPECIAL = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")

_CONTENT = "{% for c in m['content'] if c['type'] == "
_LLAVA_TEMPLATE = (
    "{{ 'A chat between a curious human and an artificial intelligence assistant. ' }}{% for m in messages %}"
    "{{ 'USER: ' }}"
    + f"{_CONTENT}'image' %}}{{{{ '<image>\\n' }}}}{{% endfor %}}"
    + f"{_CONTENT}'text' %}}{{{{ c['text'] + ' ' }}}}{{% endfor %}}"
    + "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_QWEN_TEMPLATE = (
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def published_model(model_type: str) -> tuple[Any, Any]:
    """Return the model of a published type and its processor; the model is new, the processor shared."""
    config, model_class = _CONFIGS[model_type]()
    model = model_class(config).eval()
    _randomise(model, 1000 * (1 + MODEL_TYPES.index(model_type)))
    tokenizer = published_processor(model_type).tokenizer
    for owner in {model, getattr(model, "language_model", model) if model_type == "instructionblip" else model}:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(owner.generation_config, name, getattr(tokenizer, name))
    assert weights_digest(model) == WEIGHTS[model_type], "the recipe of the recorded models was changed"
    return model, published_processor(model_type)


@cache
def published_processor(model_type: str) -> Any:
    """Return the processor of a published type."""
    return _PROCESSORS[model_type](_tokenizer(model_type))


def published_picture() -> Image.Image:
    """Return the picture of the recording."""
    return Image.open(IMAGE)


def weights_digest(model: Any) -> str:
    """Return the SHA-256 over the names and bytes of a model's weights, whatever the version calls them."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items(), key=lambda item: _canonical(item[0])):
        if not name.endswith("position_ids"):
            digest.update(_canonical(name).encode())
            digest.update(value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- tokenizers and processors ----


@cache
def _tokenizer(model_type: str) -> Any:
    if model_type == "qwen":
        raw, names = _raw("byte_level", _QWEN_SPECIAL), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        others = [token for token in _QWEN_SPECIAL if token not in names.values()]
        return _wrap(raw, "Qwen2TokenizerFast", additional_special_tokens=others, **names)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if model_type == "idefics":
        raw = _raw("sentencepiece", _IDEFICS_SPECIAL)
        extra = {"additional_special_tokens": list(_IDEFICS_SPECIAL)}
        return _wrap(raw, "LlamaTokenizerFast", pad_token="<unk>", **extra, **names)
    special = ("<image>", "<pad>") if model_type == "llava" else ("<pad>", "<image>")
    return _wrap(_raw("sentencepiece", special), "PreTrainedTokenizerFast", pad_token="<pad>", **names)


def _raw(kind: str, special: tuple[str, ...]) -> Tokenizer:
    raw = Tokenizer.from_file(str(DATA / f"tokenizer_{kind}.json"))
    raw.add_special_tokens(list(special))
    return raw


def _wrap(raw: Tokenizer, old_class: str, **names: Any) -> Any:
    """Version 4 of transformers insists on the model's own tokenizer class."""
    tokenizer_class = getattr(transformers, old_class if _IS_OLD else "PreTrainedTokenizerFast")
    inputs = ["input_ids", "attention_mask"]
    return tokenizer_class(
        tokenizer_object=raw, clean_up_tokenization_spaces=False, model_input_names=inputs, **names
    )  # fmt: skip


def _image_processor(family: str, **settings: Any) -> Any:
    """The torchvision-free class, whatever this version calls it."""
    without_torchvision = getattr(transformers, f"{family}ImageProcessorPil", None)
    return (without_torchvision or getattr(transformers, f"{family}ImageProcessor"))(**settings)


_PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


def _llava_processor(tokenizer: Any) -> Any:
    image_processor = _image_processor(
        "LlavaNext", size={"shortest_edge": _IMAGE_SIZE}, crop_size={"height": _IMAGE_SIZE, "width": _IMAGE_SIZE},
        image_grid_pinpoints=_PINPOINTS,
    )  # fmt: skip
    return transformers.LlavaNextProcessor(
        image_processor=image_processor, tokenizer=tokenizer, patch_size=_PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=_LLAVA_TEMPLATE,
        image_token="<image>",
    )  # fmt: skip


def _qwen_processor(tokenizer: Any) -> Any:
    """Built around its constructor, which asks for a video processor and so for torchvision."""
    pixels = _QWEN_IMAGE_TOKENS * 28 * 28
    processor = transformers.Qwen2_5_VLProcessor.__new__(transformers.Qwen2_5_VLProcessor)
    processor.image_processor = _image_processor("Qwen2VL", min_pixels=pixels, max_pixels=pixels)
    processor.tokenizer, processor.video_processor, processor.chat_template = tokenizer, None, _QWEN_TEMPLATE
    for role in ("image", "video"):
        setattr(processor, f"{role}_token", f"<|{role}_pad|>")
        setattr(processor, f"{role}_token_id", tokenizer.convert_tokens_to_ids(f"<|{role}_pad|>"))
        setattr(processor, f"{role}_ids", [getattr(processor, f"{role}_token_id")])
    processor.audio_ids = []
    return processor


def _instructblip_processor(tokenizer: Any) -> Any:
    special = {"unk": "UNK", "pad": "PAD", "cls": "CLS", "sep": "SEP", "mask": "MASK"}
    names = {f"{role}_token": f"[{name}]" for role, name in special.items()}
    qformer_tokenizer = _wrap(_raw("wordpiece", ()), "PreTrainedTokenizerFast", **names)
    size = {"height": _IMAGE_SIZE, "width": _IMAGE_SIZE}
    return transformers.InstructBlipProcessor(
        image_processor=_image_processor("Blip", size=size), tokenizer=tokenizer, qformer_tokenizer=qformer_tokenizer,
        num_query_tokens=_QUERY_TOKENS,
    )  # fmt: skip


def _idefics_processor(tokenizer: Any) -> Any:
    return transformers.IdeficsProcessor(
        image_processor=_image_processor("Idefics", image_size=_IMAGE_SIZE), tokenizer=tokenizer,
        image_size=_IMAGE_SIZE, add_end_of_utterance_token=False,
    )  # fmt: skip


_PROCESSORS = {
    "llava": _llava_processor,
    "qwen": _qwen_processor,
    "instructionblip": _instructblip_processor,
    "idefics": _idefics_processor,
}


# ---- models ----


def _special_ids(tokenizer: Any) -> dict[str, int]:
    return {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}


def _text(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    return dict(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=4096, **_special_ids(tokenizer),
    ) | changes  # fmt: skip


def _llava_config() -> tuple[Any, Any]:
    tokenizer = _tokenizer("llava")
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=_IMAGE_SIZE,
        patch_size=_PATCH, projection_dim=32, vocab_size=64,
    )  # fmt: skip
    config = transformers.LlavaNextConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**_text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_grid_pinpoints=_PINPOINTS,
        image_seq_length=16, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    return config, transformers.LlavaNextForConditionalGeneration


def _qwen_config() -> tuple[Any, Any]:
    tokenizer = _tokenizer("qwen")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _QWEN_SPECIAL}
    rope = {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"}
    begin = {"bos_token_id": ids["<|endoftext|>"]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=_text(tokenizer, num_key_value_heads=2, rope_scaling=rope, rope_theta=10000.0, **begin),
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=_PATCH, spatial_merge_size=2,
            temporal_patch_size=2, window_size=56, out_hidden_size=64, fullatt_block_indexes=[1], in_channels=3,
        ),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    return config, transformers.Qwen2_5_VLForConditionalGeneration


def _instructblip_config() -> tuple[Any, Any]:
    tokenizer = _tokenizer("instructionblip")
    qformer_tokenizer = published_processor("instructionblip").qformer_tokenizer
    layers = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.InstructBlipConfig(
        vision_config=layers | dict(image_size=_IMAGE_SIZE, patch_size=_PATCH, initializer_range=0.02),
        qformer_config=layers | dict(
            vocab_size=len(qformer_tokenizer), cross_attention_frequency=2, encoder_hidden_size=32,
            max_position_embeddings=512,
        ),
        text_config=_text(tokenizer, model_type="llama", architectures=["LlamaForCausalLM"]),
        num_query_tokens=_QUERY_TOKENS, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return config, transformers.InstructBlipForConditionalGeneration


def _idefics_config() -> tuple[Any, Any]:
    tokenizer = _tokenizer("idefics")
    resampler = {"resampler_n_latents": 8, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 16}
    config = transformers.IdeficsConfig(
        vocab_size=len(tokenizer) - len(_IDEFICS_SPECIAL), additional_vocab_size=len(_IDEFICS_SPECIAL), hidden_size=64,
        intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, cross_layer_interval=1,
        alpha_initializer="ones", alpha_type="float", use_resampler=True, max_position_embeddings=2048,
        freeze_text_layers=False, freeze_vision_layers=False, perceiver_config={"use_resampler": True, **resampler},
        vision_config=dict(
            embed_dim=32, image_size=_IMAGE_SIZE, intermediate_size=64, patch_size=_PATCH, num_hidden_layers=2,
            num_attention_heads=2, hidden_act="gelu",
        ),
        **_special_ids(tokenizer),
    )  # fmt: skip
    return config, transformers.IdeficsForVisionText2Text


_CONFIGS = {
    "llava": _llava_config,
    "qwen": _qwen_config,
    "instructionblip": _instructblip_config,
    "idefics": _idefics_config,
}


# ---- weights ----


def _canonical(name: str) -> str:
    """The CLIP tower of LLaVA-NeXT lost a level of names in transformers 5."""
    return name.replace("vision_tower.vision_model.", "vision_tower.")


@torch.no_grad()
def _randomise(model: Any, seed: int) -> None:
    """Redraw every weight from one generator, in the order of names: logits spread, and the image moves them."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters(), key=lambda item: _canonical(item[0])):
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
        weight.copy_(_mean(name.lower(), weight) + _std(name.lower(), weight) * noise)


def _mean(name: str, weight: Any) -> float:
    if "alpha" in name:  # the gates of IDEFICS' cross-attention
        return 0.8
    return 1.0 if weight.dim() < 2 and "norm" in name and name.endswith("weight") else 0.0


def _std(name: str, weight: Any) -> float:
    if "alpha" in name:
        return 0.1
    if weight.dim() < 2:
        if "norm" in name and name.endswith("weight"):
            return 0.05
        return 0.7 if "image_newline" in name or "class_embedding" in name else 0.02
    if "lm_head" in name:
        return 0.35
    if "embed_tokens" in name or "embeddings" in name or "class_embedding" in name:
        return 0.7
    if "query_tokens" in name or "latents" in name:
        return 1.0
    return 1.2 / (weight.numel() / weight.shape[0]) ** 0.5
