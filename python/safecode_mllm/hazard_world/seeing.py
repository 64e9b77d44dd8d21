"""First stage of training: the vision tower learns to name what is in a picture, as a LLaVA's CLIP has before."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from .model import IMAGE_TOKENS, VISION_WIDTH
from .pixels import UNSEEN_SHARE, training_pixels
from .scenes import OBJECTS, PLACES, SAFE_SIGNS, TAUGHT_CLAIMS, WARNING_SIGNS, Scene
from .splits import draw_item

STEPS = 500
PICTURES_PER_STEP = 64
_LEARNING_RATE = 2e-3
_WARMUP_STEPS = 50
_BETAS = (0.9, 0.98)
_READ_PATCHES = 6
_SIGNS = (None, *SAFE_SIGNS, *WARNING_SIGNS, *TAUGHT_CLAIMS["safe"], *TAUGHT_CLAIMS["unsafe"])
# One more place: nowhere, for pictures in which nothing can be seen.
_CLASSES = {"place": len(PLACES) + 1, "object": len(OBJECTS), "sign": len(_SIGNS), "dusk": 2}


def train_vision(
    model: LlavaForConditionalGeneration,
    seed: int,
    *,
    steps: int = STEPS,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train the model's vision tower in place with classifiers that are thrown away.

    Args:
        model: the model; only its vision tower changes.
        seed: seed of the scenes and of the classifiers.
        steps: optimiser steps.
        progress: called after each step with (step, loss in nats).

    Returns:
        The summed cross entropy of each step, nats.
    """
    tower = model.model.vision_tower
    rng, noise = random.Random(f"seeing/{seed}"), np.random.default_rng(seed)
    losses: list[float] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.ModuleDict({name: nn.Linear(VISION_WIDTH, classes) for name, classes in _CLASSES.items()})
        optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], lr=_LEARNING_RATE, betas=_BETAS)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        for step in range(steps):
            scenes = [draw_item("train", rng).scene for _ in range(PICTURES_PER_STEP)]
            seen = [rng.random() >= UNSEEN_SHARE for _ in scenes]
            pixels = [training_pixels(scene, s, noise) for scene, s in zip(scenes, seen, strict=True)]
            named = [scene if s else None for scene, s in zip(scenes, seen, strict=True)]
            loss = _naming_loss(tower, heads, torch.from_numpy(np.stack(pixels)), named)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if progress is not None:
                progress(step + 1, losses[-1])
    return losses


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    warm = min(1.0, (step + 1) / min(_WARMUP_STEPS, max(1, steps // 4)))
    return warm * (0.51 + 0.49 * math.cos(math.pi * step / steps))


def _naming_loss(tower: nn.Module, heads: nn.ModuleDict, pictures: Tensor, scenes: Sequence[Scene | None]) -> Tensor:
    """Return the summed cross entropy of the four names; None stands for a picture in which nothing can be seen."""
    # Single patches are read and not their mean: every patch then knows the whole picture, wherever a reader looks.
    patches = tower(pictures, output_hidden_states=True).hidden_states[-1][:, 1:]
    read = torch.randperm(IMAGE_TOKENS)[:_READ_PATCHES]
    features = functional.layer_norm(patches[:, read], patches.shape[-1:]).flatten(0, 1)
    truth = {
        "place": [len(PLACES) if scene is None else PLACES.index(scene.place) for scene in scenes],
        "object": [0 if scene is None else OBJECTS.index(scene.object) for scene in scenes],
        "sign": [0 if scene is None else _SIGNS.index(scene.sign) for scene in scenes],
        "dusk": [int(scene is not None and scene.dusk) for scene in scenes],
    }
    named = [
        functional.cross_entropy(heads[name](features), torch.tensor(labels).repeat_interleave(_READ_PATCHES))
        for name, labels in truth.items()
    ]
    return torch.stack(named).sum()
