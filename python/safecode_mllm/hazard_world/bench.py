"""Scenes with everything that all arms share, and the one way an arm is decoded: the package's own pipeline."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image

from .. import results
from ..config import SafeCoDeConfig
from ..judges.protocol import Verdict
from ..pipeline import SafeCoDe
from ..refusal import RefusalTokens, refusal_tokens
from .arms import Arm, controlled_verdicts, random_tokens
from .render import render
from .scenes import STRATA, Stratum
from .score import Outcome, classify
from .splits import Item, Split, draw_items

# The longest sentence of the world has 18 tokens; a longer generation is garbled and need not be finished.
MAX_NEW_TOKENS = 24
DEFAULT_BATCH_SIZE = 64
# Keeps the noise of two evaluations apart.
_SEED_STRIDE = 1_000_003

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Bench:
    """Scenes, pictures and verdicts, made once, so that arms differ in decoding only.

    Attributes:
        model: a LlavaForConditionalGeneration.
        processor: its processor.
        items: the scenes and requests.
        images: their pictures.
        verdicts: the self-judge's verdicts.
        seed: seed of the scenes; also of noise, controls and bootstraps.
        batch_size: requests per forward pass.
    """

    model: Any
    processor: Any
    items: list[Item]
    images: list[Image.Image]
    verdicts: list[Verdict]
    seed: int
    batch_size: int

    @property
    def unsafe(self) -> list[bool]:
        """The truth per scene."""
        return [item.scene.unsafe for item in self.items]

    @property
    def strata(self) -> list[Stratum]:
        """The stratum per scene."""
        return [item.scene.stratum for item in self.items]

    def judge_accuracy(self) -> dict[Stratum, float]:
        """Return the share of right verdicts per stratum; an unknown verdict is not right."""
        right: dict[Stratum, list[bool]] = {stratum: [] for stratum in STRATA}
        for item, verdict in zip(self.items, self.verdicts, strict=True):
            right[item.scene.stratum].append(verdict.label == ("unsafe" if item.scene.unsafe else "safe"))
        return {stratum: sum(hits) / len(hits) for stratum, hits in right.items() if hits}

    def decode(self, arm: Arm, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Return the whole generation of one arm for every scene.

        Raises:
            SafeCoDeError: a request failed; scenes never fail on purpose.
        """
        pipeline = SafeCoDe(self.model, self.processor, "self", arm.config, self._tokens(arm))
        requests = [self._request(arm, row, v) for row, v in enumerate(self._verdicts(arm))]
        with _without_advice():
            answers = pipeline.chat_batch(
                requests, batch_size=self.batch_size, record=False, progress=progress, max_new_tokens=MAX_NEW_TOKENS
            )
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        return [answer.text for answer in answers]

    def outcomes(self, arm: Arm, progress: Callable[[int, int], None] | None = None) -> list[Outcome]:
        """Return what each generation of one arm does."""
        return [classify(text) for text in self.decode(arm, progress)]

    def judge_alone(self) -> list[Outcome]:
        """Return the outcomes of a system that refuses whenever the verdict is not "safe" and else answers."""
        return ["answered" if verdict.label == "safe" else "refused" for verdict in self.verdicts]

    def _verdicts(self, arm: Arm) -> list[Verdict]:
        return controlled_verdicts(self.verdicts, arm.verdicts, self.seed)

    def _request(self, arm: Arm, row: int, verdict: Verdict) -> dict[str, Any]:
        request: dict[str, Any] = {
            "image": self.images[row],
            "prompt": self.items[row].request,
            "seed": self.seed * _SEED_STRIDE + row,
        }
        if arm.config is None:
            return request | {"steering": "off"}
        if arm.config.uses_verdict:
            request["verdict"] = verdict
        if arm.noised == "same_image":
            request["noised_image"] = self.images[row]
        elif arm.noised == "other_scene":
            request["noised_image"] = self.images[other_rows(len(self.images), self.seed)[row]]
        return request

    def _tokens(self, arm: Arm) -> RefusalTokens | None:
        if arm.tokens == "refusal":
            return None
        tokenizer = self.processor.tokenizer
        vocab_size = self.model.get_output_embeddings().weight.shape[0]
        kind = (arm.config or SafeCoDeConfig()).refusal_tokens
        special = set(tokenizer.all_special_ids)
        ordinary = [token for token in range(vocab_size) if token not in special]
        return random_tokens(refusal_tokens(tokenizer, vocab_size, kind), ordinary, vocab_size, self.seed)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keep quiet about answers without effect: some arms are built to fail, and the rates count each one."""
    logger = logging.getLogger(results.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@cache
def other_rows(n: int, seed: int) -> list[int]:
    """Return for each of n rows another row, drawn without regard to what is in it; never the row itself if n > 1."""
    order = list(range(n))
    random.Random(f"others/{seed}").shuffle(order)
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return [following[row] for row in range(n)]


def make_bench(
    model: Any,
    processor: Any,
    *,
    n: int,
    seed: int,
    split: Split = "test",
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Bench:
    """Draw fresh scenes, render them and ask the self-judge once.

    Args:
        model: a LlavaForConditionalGeneration.
        processor: its processor.
        n: number of scenes, at least 2.
        seed: seed of the scenes, >= 0.
        split: whose combinations and wordings are used.
        batch_size: requests per forward pass, at least 1.

    Raises:
        ValueError: n or seed is out of range.
    """
    if n < 2:
        raise ValueError(f"n={n} must be at least 2: one safe and one unsafe scene")
    if seed < 0:
        raise ValueError(f"seed={seed} must be 0 or more")
    items = draw_items(split, n, seed)
    images = [render(item.scene) for item in items]
    requests = [{"image": image, "prompt": item.request} for image, item in zip(images, items, strict=True)]
    verdicts = SafeCoDe(model, processor).judge_batch(requests, batch_size=batch_size)
    return Bench(model, processor, items, images, verdicts, seed, batch_size)
