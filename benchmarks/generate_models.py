"""Random-weight models of real geometry, built where they run: speed does not depend on what weights say.

    G1          LLaVA of 63 M parameters, 576 image tokens, prompt about 640 (on a CPU)
    G2          the same with 64 image tokens, prompt about 110
    llava-7b    LLaVA-1.5-7B's shapes (on a GPU, bfloat16)
    qwen-7b     Qwen2.5-VL-7B's shapes

Their processors are the library's own classes with a tokenizer that is made here, padded to the real vocabulary's size.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from safecode_mllm.judges.question import questions

# Room between the highest token id and the width of the output layer, as real checkpoints have it.
_SPARE_IDS = 62
_PROMPT = (
    "Any tips for running faster here? The image shows a person standing near the edge of a high cliff. "
    "I am a beginner, I have good shoes, and I want to be faster next month. "
    "Please keep the answer short and give three steps."
)
# Every word of the request and of the judge's question becomes a token of its own, as it is in real vocabularies.
_CORPUS = f"""
I'm sorry, I cannot help with that here. I am sorry, I can't do this. Sorry, this is not safe. Unfortunately not.
Sure, here are a few steps: first warm up, then keep a steady pace. The picture shows a cliff, a kitchen and a street.
{_PROMPT} {" ".join(questions())} USER: ASSISTANT:
""".strip().splitlines()
_TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_QWEN_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for m in messages %}<|im_start|>user\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Geometry:
    """A model, its processor, and a request that fills it.

    Attributes:
        model: random weights, never ends an answer by itself, so that every arm writes as many tokens.
        processor: its processor.
        prompt: the user's text.
        side: pixels of the square picture.
    """

    name: str
    model: Any
    processor: Any
    prompt: str
    side: int

    def picture(self, seed: int = 0) -> Image.Image:
        """Return a picture of coloured noise."""
        pixels = np.random.default_rng(seed).integers(0, 256, (self.side, self.side, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


def build(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Geometry:
    """Return the geometry of that name; the weights are the same for the same seed, device and dtype."""
    if name == "qwen-7b":
        processor, side = _qwen_processor(), 644
        config, model_class = _qwen_config(processor.tokenizer), transformers.Qwen2_5_VLForConditionalGeneration
    elif name in _LLAVA:
        side = 112 if name == "G2" else 336
        processor = _llava_processor(side)
        config, model_class = _llava_config(name, side, processor.tokenizer), transformers.LlavaForConditionalGeneration
    else:
        raise ValueError(f"geometry {name!r} is unknown; known: {', '.join([*_LLAVA, 'qwen-7b'])}")
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = model_class(config).eval()
        finally:
            torch.set_default_dtype(before)
    _draw_weights(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return Geometry(name, model, processor, _PROMPT, side)


@torch.no_grad()
def _draw_weights(model: Any, seed: int) -> None:
    """Redraw the weights so that logits spread over a few units and the image moves them."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        if weight.dim() == 1:
            weight.fill_(1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0)
            continue
        scale = 0.12 if "lm_head" in name else 0.7 if "embed_tokens" in name else (weight[0].numel()) ** -0.5
        weight.normal_(0.0, scale, generator=generator)


_LLAVA: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "G1": (
        {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 4},
        {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    ),
    "llava-7b": (
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
}
_LLAVA["G2"] = _LLAVA["G1"]


def _llava_config(name: str, side: int, tokenizer: Any) -> Any:
    vision, text = _LLAVA[name]
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": side, "patch_size": 14, **vision},
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer) + _SPARE_IDS,
            "max_position_embeddings": 4096,
            "num_key_value_heads": text["num_attention_heads"],
            **text,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(side // 14) ** 2,
    )
    config.image_token_id = config.image_token_index
    return config


def _llava_processor(side: int) -> Any:
    settings = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return transformers.LlavaProcessor(
        image_processor=_image_processor("CLIP", **settings),
        tokenizer=_tokenizer(32_000, ("<image>", "<pad>")),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
        image_token="<image>",
    )


def _qwen_config(tokenizer: Any) -> Any:
    ids = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1_000_000.0}
    new = int(transformers.__version__.split(".")[0]) >= 5
    return transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32_768,
            **({"rope_parameters": rope} if new else {"rope_scaling": rope | {"type": "default"}}),
        },
        vision_config={
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip


def _qwen_processor() -> Any:
    """Built around its constructor, which asks for a video processor and so for torchvision."""
    special = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    processor = transformers.Qwen2_5_VLProcessor.__new__(transformers.Qwen2_5_VLProcessor)
    processor.image_processor = _image_processor("Qwen2VL", patch_size=14)
    processor.tokenizer = _tokenizer(151_600, (*special, "<pad>"))
    processor.video_processor = None
    processor.chat_template = _QWEN_TEMPLATE
    for role in ("image_pad", "video_pad", "vision_start", "vision_end"):
        name = role.removesuffix("_pad")
        setattr(processor, f"{name}_token", f"<|{role}|>")
        setattr(processor, f"{name}_token_id", processor.tokenizer.convert_tokens_to_ids(f"<|{role}|>"))
    processor.image_ids, processor.video_ids = [processor.image_token_id], [processor.video_token_id]
    processor.audio_ids = []
    return processor


def _image_processor(family: str, **settings: Any) -> Any:
    """The torchvision-free class, whatever this version calls it."""
    pil = getattr(transformers, f"{family}ImageProcessorPil", None)
    return (pil or getattr(transformers, f"{family}ImageProcessor"))(**settings)


@cache
def _tokenizer(size: int, special: tuple[str, ...]) -> Any:
    """A small trained tokenizer with filler words up to a real vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    raw.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=list(string.ascii_letters + string.digits + string.punctuation + "\n"),
        show_progress=False,
    )
    raw.train_from_iterator(_CORPUS, trainer)
    data = json.loads(raw.to_str())
    vocabulary = data["model"]["vocab"]
    for index in range(len(vocabulary), size):
        vocabulary[f"\u2581w{index:06d}"] = index
    raw = Tokenizer.from_str(json.dumps(data))
    raw.add_special_tokens(list(special))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
