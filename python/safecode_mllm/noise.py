"""Noised views: the same picture with what it shows taken away, reproducible from a seed on every device."""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from safecode_mllm.config import DIFFUSION_STEPS, SafeCoDeConfig
from safecode_mllm.errors import ConfigError

# noise_sigma 1 blurs with a radius of a tenth of the shorter side: text and faces are gone, the layout stays.
BLUR_DIVISOR = 10
# Mid grey, in [0, 1].
BLANK_LEVEL = 0.5


class _Scale(NamedTuple):
    """Where the processor puts black, white and mid grey: each [C], float32."""

    black: Tensor
    white: Tensor


def image_generator(seed: int, index: int) -> torch.Generator:
    """Return a CPU generator of its own for image `index` of the request with `seed`; global ones are not touched."""
    digest = hashlib.sha256(f"safecode noise {int(seed)} {int(index)}".encode()).digest()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return generator


def noised_image(image: Image.Image, config: SafeCoDeConfig, seed: int, index: int = 0) -> Image.Image:
    """Return a noised copy of a picture, for noise_space="image".

    Args:
        image: RGB, any size.
        config: reads noise and noise_sigma. "gaussian" adds N(0, sigma) in [0, 1] pixel units, clips, and rounds back
            to bytes; "blur" has a radius of sigma / 10 of the shorter side; "blank" is mid grey.
        seed: of the request.
        index: of the image within the request, from 0.

    Returns:
        RGB of the same size; a function of (pixels, config, seed, index) alone.

    Raises:
        ConfigError: noise="diffusion", which is defined on normalised values only.

    Source: SafeCoDe (arXiv 2509.19212), stage 1; before the resize, as in its code.
    """
    if config.noise == "blank":
        level = round(BLANK_LEVEL * 255)
        return Image.new("RGB", image.size, (level, level, level))
    if config.noise == "blur":
        return image.filter(ImageFilter.GaussianBlur(config.noise_sigma * min(image.size) / BLUR_DIVISOR))
    if config.noise != "gaussian":
        raise ConfigError(f'noise={config.noise!r} is defined on normalised values: set noise_space="model"')
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).float() / 255
    noise = torch.randn(pixels.shape, generator=image_generator(seed, index))
    noised = (pixels + config.noise_sigma * noise).clamp(0, 1)
    return Image.fromarray((noised * 255).round().to(torch.uint8).numpy())


def noised_pixels(
    pixel_values: Tensor, image_processor: Any, config: SafeCoDeConfig, seed: int, index: int = 0
) -> Tensor:
    """Return a noised copy of a processor's output for one image, for noise_space="model".

    Args:
        pixel_values: floating, any device: [.., C, H, W] (with 5 dimensions or more the one before C is
            tiles, and a tile of exact zeros is padding and stays zero), or Qwen's flattened patches [N, C * T * P * P].
        image_processor: read for image_mean, image_std, do_normalize, rescale_factor, do_rescale, and for flattened
            patches temporal_patch_size and patch_size.
        config: reads noise, noise_sigma and noise_step. "gaussian" adds N(0, sigma) in [0, 1] pixel units and clips to
            the range that pixels can have; "diffusion" is VCD's x_t, not clipped; "blank" is mid grey.
        seed: of the request.
        index: of the image within the request, from 0.

    Returns:
        Same shape, dtype and device. The noise is drawn in float32 on the CPU, so every device sees the same.

    Raises:
        ConfigError: noise="blur", which needs the whole picture.
        ValueError: the layout of pixel_values is none of the above.

    Source: SafeCoDe (arXiv 2509.19212), stage 1; diffusion: VCD (arXiv 2311.16922).
    """
    if config.noise == "blur":
        raise ConfigError('noise="blur" needs whole pictures: set noise_space="image"')
    scale = _scale(image_processor)
    grouped = _group_channels(pixel_values, image_processor, len(scale.black))
    values = grouped.float()
    # One draw serves all temporal frames: they are copies of one picture and must stay copies.
    noise_shape = (*values.shape[:-3], 1, *values.shape[-2:])
    # [C] against [.., C, T, H, W]
    black, white = (level.to(values.device)[:, None, None, None] for level in scale)
    if config.noise == "blank":
        noised = (black + BLANK_LEVEL * (white - black)).expand(values.shape)
    else:
        noise = torch.randn(noise_shape, generator=image_generator(seed, index)).to(values.device)
        if config.noise == "diffusion":
            keep = diffusion_keep(config.noise_step)
            noised = math.sqrt(keep) * values + math.sqrt(1 - keep) * noise
        else:
            noised = (values + config.noise_sigma * (white - black) * noise).clamp(black, white)
    result = noised.reshape(pixel_values.shape).to(pixel_values.dtype)
    return _keep_padding_tiles(pixel_values, result) if pixel_values.ndim >= 5 else result.contiguous()


def diffusion_keep(step: int) -> float:
    """Return the share of the signal's variance left after `step` in [0, 999] of VCD's diffusion (alpha-bar)."""
    ramp = torch.linspace(-6, 6, DIFFUSION_STEPS, dtype=torch.float64)
    betas = torch.sigmoid(ramp) * (0.005 - 1e-5) + 1e-5
    return float(torch.cumprod(1 - betas, 0)[step])


def _scale(image_processor: Any) -> _Scale:
    mean, std = torch.zeros(3), torch.ones(3)
    if getattr(image_processor, "do_normalize", True):
        mean = torch.as_tensor(image_processor.image_mean, dtype=torch.float32).reshape(-1)
        std = torch.as_tensor(image_processor.image_std, dtype=torch.float32).reshape(-1)
    rescales = getattr(image_processor, "do_rescale", True)
    top = 255 * float(getattr(image_processor, "rescale_factor", 1 / 255)) if rescales else 255.0
    return _Scale(black=-mean / std, white=(top - mean) / std)


def _group_channels(pixel_values: Tensor, image_processor: Any, channels: int) -> Tensor:
    """View pixel values as [.., C, T, H, W]."""
    if pixel_values.ndim >= 4:
        if pixel_values.shape[-3] != channels:
            raise ValueError(f"pixel_values has shape {tuple(pixel_values.shape)}: expected {channels} channels at -3")
        return pixel_values.unsqueeze(-3)
    side: Any = getattr(image_processor, "patch_size", None)
    frames: Any = getattr(image_processor, "temporal_patch_size", None)
    has_patches = pixel_values.ndim == 2 and isinstance(side, int) and isinstance(frames, int)
    if has_patches and pixel_values.shape[1] == channels * frames * side * side:
        return pixel_values.reshape(-1, channels, frames, side, side)
    raise ValueError(
        f"pixel_values has shape {tuple(pixel_values.shape)}: expected [.., {channels}, H, W], or patches "
        "[N, C * temporal_patch_size * patch_size ** 2] of an image processor with these attributes"
    )


def _keep_padding_tiles(original: Tensor, noised: Tensor) -> Tensor:
    """Models tell padding tiles by exact zeros, so these stay as they are."""
    is_padding = (original == 0).flatten(-3).all(-1)
    return noised.masked_fill(is_padding[..., None, None, None], 0)
