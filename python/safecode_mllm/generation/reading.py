"""The user's text of a prompt that is there as token ids only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from safecode_mllm.errors import ConfigError, PromptError
from safecode_mllm.prompts import PromptBuilder

_MARKER = "SAFECODEUSERTEXT"
_HINT = "pass requests=[JudgeRequest(image, prompt), ...], one per prompt"


def prompts_of(builder: PromptBuilder, ids: Tensor, mask: Tensor, image_tokens: Sequence[int]) -> list[str]:
    """Return the user's text of each prompt, read back through the chat template.

    Args:
        builder: of the model's processor.
        ids: int64 [B, L], left padded.
        mask: int64 [B, L].
        image_tokens: ids that stand for image features.

    Raises:
        ConfigError: a prompt is not one user turn with an image before its text in the processor's chat template.
    """
    behind = _behind_image(builder.text_ids(_MARKER), image_tokens)
    before, found, after = _decode(builder, behind or []).partition(_MARKER)
    if behind is None or not found:
        raise ConfigError(f"judge='self' cannot read prompts whose template puts the image behind the text: {_HINT}")
    texts = []
    for row, (row_ids, row_mask) in enumerate(zip(ids, mask, strict=True)):
        behind = _behind_image(row_ids[row_mask.bool()].tolist(), image_tokens)
        text = "" if behind is None else _between(_decode(builder, behind), before, after)
        if not text or not _is_prompt(builder, text, behind, image_tokens):
            raise ConfigError(
                f"judge='self' cannot read prompt {row} from its ids: it is not an image and a user's text in the "
                f"processor's chat template; {_HINT}"
            )
        texts.append(text)
    return texts


def _is_prompt(builder: PromptBuilder, text: str, behind: Any, image_tokens: Sequence[int]) -> bool:
    """Whether the template with this text gives the same ids behind the image."""
    try:
        return _behind_image(builder.text_ids(text), image_tokens) == behind
    except PromptError:
        return False


def _behind_image(ids: Sequence[int], image_tokens: Sequence[int]) -> list[int] | None:
    """Return the ids behind the last image token; None without one."""
    places = [place for place, token in enumerate(ids) if token in image_tokens]
    return list(ids[places[-1] + 1 :]) if places else None


def _decode(builder: PromptBuilder, ids: Sequence[int]) -> str:
    return str(builder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _between(text: str, before: str, after: str) -> str:
    fits = text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)
    return text[len(before) : len(text) - len(after)] if fits else ""
