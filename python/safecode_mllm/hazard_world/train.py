"""Training: the same seed gives the same weights on one thread of the same machine, in about ten minutes."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from .data import IGNORED, Batch, Batcher, Task
from .model import build_model, build_processor
from .scenes import Variant

logger = logging.getLogger(__name__)

STEPS = 1600
ROWS: dict[Task, int] = {"answer": 24, "judge": 24, "caption": 16}
LEARNING_RATE = 2e-3
_WARMUP_STEPS = 80
_FINAL_RATE = 0.02
_WEIGHT_DECAY = 0.01
_BETAS = (0.9, 0.98)
_CLIP_NORM = 1.0

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class TrainingReport:
    """What one training did.

    Attributes:
        seed: seed of weights and data.
        variant: "priors" or "no_priors".
        steps: optimiser steps.
        losses: total loss of each step, nats.
        seconds: wall-clock seconds.
    """

    seed: int
    variant: Variant
    steps: int
    losses: list[float]
    seconds: float


def train(
    seed: int,
    out: str | Path | None,
    progress: Progress | None = None,
    *,
    steps: int = STEPS,
    variant: Variant = "priors",
    threads: int = 1,
) -> TrainingReport:
    """Train the world's model from a seed and save model and processor.

    Args:
        seed: seed of weights and data, >= 0.
        out: folder to write (created); None saves nothing.
        progress: called after each step with (step, steps, loss in nats).
        steps: optimiser steps.
        variant: "no_priors" trains the control world in which the answers follow the image alone.
        threads: torch threads; the result is bitwise the same only for the same number.

    Returns:
        The losses and the time.

    Raises:
        ValueError: steps < 1 or seed < 0.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    if seed < 0:
        raise ValueError(f"seed={seed} must be 0 or more")
    start = time.perf_counter()
    processor = build_processor()
    model = build_model(processor.tokenizer, seed).train()
    batcher = Batcher(processor, seed, variant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=_WEIGHT_DECAY, betas=_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    losses: list[float] = []
    with _torch_threads(threads):
        for step in range(steps):
            losses.append(_step(model, batcher, optimizer))
            schedule.step()
            if progress is not None:
                progress(step + 1, steps, losses[-1])
    report = TrainingReport(seed, variant, steps, losses, time.perf_counter() - start)
    if out is not None:
        save_world(model, processor, Path(out))
        (Path(out) / "training.json").write_text(json.dumps({**asdict(report), "losses": losses[::20]}) + "\n")
        logger.info("trained seed %d in %.0f s -> %s", seed, report.seconds, out)
    return report


def save_world(model: LlavaForConditionalGeneration, processor: object, folder: Path) -> None:
    """Write model.safetensors, the configurations and the tokenizer to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)  # type: ignore[attr-defined]


def _step(model: LlavaForConditionalGeneration, batcher: Batcher, optimizer: torch.optim.Optimizer) -> float:
    """Take one optimiser step over one batch of every task and return the summed loss."""
    total = 0.0
    for task, rows in ROWS.items():
        loss = batch_loss(model, batcher.draw(task, rows))
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def batch_loss(model: LlavaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """Return the first token's cross entropy against its distribution plus the mean over the other tokens."""
    replies = batch.rest_target.shape[1]
    logits = model(
        pixel_values=batch.pixel_values,
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        logits_to_keep=replies + 1,
        use_cache=False,
    ).logits
    first = functional.cross_entropy(logits[:, 0], batch.first_target)
    rest = functional.cross_entropy(
        logits[:, 1:].flatten(0, 1), batch.rest_target.flatten(), ignore_index=IGNORED
    )
    return first + rest


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to _FINAL_RATE."""
    warm = min(1.0, (step + 1) / min(_WARMUP_STEPS, max(1, steps // 4)))
    return warm * (_FINAL_RATE + (1.0 - _FINAL_RATE) * 0.5 * (1.0 + math.cos(math.pi * step / steps)))


@contextmanager
def _torch_threads(threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
