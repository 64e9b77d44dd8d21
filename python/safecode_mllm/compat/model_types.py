"""What the published code does differently per model type: the prompt, the length of an answer, how it is sampled.

The names are that code's own values of `model_type`; a type is a way to prompt and may serve several families.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlparse

from PIL import Image

from safecode_mllm.config import nearest_name_hint
from safecode_mllm.errors import ConfigError, PromptError

logger = logging.getLogger(__name__)

# Behind InstructBLIP's prompt, so that the answer can be told from it.
_BLIP_MARK = "ANSWER_BEGINS_HERE:"
# Behind Qwen's chat template, which has opened the assistant's turn already.
_QWEN_MARK = "\nassistant:"
# Every word behind which an answer may begin, the first one found counts.
ANSWER_MARKS = ("ASSISTANT:", _BLIP_MARK, "assistant:", "assistant")

# Every picture is scaled to as many pixels as give this many image tokens.
_QWEN_PIXELS = 256 * 28 * 28
# Small, but no side of 1 or 3 pixels: an image processor could take it for the channels.
_STAND_IN = (8, 8)

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class ModelType:
    """One value of `model_type`.

    Attributes:
        name: that value.
        prompt: (processor, picture, conversation) -> processor output, a batch of 1.
        safe_length: new tokens after the guided ones, any verdict but "unsafe".
        unsafe_length: the same for "unsafe".
        sampling: (processor, temperature, top_p) -> arguments of `generate`.
        length_name: argument of `generate` that takes the length; "max_length" counts the prompt too.
        continued: (processor, conversation, text) -> processor output for the prompt with `text` behind it, for types
            whose guided tokens are written into the prompt as text; None for those whose ids are appended.
        shows_list: the guided text is returned as the list that `batch_decode` gives.
        half: the half precision that `load_model` takes on a GPU.
        processor_arguments: what `load_model` sets in the processor.
    """

    name: str
    prompt: Callable[[Any, Image.Image, str], Inputs]
    safe_length: int
    unsafe_length: int
    sampling: Callable[[Any, float, float], dict[str, Any]]
    length_name: str = "max_new_tokens"
    continued: Callable[[Any, str, str], Inputs] | None = None
    shows_list: bool = False
    half: str = "float16"
    processor_arguments: Mapping[str, Any] = field(default_factory=dict)


DEFAULT_MODEL_TYPE = "llava"


def model_type(name: str) -> ModelType:
    """Return the record of a published model type; raises ConfigError for any other name."""
    if name not in MODEL_TYPES:
        hint = nearest_name_hint(name, MODEL_TYPES)
        raise ConfigError(f"model_type={name!r} is unknown: known are {list(MODEL_TYPES)}.{hint}")
    return MODEL_TYPES[name]


def _llava_prompt(processor: Any, picture: Image.Image, conversation: str) -> Inputs:
    content = [{"type": "text", "text": conversation}, {"type": "image"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=picture, text=text, return_tensors="pt")


def _qwen_prompt(processor: Any, picture: Image.Image, conversation: str) -> Inputs:
    turns = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": conversation}]}]
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return processor(text=text + _QWEN_MARK, images=_qwen_pictures(turns), return_tensors="pt")


def _qwen_pictures(turns: list[dict[str, Any]]) -> list[Any]:
    """Qwen's own helper resizes pictures before the processor does; without it they go there as they are."""
    try:
        helper = importlib.import_module("qwen_vl_utils")
    except ImportError:
        logger.info("qwen-vl-utils is not installed: pictures go to the processor without its resize")
        return [part["image"] for part in turns[0]["content"] if part["type"] == "image"]
    return helper.process_vision_info(turns)[0]


def _blip_prompt(processor: Any, picture: Image.Image, conversation: str) -> Inputs:
    return processor(images=picture, text=conversation + _BLIP_MARK, return_tensors="pt")


def _idefics_prompt(processor: Any, picture: Image.Image, conversation: str, text: str = "") -> Inputs:
    # The processor strips spaces off each piece, joins them with nothing, and fetches a piece that is an address.
    conversation = conversation.strip(" ")
    if _is_address(conversation):
        raise PromptError(f"conversation={conversation!r} is an address: the processor would fetch it; add a question")
    answer = f"{conversation}ASSISTANT:{text.strip(' ')}"
    return processor(text=["user:", picture, answer], add_end_of_utterance_token=False, return_tensors="pt")


def _idefics_continued(processor: Any, conversation: str, text: str) -> Inputs:
    """Ids and mask depend on how many pictures there are, not on what they show: a small one stands in."""
    return _idefics_prompt(processor, Image.new("RGB", _STAND_IN), conversation, text)


def _is_address(text: str) -> bool:
    parts = urlparse(text)
    return " " not in text and bool(parts.scheme and parts.netloc)


def _sampling(processor: Any, temperature: float, top_p: float) -> dict[str, Any]:
    return {"do_sample": True, "temperature": temperature, "top_p": top_p}


def _qwen_sampling(processor: Any, temperature: float, top_p: float) -> dict[str, Any]:
    return _sampling(processor, temperature, top_p) | {"pad_token_id": processor.tokenizer.pad_token_id}


def _llava_sampling(processor: Any, temperature: float, top_p: float) -> dict[str, Any]:
    return _sampling(processor, temperature, top_p) | {"num_beams": 1}


def _idefics_sampling(processor: Any, temperature: float, top_p: float) -> dict[str, Any]:
    """Temperature and top-p are not passed on for this type; those of the checkpoint hold."""

    def ids(text: Any) -> Any:
        return processor.tokenizer(text, add_special_tokens=False).input_ids

    banned = ids(["<image>", "<fake_token_around_image>"])
    return {"do_sample": True, "eos_token_id": ids("<end_of_utterance>"), "bad_words_ids": banned}


MODEL_TYPES: Mapping[str, ModelType] = {
    kind.name: kind
    for kind in (
        ModelType("llava", _llava_prompt, 256, 20, _llava_sampling),
        ModelType(
            "qwen", _qwen_prompt, 256, 30, _qwen_sampling, shows_list=True, half="bfloat16",
            processor_arguments={"min_pixels": _QWEN_PIXELS, "max_pixels": _QWEN_PIXELS},
        ),
        ModelType("instructionblip", _blip_prompt, 1024, 1024, _sampling),
        ModelType(
            "idefics", _idefics_prompt, 1024, 1024, _idefics_sampling, length_name="max_length",
            continued=_idefics_continued, half="bfloat16",
        ),
    )
}  # fmt: skip
