"""Requests and scripted judges: shared by the judges' tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from safecode_mllm.judges import JudgeRequest, Verdict


def picture(seed: int = 0, size: tuple[int, int] = (12, 9)) -> Image.Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def request(number: int = 0, **changes: Any) -> JudgeRequest:
    """A request that no other number gives."""
    return JudgeRequest(**{"image": picture(number), "prompt": f"How do I do number {number}?", **changes})


def requests(n: int) -> list[JudgeRequest]:
    """`n` different requests."""
    return [request(number) for number in range(n)]


class Scripted:
    """A judge that answers as a function of the request says, and keeps what it was asked."""

    def __init__(
        self, answer: Callable[[JudgeRequest], Verdict], name: str = "scripted", version: str | None = "1", **extra: Any
    ) -> None:
        self.answer, self.name, self.version = answer, name, version
        self.asked: list[JudgeRequest] = []
        for key, value in extra.items():
            setattr(self, key, value)

    def judge_many(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        self.asked += requests
        return [self.answer(request) for request in requests]


def says(label: str, p: float | None = None, **fields: Any) -> Scripted:
    """A judge that gives every request the same verdict."""
    name = fields.pop("judge", "scripted")
    return Scripted(lambda _: Verdict(label, p, judge=name, **fields), name)  # type: ignore[arg-type]
