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
from .render import render
from .scenes import OBJECTS, PLACES, SAFE_SIGNS, WARNING_SIGNS, Scene
from .splits import draw_item

STEPS = 400
PICTURES_PER_STEP = 64
_LEARNING_RATE = 2e-3
_WARMUP_STEPS = 50
_READ_PATCHES = 6
_SIGNS = (None, *SAFE_SIGNS, *WARNING_SIGNS)
_CLASSES = {"place": len(PLACES), "object": len(OBJECTS), "sign": len(_SIGNS), "dusk": 2}


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
    rng, patches = random.Random(f"seeing/{seed}"), np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.ModuleDict({name: nn.Linear(VISION_WIDTH, classes) for name, classes in _CLASSES.items()})
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], lr=_LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARMUP_STEPS) * (0.52 + 0.5 * math.cos(math.pi * step / steps))
    )
    losses: list[float] = []
    for step in range(steps):
        scenes = [draw_item("train", rng).scene for _ in range(PICTURES_PER_STEP)]
        loss = _naming_loss(tower, heads, scenes, patches.choice(IMAGE_TOKENS, _READ_PATCHES, replace=False))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, losses[-1])
    return losses


def _naming_loss(tower: nn.Module, heads: nn.ModuleDict, scenes: Sequence[Scene], places: np.ndarray) -> Tensor:
    """Return the summed cross entropy of the four names, read from the patches at `places`, int64 [P]."""
    pixels = np.stack([np.asarray(render(scene), dtype=np.float32) for scene in scenes]).transpose(0, 3, 1, 2)
    patches = tower(torch.from_numpy(pixels / 127.5 - 1.0), output_hidden_states=True).hidden_states[-1][:, 1:]
    # Read from single patches and not from their mean: every patch then knows the whole picture, wherever a reader looks.
    chosen = patches[:, torch.from_numpy(places)]
    features = functional.layer_norm(chosen, chosen.shape[-1:]).flatten(0, 1)
    truth = {
        "place": [PLACES.index(scene.place) for scene in scenes],
        "object": [OBJECTS.index(scene.object) for scene in scenes],
        "sign": [_SIGNS.index(scene.sign) for scene in scenes],
        "dusk": [int(scene.dusk) for scene in scenes],
    }
    named = [
        functional.cross_entropy(heads[name](features), torch.tensor(labels).repeat_interleave(len(places)))
        for name, labels in truth.items()
    ]
    return torch.stack(named).sum()
