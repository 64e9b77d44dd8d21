"""Real processors of the families that the newest transformers alone is tested with, and of Idefics3."""

from __future__ import annotations

from functools import cache
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer

from tiny_processors import image_processor, sentencepiece_like_tokenizer

_PICTURE = 16
# The tokens that each processor writes around, between and for its pictures, by the names it looks them up with.
_TOKENS: dict[str, dict[str, str]] = {
    "idefics3": {"image_token": "<image>"},
    "idefics2": {
        "image_token": "<image>", "image_boundary_token": "<fake_token_around_image>",
        "end_of_utterance_token": "<end_of_utterance>",
    },
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    "mllama": {"image_token": "<|image|>"},
    "internvl": {
        "context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>",
        "video_token": "<video>",
    },
    "llava_onevision": {"image_token": "<image>", "video_token": "<video>"},
}  # fmt: skip
_OTHER_TOKENS = {
    "idefics3": ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<row_1_col_1>", "<row_1_col_2>",
                 "<row_2_col_1>", "<row_2_col_2>"),
}  # fmt: skip
# What a template writes for a picture.
_WRITTEN = {"gemma3": "<start_of_image>", "internvl": "<IMG_CONTEXT>\n"}
TIER2_CHAT_NAMES = tuple(sorted(set(_TOKENS) - {"idefics3"}))


def _template(image: str, opening: str = "") -> str:
    part = f"{{% if part['type'] == 'image' %}}{{{{ '{image}' }}}}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    turn = "{{ message['role'] + ': ' }}{% for part in message['content'] %}" + part + "{% endfor %}{{ '</s>\n' }}"
    turns = "{% for message in messages %}" + turn + "{% endfor %}"
    return opening + turns + "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"


@cache
def _tokenizer(name: str) -> Any:
    raw = Tokenizer.from_str(sentencepiece_like_tokenizer(False).backend_tokenizer.to_str())
    tokens = [*_TOKENS[name].values(), *_OTHER_TOKENS.get(name, ())]
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"],
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", extra_special_tokens=_TOKENS[name],
    )  # fmt: skip


@cache
def tier2_processor(name: str) -> Any:
    """Return the processor of a family, for pictures of a few dozen pixels."""
    tokenizer = _tokenizer(name)
    written = _WRITTEN.get(name, next(iter(_TOKENS[name].values()))).replace("\n", "\\n")
    square = {"height": _PICTURE, "width": _PICTURE}
    # Mllama's processor puts the begin token and the pictures first, unless the template writes the token itself.
    common = {"tokenizer": tokenizer, "chat_template": _template(written, "<s>" if name == "mllama" else "")}
    if name == "idefics3":
        pictures = image_processor("Idefics3", size={"longest_edge": 32}, max_image_size={"longest_edge": _PICTURE})
        return transformers.Idefics3Processor(pictures, image_seq_len=4, **common)
    if name == "idefics2":
        pictures = image_processor(
            "Idefics2", size={"longest_edge": _PICTURE, "shortest_edge": 8}, do_image_splitting=False
        )
        return transformers.Idefics2Processor(pictures, image_seq_len=4, **common)
    if name == "gemma3":
        return transformers.Gemma3Processor(image_processor("Gemma3", size=square), image_seq_length=4, **common)
    if name == "mllama":
        return transformers.MllamaProcessor(image_processor("Mllama", size=square, max_image_tiles=4), **common)
    if name == "internvl":
        pictures = image_processor("GotOcr2", size=square, min_patches=1, max_patches=4)
        return _without_video(transformers.InternVLProcessor, pictures, image_seq_length=4, **common)
    pinpoints = [[8, 16], [16, 8], [16, 16]]
    size = {"height": 8, "width": 8}
    pictures = image_processor("LlavaOnevision", size=size, crop_size=size, image_grid_pinpoints=pinpoints)
    return _without_video(
        transformers.LlavaOnevisionProcessor, pictures, num_image_tokens=4, vision_feature_select_strategy="full",
        **common,
    )  # fmt: skip


def _without_video(processor_class: Any, pictures: Any, **arguments: Any) -> Any:
    """Build a processor whose constructor asks for a video processor, and so for torchvision."""
    check = processor_class.check_argument_for_proper_class
    processor_class.check_argument_for_proper_class = lambda *call: None
    try:
        return processor_class(image_processor=pictures, **arguments)
    finally:
        processor_class.check_argument_for_proper_class = check
