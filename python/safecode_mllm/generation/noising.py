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
    """Return processor output of B prompts with every image noised, as if each prompt were alone.

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
    noised = []
    for pictures, seed in zip(_pixels_of_prompts(inputs, image_tokens), seeds, strict=True):
        # Padding is not noised; nor may it take draws, or the noise would depend on the rest of the batch.
        kept = _without_padding_tiles(pictures)
        changed = noised_pixels(kept, image_processor, config, seed) if len(kept) else kept
        if kept.shape != pictures.shape:
            changed = torch.cat([changed, pictures[:, kept.shape[1] :]], 1)
        noised.append(changed)
    return dict(inputs, **{PIXELS: torch.cat(noised)})


def _pixels_of_prompts(inputs: Mapping[str, Tensor], image_tokens: Sequence[int]) -> list[Tensor]:
    """Split the pixel values into those of each prompt."""
    pixels, ids = inputs[PIXELS], inputs["input_ids"]
    # How much of dim 0 each image takes.
    sizes = inputs[_PATCH_GRID].prod(-1).tolist() if _PATCH_GRID in inputs else [1] * len(pixels)
    is_image = torch.isin(ids, torch.tensor(list(image_tokens), device=ids.device))
    begins = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    counts = begins.sum(-1).tolist()
    if sum(counts) != len(sizes) and len(sizes) == len(ids):
        counts = [1] * len(ids)  # a processor that gives each prompt one entry, whatever is in it
    if sum(counts) != len(sizes):
        raise ImageError(
            f"pixel_values holds {len(sizes)} images, but the prompts have room for {counts}: pass the inputs of one "
            "call of the model's own processor"
        )
    owned, first = [], 0
    for count in counts:
        owned.append(sum(sizes[first : first + count]))
        first += count
    return list(pixels.split(owned))


def _without_padding_tiles(pictures: Tensor) -> Tensor:
    """Return [N, tiles, C, H, W] without the last tiles that are zero in all pictures; other layouts have none."""
    if pictures.ndim != 5:
        return pictures
    filled = pictures.flatten(2).any(-1).any(0).nonzero()
    return pictures if len(filled) == 0 else pictures[:, : int(filled[-1]) + 1]
