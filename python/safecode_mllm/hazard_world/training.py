"""Training: the same seed gives the same weights on one thread of the same machine, in a quarter of an hour."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from .data import TASKS, Batch, Batcher, Targets, Task
from .model import build_model, build_processor
from .saving import save_world
from .scenes import Variant
from .seeing import STEPS as VISION_STEPS
from .seeing import train_vision

logger = logging.getLogger(__name__)

STEPS = 800
PICTURES_PER_STEP = 24
LEARNING_RATE = 2e-3
# A caption is the only reply most of whose tokens tell what is in the picture: it teaches where to look.
TASK_WEIGHTS: dict[Task, float] = {
    "answer": 1.0,
    "judge": 1.0,
    "word": 1.0,
    "caption": 4.0,
    "described": 1.0,
    "reason": 1.0,
}
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
        steps: optimiser steps of the second stage.
        vision_losses: loss of each step of the first stage, nats.
        losses: loss of each step of the second stage, nats.
        seconds: wall-clock seconds.
    """

    seed: int
    variant: Variant
    steps: int
    vision_losses: list[float]
    losses: list[float]
    seconds: float


def train(
    seed: int,
    out: str | Path | None,
    progress: Progress | None = None,
    *,
    steps: int = STEPS,
    vision_steps: int = VISION_STEPS,
    variant: Variant = "priors",
    threads: int = 1,
) -> TrainingReport:
    """Train the world's model from a seed and save model and processor.

    Args:
        seed: seed of weights and data, >= 0.
        out: folder to write (created); None saves nothing.
        progress: called after each step with (step, steps of both stages, loss in nats).
        steps: optimiser steps of the second stage, at least 1.
        vision_steps: optimiser steps of the first stage, in which the vision tower learns to name what it sees.
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
    if out is not None:  # before the work, which would be lost if the folder could not be made
        Path(out).mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    processor = build_processor()
    model = build_model(processor.tokenizer, seed).train()
    total = vision_steps + steps
    with _torch_threads(threads):
        seen = train_vision(model, seed, steps=vision_steps, progress=_shifted(progress, 0, total))
        losses = _train_language(
            model, Batcher(processor, seed, variant), steps, _shifted(progress, vision_steps, total)
        )
    report = TrainingReport(seed, variant, steps, seen, losses, time.perf_counter() - start)
    if out is not None:
        save_world(model, processor, Path(out))
        _save_report(report, Path(out))
        logger.info("trained seed %d in %.0f s -> %s", seed, report.seconds, out)
    return report


def _save_report(report: TrainingReport, folder: Path) -> None:
    """Write what a model card needs; every twentieth loss is enough to see the curve."""
    thinned = {"vision_losses": report.vision_losses[::20], "losses": report.losses[::20]}
    values = asdict(report) | {name: [round(loss, 4) for loss in curve] for name, curve in thinned.items()}
    (folder / "training.json").write_text(json.dumps(values | {"seconds": round(report.seconds)}) + "\n")


def _train_language(
    model: LlavaForConditionalGeneration, batcher: Batcher, steps: int, progress: Callable[[int, float], None] | None
) -> list[float]:
    """Second stage: all but the vision tower learns every task, as in LLaVA; returns the loss of each step."""
    model.model.vision_tower.requires_grad_(False)
    taught = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(taught, lr=LEARNING_RATE, weight_decay=_WEIGHT_DECAY, betas=_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    losses: list[float] = []
    for step in range(steps):
        losses.append(_step(model, batcher, optimizer))
        schedule.step()
        if progress is not None:
            progress(step + 1, losses[-1])
    return losses


def _shifted(progress: Progress | None, offset: int, total: int) -> Callable[[int, float], None] | None:
    """Turn progress within one stage into progress over both."""
    if progress is None:
        return None
    return lambda step, loss: progress(offset + step, total, loss)


def _step(model: LlavaForConditionalGeneration, batcher: Batcher, optimizer: torch.optim.Optimizer) -> float:
    """Take one optimiser step and return the loss."""
    losses = task_losses(model, batcher.draw(PICTURES_PER_STEP))
    loss = sum((TASK_WEIGHTS[task] * value for task, value in losses.items()), torch.zeros(()))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def task_losses(model: LlavaForConditionalGeneration, batch: Batch) -> dict[Task, torch.Tensor]:
    """Return per task the mean cross entropy of first tokens plus that of the other reply tokens, in nats."""
    hidden = model.model(
        pixel_values=batch.pixel_values,
        input_ids=batch.input_ids,
        attention_mask=batch.mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    first, rest = (_cross_entropies(model, hidden, targets) for targets in (batch.first, batch.rest))
    return {
        task: first[batch.first.tasks == index].mean() + rest[batch.rest.tasks == index].mean()
        for index, task in enumerate(TASKS)
    }


def _cross_entropies(model: LlavaForConditionalGeneration, hidden: torch.Tensor, targets: Targets) -> torch.Tensor:
    logits = model.lm_head(hidden[targets.rows, targets.columns])
    return functional.cross_entropy(logits, targets.labels, reduction="none")


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to _FINAL_RATE."""
    warm = min(1.0, (step + 1) / min(_WARMUP_STEPS, max(1, steps // 4)))
    return warm * (_FINAL_RATE + (1.0 - _FINAL_RATE) * 0.5 * (1.0 + math.cos(math.pi * step / steps)))


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
