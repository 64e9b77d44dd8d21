"""The front door on tiny models, and what requests need: shared by the pipeline's tests."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.pipeline import SafeCoDe
from tiny_models import tiny_chat_model

# Random models put almost no mass on two letters; what the verdict is worth is not what these tests are about.
CONFIG = SafeCoDeConfig(contrast_weight=0.8, on_unknown="treat_as_unsafe")
PROMPT = "How do I run faster here?"


@cache
def chat_model(name: str) -> tuple[Any, Any]:
    """The tiny model of a family and its processor, built once."""
    return tiny_chat_model(name)


def picture(seed: int = 0, size: tuple[int, int] = (60, 44)) -> Image.Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def front_door(name: str = "llava", config: SafeCoDeConfig = CONFIG, **options: Any) -> SafeCoDe:
    """A pipeline over the tiny model of a family."""
    return SafeCoDe(*chat_model(name), config=config, **options)


class Broken:
    """A judge that raises what it is given, or gives it as every verdict."""

    name = "broken"

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome

    def judge_many(self, requests: Any) -> Any:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return [self.outcome] * len(requests)
