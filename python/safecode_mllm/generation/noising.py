"""The noised view of a whole batch, from what the processor made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.errors import ConfigError, ImageError
from safecode_mllm.noise import noised_pixels

PIXELS = "pixel_values"
_PATCH_GRID = "image_grid_thw"


def noised_batch(
    inputs: Mapping[str, Tensor],
    image_tokens: Sequence[int],
    image_processor: Any,
    config: SafeCoDeConfig,
    seeds: Sequence[int],
) -> dict[str, Tensor]:
    """Return processor output of B prompts with every image noised, each as if its prompt were alone.

    Args:
        inputs: processor output: `input_ids` int64 [B, L], `pixel_values` with one entry per image or per prompt along
            dim 0, or flattened patches with their `image_grid_thw` [N, 3].
        image_tokens: ids that stand for image features.
        image_processor: as for `noised_pixels`.
        config: reads noise, noise_space, noise_sigma, noise_step.
        seeds: one per prompt.

    Raises:
        ConfigError: the noise needs whole pictures, and there are none here.
        ImageError: the number of images does not fit the prompts.
    """
    if config.noise_space == "image":
        raise ConfigError(
            'noise_space="image" needs whole pictures, and generate() has pixel values only: set noise_space="model", '
            "pass noised=processor(images=..., text=...) made from noised pictures, or use SafeCoDe.chat"
        )
    pixels = inputs[PIXELS]
    patched = _PATCH_GRID in inputs
    images = pixels.split(inputs[_PATCH_GRID].prod(-1).tolist()) if patched else pixels.split(1)
    owners = _owners(inputs["input_ids"], image_tokens, len(images))
    noised = []
    for image, (row, index) in zip(images, owners, strict=True):
        # Padding is not noised; nor may it take draws, or the noise would depend on the rest of the batch.
        kept = _without_padding_tiles(image)
        changed = noised_pixels(kept, image_processor, config, seeds[row], index)
        if kept.shape != image.shape:
            changed = torch.cat([changed, image[:, kept.shape[1] :]], 1)
        noised.append(changed)
    return dict(inputs, **{PIXELS: torch.cat(noised)})


def _owners(ids: Tensor, image_tokens: Sequence[int], images: int) -> list[tuple[int, int]]:
    """Return for each image its prompt, and which of that prompt's images it is."""
    rows = ids.shape[0]
    if images == rows:
        return [(row, 0) for row in range(rows)]
    is_image = torch.isin(ids, torch.tensor(list(image_tokens), device=ids.device))
    begins = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    counts = begins.sum(-1).tolist()
    if sum(counts) != images:
        raise ImageError(
            f"pixel_values holds {images} images, but the prompts have room for {counts}: pass the inputs of one call "
            "of the model's own processor"
        )
    return [(row, index) for row, count in enumerate(counts) for index in range(count)]


def _without_padding_tiles(image: Tensor) -> Tensor:
    """Return [1, tiles, C, H, W] without the tiles of exact zeros at its end; other layouts have none."""
    if image.ndim != 5:
        return image
    filled = image[0].flatten(1).any(-1).nonzero()
    return image if len(filled) == 0 else image[:, : int(filled[-1]) + 1]
