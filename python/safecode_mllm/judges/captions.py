"""Descriptions of pictures, for judges that work from one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL.Image import Image

from safecode_mllm.judges.question import CAPTION_REQUEST
from safecode_mllm.judges.writing import write
from safecode_mllm.prompts import PromptBuilder
from safecode_mllm.terminal import one_line

# A few sentences; a model that goes on for longer repeats itself.
MAX_CAPTION_TOKENS = 96


def describe(
    model: Any, builder: PromptBuilder, images: Sequence[Image], max_new_tokens: int = MAX_CAPTION_TOKENS
) -> list[str]:
    """Return one line about each picture, written greedily; untrusted, since the picture may hold text."""
    rows = [builder.build(image, CAPTION_REQUEST) for image in images]
    return [one_line(written.text) for written in write(model, builder.tokenizer, rows, max_new_tokens)]
