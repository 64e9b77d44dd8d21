"""Real processors of every family with tokenizers trained here: no file and no network.

The tokenizers have the shapes that matter: byte-level BPE without a begin token (Qwen), SentencePiece-like BPE with
byte fallback in its two pre-tokenisations (LLaVA, LLaVA-NeXT), and lower-casing WordPiece. Each has special tokens and
added tokens that are not special, because both are matched inside a user's text.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PROCESSOR_NAMES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_IS_OLD = transformers.__version__.startswith("4.")

_CORPUS = """
I'm sorry, but I can't help with that here. I am sorry, I cannot do this. I cannot, she cannot, they can't.
Sorry, that would hurt someone. Unfortunately this place is not safe. I apologize. My apologies. Apologies for that.
I am unable to say. I'm unable to. I am not able to help. I'm not able to. I won't. I will not. I shouldn't.
I must decline. I have to decline. I'm afraid I can't. I would rather not. As an AI, I see pictures only.
It is not safe to run here. It's not safe. That is not safe. That's not safe. This is not safe. For safety reasons.
Sure, here are a few steps: first warm up, second lean forward, then keep a steady pace and breathe.
You can do it. The picture shows a cliff, a kitchen, a park and a street. How do I run faster here? What is this?
Look at the image. Is it safe to help with this request in this scene? Answer with one letter. A. safe B. unsafe
USER: what can you see? ASSISTANT: a house, a tree and a white car. system user assistant INST
0 1 2 3 4 5 6 7 8 9 (see below) [note] {key: value} a/b c_d e-f #1 @home $5 | < > ! ? * ^ ~ = + % & ; :
"""

# The same shapes as the checkpoints' templates; the last one puts the text first.
_USER_TEXT = "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
_USER_IMAGES = "{% for part in message['content'] if part['type'] == 'image' %}{{ IMAGE }}{% endfor %}"
_LLAVA_TURN = f"{{{{ 'USER: ' }}}}{_USER_IMAGES}{_USER_TEXT}{{{{ ' ' }}}}"
_LLAVA_TEMPLATE = (
    "{% set IMAGE = '<image>\\n' %}{% for message in messages %}"
    + _LLAVA_TURN
    + "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_LLAVA_NEXT_TEMPLATE = (
    "{% set IMAGE = '<image>\\n' %}{% for message in messages %}"
    + f"{{{{ '[INST] ' }}}}{_USER_IMAGES}{_USER_TEXT}{{{{ ' [/INST]' }}}}"
    + "{% endfor %}"
)
_QWEN_TEMPLATE = (
    "{% set IMAGE = '<|vision_start|><|image_pad|><|vision_end|>' %}"
    "{{ '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    + _USER_IMAGES
    + _USER_TEXT
    + "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXT_FIRST_TEMPLATE = (
    "{% set IMAGE = '\\n<image>' %}{% for message in messages %}"
    + f"{{{{ 'USER: ' }}}}{_USER_TEXT}{_USER_IMAGES}"
    + "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)

QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# Not special, matched all the same.
QWEN_ADDED = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<think>", "</think>", "  ")
LLAVA_SPECIAL = ("<image>", "<pad>")
LLAVA_ADDED = ("<|note|>", "[CITE]", "<grounding>")


@cache
def byte_level_tokenizer() -> Any:
    """Qwen's shape: byte-level BPE, no begin token."""
    raw = Tokenizer(models.BPE())
    words = Regex(r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(_lines(), _trainer(700, initial_alphabet=alphabet))
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL])
    raw.add_tokens([AddedToken(token, normalized=False) for token in QWEN_ADDED])
    return _wrap(raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@cache
def sentencepiece_like_tokenizer(prepends_in_normalizer: bool) -> Any:
    """Llama's shape: metaspaces, byte fallback, begin token. Old files prepend the first space in the normaliser."""
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.pre_tokenizer = metaspace
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    specials = ["<unk>", "<s>", "</s>"]
    raw.train_from_iterator(_lines(), _trainer(900, special_tokens=[*specials, *byte_tokens]))
    # The trainer registers byte tokens as special: they must be plain vocabulary, or decoding drops them.
    data = json.loads(raw.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in specials]
    if prepends_in_normalizer:
        data["pre_tokenizer"] = None
    raw = Tokenizer.from_str(json.dumps(data))
    if prepends_in_normalizer:
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LLAVA_SPECIAL])
    raw.add_tokens([AddedToken(token, normalized=token == "[CITE]") for token in LLAVA_ADDED])
    return _wrap(raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


@cache
def wordpiece_tokenizer() -> Any:
    """BERT's shape: lower-casing WordPiece. The vocabulary is counted: the library's trainer is not deterministic."""
    text = _CORPUS.lower()
    words = [
        word for word, _ in sorted(Counter(re.findall(r"[a-z]+", text)).items(), key=lambda item: (-item[1], item[0]))
    ]
    characters = sorted(set(text) - set(" \n"))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters)]
    vocabulary += [word for word in words if word not in vocabulary]
    raw = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    ends = [(token, raw.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return _wrap(raw, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")


@cache
def tiny_processor(name: str) -> Any:
    """Return the processor of a family, for pictures of a few dozen pixels."""
    if name == "llava":
        return transformers.LlavaProcessor(
            image_processor=image_processor("CLIP", size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
            tokenizer=sentencepiece_like_tokenizer(True), patch_size=7, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=_LLAVA_TEMPLATE, image_token="<image>",
        )  # fmt: skip
    if name == "llava_next":
        pinpoints = [[14, 28], [28, 14], [28, 28]]
        crop = {"height": 14, "width": 14}
        return transformers.LlavaNextProcessor(
            image_processor=image_processor(
                "LlavaNext", size={"shortest_edge": 14}, crop_size=crop, image_grid_pinpoints=pinpoints
            ),
            tokenizer=sentencepiece_like_tokenizer(False), patch_size=7, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=_LLAVA_NEXT_TEMPLATE, image_token="<image>",
        )  # fmt: skip
    return _qwen_processor(name)


def _qwen_processor(name: str) -> Any:
    """Built around its constructor, which asks for a video processor and so for torchvision."""
    processor_class = getattr(
        transformers, {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[name] + "Processor"
    )
    patch = 16 if name == "qwen3_vl" else 14
    pixels = (2 * patch) ** 2
    size = {"shortest_edge": 4 * pixels, "longest_edge": 16 * pixels}
    processor = processor_class.__new__(processor_class)
    processor.image_processor = image_processor("Qwen2VL", patch_size=patch, size=size)
    processor.tokenizer = byte_level_tokenizer()
    processor.video_processor = None
    processor.chat_template = _QWEN_TEMPLATE
    tokens = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    tokens |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    for role, token in tokens.items():
        setattr(processor, f"{role}_token", token)
        setattr(processor, f"{role}_token_id", processor.tokenizer.convert_tokens_to_ids(token))
    processor.image_ids, processor.video_ids = [processor.image_token_id], [processor.video_token_id]
    processor.audio_ids = []
    return processor


def image_processor(family: str, **settings: Any) -> Any:
    """The torchvision-free class, whatever this version calls it."""
    without_torchvision = getattr(transformers, f"{family}ImageProcessorPil", None)
    return (without_torchvision or getattr(transformers, f"{family}ImageProcessor"))(**settings)


def _lines() -> list[str]:
    return _CORPUS.strip().splitlines()


def _trainer(vocab_size: int, **settings: Any) -> Any:
    return trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, min_frequency=1, **settings)


def _wrap(raw: Tokenizer, **names: str) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )
