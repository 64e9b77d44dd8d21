"""What tiny random models of all families are made of: a vocabulary, a text model, a vision tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCAB = 200
PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END = 0, 1, 2, 5, 6, 7, 8
_FIRST_WORD = 10  # ids below are special

# (rows, generator) -> number of image tokens of each row, and the image keys of the processor's output.
Images = Callable[[int, torch.Generator], tuple[list[int], dict[str, Tensor]]]


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


def random_words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(_FIRST_WORD, VOCAB - 10, (count,), generator=generator).tolist()


def llama(tokens: TinyTokens, **changes: Any) -> dict[str, Any]:
    return dict(
        model_type="llama", vocab_size=tokens.size, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=tokens.pad,
        bos_token_id=tokens.bos,
        eos_token_id=tokens.eos,
    ) | changes  # fmt: skip


def clip(size: int) -> dict[str, Any]:
    return dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=2, image_size=size, patch_size=7, projection_dim=32,
    )  # fmt: skip
