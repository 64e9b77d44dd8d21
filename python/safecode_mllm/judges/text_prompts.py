"""Chat prompts without a picture, for any model of transformers that can talk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from safecode_mllm.errors import PromptError
from safecode_mllm.prompts import HARMLESS_TEXT, ControlTokens


class TextPrompts:
    """Puts one user text into a model's chat template.

    Args:
        processor: a tokenizer, or a processor with one, with a chat template.

    Raises:
        PromptError: there is no chat template.
    """

    def __init__(self, processor: Any) -> None:
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self._owner = processor if getattr(processor, "chat_template", None) else self.tokenizer
        self._takes_parts = self._owner is processor and self.tokenizer is not processor
        if not getattr(self._owner, "chat_template", None):
            raise PromptError("tokenizer has no chat template: a judge must be a model that was trained to talk")
        self._control = ControlTokens(self.tokenizer)
        self._expected = self._control.sequence(self._encode(HARMLESS_TEXT))

    def build(self, text: str) -> dict[str, Tensor]:
        """Return input_ids and attention_mask, int64 [1, T].

        Args:
            text: whole text of the user's turn; untrusted parts quoted (see quoting.py).

        Raises:
            PromptError: the text spells a control token of this tokenizer.
        """
        ids = self._encode(text)
        if self._control.sequence(ids) != self._expected:
            raise PromptError("prompt: it spells a special token of the judge's tokenizer; quote what is untrusted")
        row = torch.tensor([ids])
        return {"input_ids": row, "attention_mask": torch.ones_like(row)}

    def _encode(self, text: str) -> list[int]:
        content: Any = [{"type": "text", "text": text}] if self._takes_parts else text
        rendered = self._owner.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        bos = self.tokenizer.bos_token
        options = {"add_special_tokens": False} if bos and rendered.startswith(bos) else {}
        return list(self.tokenizer(rendered, **options)["input_ids"])
