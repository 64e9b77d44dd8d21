"""What the tests of people's own `generate` calls share: batches as processors make them, a streamer."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from pipelines import PROMPT, front_door, picture
from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.prompts import collate
from tiny_models import TinyModel, tiny_model

UNSTEERED = SafeCoDeConfig(contrast_weight=0.0, plausibility_beta=0.0, bias_form="none")
OTHER_PROMPT = "What is this? (see below)"
PICTURES = (picture(1), picture(2, (40, 70)))


class Collect(BaseStreamer):
    """Keeps what a streamer is shown."""

    def __init__(self) -> None:
        self.seen: list[list[int] | str] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.seen.append("end")


@cache
def model_of(name: str) -> TinyModel:
    return tiny_model(name)


@cache
def two_prompts(name: str) -> dict[str, torch.Tensor]:
    """What a processor makes of two pictures of different sizes and two texts, as people batch them."""
    builder = front_door(name).builder
    rows = [builder.build(image, text) for image, text in zip(PICTURES, (PROMPT, OTHER_PROMPT), strict=True)]
    return collate(rows, builder.pad_token_id)


def by_chat(door: Any, **options: Any) -> list[list[int]]:
    """The front door's ids for the same two prompts, with seeds 5 and 6."""
    requests = [
        dict(image=image, prompt=prompt, seed=seed)
        for image, prompt, seed in zip(PICTURES, (PROMPT, OTHER_PROMPT), (5, 6), strict=True)
    ]
    return [result.token_ids for result in door.chat_batch(requests, **options)]


def new_ids(output: torch.Tensor, inputs: dict[str, torch.Tensor], like: list[list[int]]) -> list[list[int]]:
    """The generated ids, without the padding behind them."""
    start = inputs["input_ids"].shape[1]
    return [row[start : start + len(ids)].tolist() for row, ids in zip(output, like, strict=True)]
