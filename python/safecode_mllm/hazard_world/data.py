"""Training batches: fresh scenes every step, rendered, tokenized and padded so that no step wastes columns."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .language import (
    ANSWER_SHARES,
    CAPTION_REQUEST,
    IMAGE_TOKEN,
    answer_text,
    caption_text,
    judge_letter,
    judge_request,
    refusal_text,
    user_turn,
    word_request,
)
from .render import SIZE, render
from .scenes import Variant, refusal_probability
from .splits import Item, draw_item

Task = Literal["answer", "judge", "word", "caption"]
IGNORED = -100
# A noised branch that the model never met would point anywhere: these images carry no scene and are labelled by the text alone.
UNSEEN_SHARE = 0.10
_BLANK_SHARE = 0.3
_SIGMA_RANGE = (0.7, 1.6)


@dataclass(frozen=True)
class Batch:
    """One batch of one task; prompts end in the same column.

    Attributes:
        pixel_values: fp32 [B, 3, 48, 48] in [-1, 1].
        input_ids: int64 [B, P + A], prompts padded on the left, replies on the right.
        attention_mask: int64 [B, P + A].
        first_target: fp32 [B, V], the distribution of the reply's first token.
        rest_target: int64 [B, A], the tokens after the first, then IGNORED.
    """

    pixel_values: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    first_target: Tensor
    rest_target: Tensor


class Batcher:
    """Draws batches of the train split.

    The first token's target is the distribution of the labels instead of one drawn label: the same optimum with less noise
    in the gradient, which is what lets a minute-scale training learn calibrated refusal rates.
    """

    def __init__(self, processor: Any, seed: int, variant: Variant = "priors") -> None:
        self._tokenizer = processor.tokenizer
        self._variant = variant
        self._rng = random.Random(f"train/{seed}")
        self._noise = np.random.default_rng(seed)
        self._ids: dict[str, list[int]] = {}
        self._vocab_size = len(self._tokenizer)

    def draw(self, task: Task, n: int) -> Batch:
        """Return a batch of n fresh rows of one task."""
        items = [draw_item("train", self._rng) for _ in range(n)]
        seen = [self._rng.random() >= UNSEEN_SHARE for _ in items]
        pixels = np.stack([self._pixels(item, s) for item, s in zip(items, seen, strict=True)])
        rows = [self._row(task, item, s) for item, s in zip(items, seen, strict=True)]
        return self._collate(pixels, rows)

    def _pixels(self, item: Item, seen: bool) -> np.ndarray:
        """Return fp32 [3, H, W] in [-1, 1], as the image processor would."""
        if not seen and self._noise.random() < _BLANK_SHARE:
            return np.full((3, SIZE, SIZE), self._noise.uniform(-1.0, 1.0), dtype=np.float32)
        pixels = np.asarray(render(item.scene), dtype=np.float32).transpose(2, 0, 1) / 255.0
        if not seen:
            sigma = self._noise.uniform(*_SIGMA_RANGE)
            pixels = np.clip(pixels + self._noise.normal(0.0, sigma, pixels.shape).astype(np.float32), 0.0, 1.0)
        return pixels * 2.0 - 1.0

    def _row(self, task: Task, item: Item, seen: bool) -> tuple[str, str, dict[str, float]]:
        """Return (user text, reply, distribution over replies whose first token is the first target)."""
        scene = item.scene
        if task == "caption":
            reply = caption_text(scene if seen else None)
            return CAPTION_REQUEST, reply, {reply: 1.0}
        unsafe = float(scene.taught_unsafe) if seen else refusal_probability(scene, seen=False, variant=self._variant)
        if task == "word":
            words = {"unsafe": unsafe, "safe": 1.0 - unsafe}
            return word_request(item.request), self._pick(words), words
        if task == "judge":
            order = self._rng.randrange(2)
            text = judge_request(item.request, order)
            letters = {judge_letter(True, order): unsafe, judge_letter(False, order): 1.0 - unsafe}
            return text, self._pick(letters), letters
        refuse = refusal_probability(scene, seen=seen, variant=self._variant)
        replies = {refusal_text(scene.activity, form): refuse / 2 for form in range(2)}
        replies |= {answer_text(scene.activity, form): (1.0 - refuse) * ANSWER_SHARES[form] for form in range(2)}
        return item.request, self._pick(replies), replies

    def _pick(self, distribution: dict[str, float]) -> str:
        return self._rng.choices(list(distribution), list(distribution.values()))[0]

    def _prompt_ids(self, text: str) -> list[int]:
        if text not in self._ids:
            slots = (SIZE // 8) ** 2
            self._ids[text] = self._tokenizer(user_turn(text).replace(IMAGE_TOKEN, IMAGE_TOKEN * slots)).input_ids
        return self._ids[text]

    def _reply_ids(self, reply: str) -> list[int]:
        key = f"\0{reply}"
        if key not in self._ids:
            ids = self._tokenizer(f" {reply}", add_special_tokens=False).input_ids
            self._ids[key] = [*ids, self._tokenizer.eos_token_id]
        return self._ids[key]

    def _collate(self, pixels: np.ndarray, rows: Sequence[tuple[str, str, dict[str, float]]]) -> Batch:
        prompts = [self._prompt_ids(text) for text, _, _ in rows]
        replies = [self._reply_ids(reply) for _, reply, _ in rows]
        left, right = max(map(len, prompts)), max(map(len, replies))
        ids = torch.full((len(rows), left + right), self._tokenizer.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        first = torch.zeros(len(rows), self._vocab_size)
        rest = torch.full((len(rows), right), IGNORED, dtype=torch.int64)
        for row, (prompt, reply, (_, _, distribution)) in enumerate(zip(prompts, replies, rows, strict=True)):
            ids[row, left - len(prompt) : left + len(reply)] = torch.tensor(prompt + reply)
            mask[row, left - len(prompt) : left + len(reply)] = 1
            rest[row, : len(reply) - 1] = torch.tensor(reply[1:])
            for text, probability in distribution.items():
                first[row, self._reply_ids(text)[0]] += probability
        return Batch(torch.from_numpy(pixels).contiguous(), ids, mask, first, rest)
