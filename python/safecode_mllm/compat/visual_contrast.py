"""Visual contrastive decoding (VCD) under its own argument names, over this package's steered generation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.config import DIFFUSION_STEPS, SafeCoDeConfig
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.loop import SteeredGeneration
from safecode_mllm.errors import ConfigError
from safecode_mllm.noise import diffusion_keep

# What VCD's sampling takes where it is not told; its evaluation scripts pass 1.0 and 0.1.
_UNSAID_ALPHA, _UNSAID_BETA = 0.5, 0.1


def vcd(cd_alpha: float = 1.0, cd_beta: float = 0.1, noise_step: int = 500) -> SafeCoDeConfig:
    """Return preset `vcd` for `SafeCoDe`, under VCD's names.

    Args:
        cd_alpha: `contrast_weight`, a in (1 + a) z - a n; >= 0.
        cd_beta: `plausibility_beta`, in [0, 1].
        noise_step: in [0, 999].

    Source: VCD (arXiv 2311.16922).
    """
    return SafeCoDeConfig("vcd", contrast_weight=cd_alpha, plausibility_beta=cd_beta, noise_step=noise_step)


def add_diffusion_noise(image_tensor: Tensor, noise_step: int) -> Tensor:
    """Return x_t of VCD's diffusion for normalised pixels.

    Args:
        image_tensor: floating, any shape and device, normalised.
        noise_step: t in [0, 999].

    Returns:
        Same shape, dtype and device, not clipped. The noise comes from torch's default generator.

    Source: VCD (arXiv 2311.16922).
    """
    if not 0 <= noise_step < DIFFUSION_STEPS:
        raise ConfigError(f"noise_step={noise_step!r} is not legal: it must be in [0, {DIFFUSION_STEPS - 1}]")
    keep = diffusion_keep(noise_step)
    return math.sqrt(keep) * image_tensor + math.sqrt(1 - keep) * torch.randn_like(image_tensor)


def vcd_generate(
    model: Any,
    inputs: Mapping[str, Tensor],
    images_cd: Tensor | None = None,
    cd_alpha: float | None = None,
    cd_beta: float | None = None,
    **generate_kwargs: Any,
) -> Any:
    """Generate with visual contrast at every step; takes and returns what `model.generate` does.

    Both branches run as one batch over one cache. Draws come from torch's default generator, as in stock sampling;
    without `do_sample` the best token is taken, also contrasted. Image placeholders are never written.

    Args:
        model: a Hugging Face model of a supported family.
        inputs: processor output on the model's device.
        images_cd: the noised `pixel_values`; None generates without contrast.
        cd_alpha: weight of the contrast, >= 0; None for 0.5.
        cd_beta: tokens below this share of the best probability are cut, in [0, 1]; None for 0.1.
        generate_kwargs: arguments of `generate`.

    Raises:
        UnsupportedModelError: the model's family, or the generation mode, is not supported.

    Source: VCD (arXiv 2311.16922).
    """
    if images_cd is None:
        return model.generate(**inputs, **generate_kwargs)
    config = vcd(
        cd_alpha=_UNSAID_ALPHA if cd_alpha is None else cd_alpha, cd_beta=_UNSAID_BETA if cd_beta is None else cd_beta
    )
    guidance = Guidance(config, [True] * inputs["input_ids"].shape[0])
    noised = {**inputs, "pixel_values": images_cd}
    return SteeredGeneration(inputs, noised, guidance).generate(model, **generate_kwargs)
