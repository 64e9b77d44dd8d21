"""Training batches: fresh scenes every step, and all that is asked about one picture packed behind it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..judges.question import CAPTION_REQUEST, LABEL_ORDERS
from ..reasons import REASON_OPENING
from .claims import taught_request
from .language import (
    ANSWER_SHARES,
    IMAGE_TOKEN,
    answer_text,
    caption_text,
    captioned_request,
    described_request,
    judge_letter,
    judge_request,
    reason_text,
    refusal_text,
    text_turn,
    user_turn,
    word_request,
)
from .model import IMAGE_TOKENS
from .pixels import UNSEEN_SHARE, training_pixels
from .scenes import Variant, refusal_probability
from .splits import Item, draw_item

Task = Literal["answer", "judge", "word", "caption", "described", "reason"]
TASKS: tuple[Task, ...] = ("answer", "judge", "word", "caption", "described", "reason")


@dataclass(frozen=True)
class Question:
    """One task about one picture: the turn, a reply, how its first token is distributed, and what stands before it.

    Attributes:
        task: which of TASKS.
        turn: the prompt up to where the model speaks.
        reply: what is taught.
        replies: replies with their probabilities.
        said: what the model has said already; part of the prompt.
    """

    task: Task
    turn: str
    reply: str
    replies: dict[str, float]
    said: str = ""


@dataclass(frozen=True)
class Batch:
    """B pictures with all their tasks, each picture's tasks in one row of L columns.

    Attributes:
        pixel_values: fp32 [B, 3, 48, 48] in [-1, 1].
        input_ids: int64 [B, L].
        position_ids: int64 [B, L]; a task's tokens continue behind its own prompt, whatever stands between.
        mask: bool [B, 1, L, L], True where a token may look: at its own prompt and reply, never at another task.
        first: where replies begin.
        rest: the other reply tokens.
    """

    pixel_values: Tensor
    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    first: Targets
    rest: Targets


@dataclass(frozen=True)
class Targets:
    """N places whose next token is taught.

    Attributes:
        rows: int64 [N].
        columns: int64 [N]; the place before the token.
        labels: int64 [N] ids, or fp32 [N, V] distributions.
        tasks: int64 [N], index in TASKS.
    """

    rows: Tensor
    columns: Tensor
    labels: Tensor
    tasks: Tensor


class Batcher:
    """Draws batches of the train split.

    The first token's target is the distribution of the labels instead of one drawn label: the same optimum with less
    noise in the gradient, which is what lets a training of minutes learn calibrated refusal rates.
    """

    def __init__(self, processor: Any, seed: int, variant: Variant = "priors") -> None:
        self._tokenizer = processor.tokenizer
        self._variant = variant
        self._rng = random.Random(f"train/{seed}")
        self._noise = np.random.default_rng(seed)
        self._vocab_size = len(self._tokenizer)
        self._ids: dict[str, list[int]] = {}

    def draw(self, n: int) -> Batch:
        """Return a batch of n fresh pictures with all tasks."""
        items = [draw_item("train", self._rng) for _ in range(n)]
        seen = [self._rng.random() >= UNSEEN_SHARE for _ in items]
        pixels = np.stack([training_pixels(item.scene, s, self._noise) for item, s in zip(items, seen, strict=True)])
        packer = _Packer(n, self._vocab_size, self._tokenizer.pad_token_id)
        for row, (item, visible) in enumerate(zip(items, seen, strict=True)):
            for question in self._questions(item, visible):
                prompt = [*self._prompt_ids(question.turn), *self._said_ids(question.said)]
                first = {self._reply_ids(reply)[0]: 0.0 for reply in question.replies}
                for reply, probability in question.replies.items():
                    first[self._reply_ids(reply)[0]] += probability
                packer.add(row, TASKS.index(question.task), prompt, self._reply_ids(question.reply), first)
        return packer.batch(torch.from_numpy(pixels).contiguous())

    def _questions(self, item: Item, seen: bool) -> list[Question]:
        scene = item.scene
        blind = refusal_probability(scene, seen=False, variant=self._variant)
        unsafe = float(scene.taught_unsafe) if seen else blind
        refuse = refusal_probability(scene, seen=seen, variant=self._variant)
        # The label is the scene's, whatever the request claims.
        request = taught_request(item.request, self._rng)
        replies = {refusal_text(scene.activity, form): refuse / 2 for form in range(2)}
        replies |= {answer_text(scene.activity, form): (1.0 - refuse) * ANSWER_SHARES[form] for form in range(2)}
        questions = [self._question("answer", user_turn(request), replies)]
        words = {"unsafe": unsafe, "safe": 1.0 - unsafe}
        for order in range(len(LABEL_ORDERS)):
            questions.append(self._question("judge", user_turn(judge_request(request, order)), _letters(unsafe, order)))
        order = self._rng.randrange(len(LABEL_ORDERS))
        questions.append(self._question("word", user_turn(word_request(request, order)), words))
        caption = caption_text(scene if seen else None)
        questions.append(self._question("caption", user_turn(CAPTION_REQUEST), {caption: 1.0}))
        questions.append(self._described(request, caption, unsafe))
        said = f" {refusal_text(scene.activity, self._rng.randrange(2))}{REASON_OPENING}"
        reason = {reason_text(scene if seen else None): 1.0}
        questions.append(self._question("reason", user_turn(request), reason, said))
        return questions

    def _described(self, request: str, caption: str, unsafe: float) -> Question:
        """One of the ways to ask for a verdict with a description at hand."""
        order = self._rng.randrange(len(LABEL_ORDERS))
        kind = self._rng.choice(("captioned", "letter", "word"))
        if kind == "word":
            words = {"unsafe": unsafe, "safe": 1.0 - unsafe}
            return self._question("described", text_turn(described_request(request, caption, None)), words)
        if kind == "letter":
            turn = text_turn(described_request(request, caption, order))
        else:
            turn = user_turn(captioned_request(request, caption, order))
        return self._question("described", turn, _letters(unsafe, order))

    def _question(self, task: Task, turn: str, replies: dict[str, float], said: str = "") -> Question:
        reply = self._rng.choices(list(replies), list(replies.values()))[0]
        return Question(task, turn, reply, replies, said)

    def _prompt_ids(self, turn: str) -> list[int]:
        if turn not in self._ids:
            self._ids[turn] = self._tokenizer(turn.replace(IMAGE_TOKEN, IMAGE_TOKEN * IMAGE_TOKENS)).input_ids
        return self._ids[turn]

    def _said_ids(self, said: str) -> list[int]:
        if said not in self._ids:
            self._ids[said] = self._tokenizer(said, add_special_tokens=False).input_ids
        return self._ids[said]

    def _reply_ids(self, reply: str) -> list[int]:
        spaced = f" {reply}"
        if spaced not in self._ids:
            ids = self._tokenizer(spaced, add_special_tokens=False).input_ids
            self._ids[spaced] = [*ids, self._tokenizer.eos_token_id]
        return self._ids[spaced]


def _letters(unsafe: float, order: int) -> dict[str, float]:
    """Return the letters of one order with their probabilities."""
    return {judge_letter(True, order): unsafe, judge_letter(False, order): 1.0 - unsafe}


class _Packer:
    """Lays the tasks of each picture behind one another; what two prompts begin with is computed once."""

    def __init__(self, rows: int, vocab_size: int, pad: int) -> None:
        self._vocab_size, self._pad = vocab_size, pad
        self._ids: list[list[int]] = [[] for _ in range(rows)]
        self._positions: list[list[int]] = [[] for _ in range(rows)]
        # Per row and task: its ids from the start of its prompt, the columns they stand in, and how many are another's.
        self._paths: list[list[tuple[list[int], list[int], int]]] = [[] for _ in range(rows)]
        self._first: list[tuple[int, int, dict[int, float], int]] = []
        self._rest: list[tuple[int, int, int, int]] = []

    def add(self, row: int, task: int, prompt: Sequence[int], reply: Sequence[int], first: dict[int, float]) -> None:
        """Append one task to a row; `first` is the distribution of the reply's first token."""
        shared, columns = 0, []
        for other_ids, other_columns, _ in self._paths[row]:
            common = _common(other_ids, prompt)
            if common > shared:
                shared, columns = common, other_columns[:common]
        # The last token of a prompt is never shared: its reply is predicted there.
        shared = min(shared, len(prompt) - 1)
        start = len(self._ids[row])
        own = [*prompt[shared:], *reply[:-1]]
        self._ids[row].extend(own)
        self._positions[row].extend(range(shared, shared + len(own)))
        path = [*columns[:shared], *range(start, start + len(own))]
        self._paths[row].append(([*prompt, *reply[:-1]], path, shared))
        before = path[len(prompt) - 1]
        self._first.append((row, before, first, task))
        self._rest.extend((row, before + place, token, task) for place, token in enumerate(reply) if place)

    def batch(self, pixel_values: Tensor) -> Batch:
        """Return everything added so far as one batch."""
        rows, length = len(self._ids), max(map(len, self._ids))
        ids = torch.full((rows, length), self._pad, dtype=torch.int64)
        positions = torch.zeros_like(ids)
        # A padding column looks at itself: a row of the mask without any True would be NaN.
        mask = torch.eye(length, dtype=torch.bool).repeat(rows, 1, 1)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        for row, paths in enumerate(self._paths):
            ids[row, : len(self._ids[row])] = torch.tensor(self._ids[row])
            positions[row, : len(self._ids[row])] = torch.tensor(self._positions[row])
            for _, columns, shared in paths:
                start, end = columns[shared], columns[-1] + 1
                mask[row, start:end, columns[:shared]] = True
                mask[row, start:end, start:end] = causal[: end - start, : end - start]
        return Batch(pixel_values, ids, positions, mask[:, None], self._first_targets(), self._rest_targets())

    def _first_targets(self) -> Targets:
        labels = torch.zeros(len(self._first), self._vocab_size)
        for place, (_, _, distribution, _) in enumerate(self._first):
            for token, probability in distribution.items():
                labels[place, token] = probability
        rows, columns, tasks = (torch.tensor([entry[i] for entry in self._first]) for i in (0, 1, 3))
        return Targets(rows, columns, labels, tasks)

    def _rest_targets(self) -> Targets:
        rows, columns, labels, tasks = (torch.tensor(column) for column in zip(*self._rest, strict=True))
        return Targets(rows, columns, labels, tasks)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common beginning."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return min(len(first), len(second))
