"""The published code's pictures: how they are read, and how they are noised."""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image

from safecode_mllm.errors import ImageError
from safecode_mllm.images import FORMATS, check_size


def apply_gaussian_noise(image: Image.Image, stddev: float = 0.1) -> Image.Image:
    """Return a noised copy of a picture.

    Args:
        image: any mode; read as RGB.
        stddev: standard deviation of the noise on pixels in [0, 1].

    Returns:
        RGB of the same size, clipped and rounded to bytes. The noise comes from torch's global CPU generator, so
        `torch.manual_seed` decides it; `safecode_mllm.noise` has views that leave that generator alone.

    Source: the published code of SafeCoDe, stage 1.
    """
    pixels = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)) / 255.0
    noised = (pixels + torch.randn_like(pixels) * stddev).clamp(0.0, 1.0)
    return Image.fromarray((noised.numpy() * 255.0).round().astype(np.uint8))


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Return the picture at `path` as RGB as the published code reads it: not turned upright, transparency cut off.

    Raises:
        ImageError: no such file, too large, or of a format that is not allowed.
    """
    try:
        # Named formats only: PIL would try readers that nobody asked for.
        with Image.open(path, formats=FORMATS) as picture:
            check_size(*picture.size, str(path))
            return picture.convert("RGB")
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"real_img_path={str(path)!r} cannot be read as a picture: {error}") from error
