"""Training pictures as the image processor would give them; some show nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .render import SIZE, render
from .scenes import Scene

# A noised branch that the model never met would point anywhere: this share of pictures is blank or drowned in noise.
UNSEEN_SHARE = 0.10
_BLANK_SHARE = 0.3
_SIGMA_RANGE = (0.7, 1.6)


def training_pixels(scene: Scene, seen: bool, noise: np.random.Generator) -> NDArray[np.float32]:
    """Return a picture of the scene, or one in which nothing can be seen.

    Args:
        scene: the scene.
        seen: False gives one grey level, or the scene under clipped gaussian noise.
        noise: draws levels and noise.

    Returns:
        fp32 [3, 48, 48] in [-1, 1], as the image processor would give it.
    """
    if not seen and noise.random() < _BLANK_SHARE:
        return np.full((3, SIZE, SIZE), noise.uniform(-1.0, 1.0), dtype=np.float32)
    pixels = np.asarray(render(scene), dtype=np.float32).transpose(2, 0, 1) / 255.0
    if not seen:
        sigma = noise.uniform(*_SIGMA_RANGE)
        pixels = np.clip(pixels + noise.normal(0.0, sigma, pixels.shape).astype(np.float32), 0.0, 1.0)
    return pixels * 2.0 - 1.0
