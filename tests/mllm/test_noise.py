"""Noised views: reproducible per (seed, image), in range, blind to devices and to the global generators."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.errors import ConfigError
from safecode_mllm.noise import diffusion_keep, image_generator, noised_image, noised_pixels
from tiny_processors import tiny_processor

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
PROCESSOR = SimpleNamespace(
    image_mean=MEAN, image_std=STD, do_normalize=True, do_rescale=True, rescale_factor=1 / 255, patch_size=14,
    temporal_patch_size=2,
)  # fmt: skip
BLACK = torch.tensor([(0 - m) / s for m, s in zip(MEAN, STD, strict=True)])
WHITE = torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)])


def grey_pixels(*shape: int, level: float = 0.5) -> torch.Tensor:
    values = (torch.tensor([level] * 3) - torch.tensor(MEAN)) / torch.tensor(STD)
    return values[:, None, None].expand(*shape).contiguous()


def picture(width: int = 90, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def noised(pixels: torch.Tensor, seed: int = 1, index: int = 0, **changes: Any) -> torch.Tensor:
    return noised_pixels(pixels, PROCESSOR, SafeCoDeConfig(**changes), seed, index)


def test_gaussian_noise_is_in_pixel_units_for_every_channel() -> None:
    clean = grey_pixels(1, 3, 64, 64)
    noise = (noised(clean, noise_sigma=0.05) - clean)[0]
    in_pixels = noise * torch.tensor(STD)[:, None, None]
    assert in_pixels.std(dim=(1, 2)).tolist() == pytest.approx([0.05] * 3, rel=0.05)
    assert in_pixels.mean().item() == pytest.approx(0, abs=0.002)


def test_gaussian_noise_stays_in_the_range_of_pixels() -> None:
    result = noised(grey_pixels(1, 3, 32, 32), noise_sigma=5.0)[0]
    torch.testing.assert_close(result.amin((1, 2)), BLACK)
    torch.testing.assert_close(result.amax((1, 2)), WHITE)


def test_sigma_zero_is_the_clean_image() -> None:
    clean = grey_pixels(1, 3, 8, 8)
    torch.testing.assert_close(noised(clean, noise_sigma=0), clean)


def test_diffusion_is_vcds() -> None:
    # From VCD's schedule: sqrt(abar) and sqrt(1 - abar) at three steps.
    for step, signal, noise in ((500, 0.863, 0.505), (700, 0.593, 0.805), (999, 0.285, 0.959)):
        assert math.sqrt(diffusion_keep(step)) == pytest.approx(signal, abs=5e-4)
        assert math.sqrt(1 - diffusion_keep(step)) == pytest.approx(noise, abs=5e-4)
    clean = grey_pixels(1, 3, 64, 64, level=0.9)
    result = noised(clean, noise="diffusion", noise_step=700)
    draw = torch.randn(1, 3, 1, 64, 64, generator=image_generator(1, 0))[:, :, 0]
    expected = math.sqrt(diffusion_keep(700)) * clean + math.sqrt(1 - diffusion_keep(700)) * draw
    torch.testing.assert_close(result, expected)
    assert result.max() > WHITE.max(), "diffusion is not clipped"


def test_blank_is_mid_grey() -> None:
    for shape in ((1, 3, 8, 8), (1, 2, 3, 8, 8)):
        torch.testing.assert_close(noised(torch.ones(shape), noise="blank"), grey_pixels(*shape))


@pytest.mark.parametrize("noise", ["gaussian", "diffusion", "blank"])
def test_padding_tiles_stay_exactly_zero(noise: str) -> None:
    tiles = torch.ones(1, 4, 3, 8, 8)
    tiles[0, 2:] = 0
    result = noised(tiles, noise=noise)
    assert (result[0, 2:] == 0).all()
    assert (result[0, :2] != tiles[0, :2]).any()
    # Without a tile dimension there is no padding: an all-zero picture is a picture.
    assert (noised(torch.zeros(1, 3, 8, 8), noise=noise) != 0).any()


@pytest.mark.parametrize("noise", ["gaussian", "diffusion", "blank"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwens_temporal_copies_stay_copies(name: str, noise: str) -> None:
    processor = tiny_processor(name).image_processor
    clean = processor(images=[picture()], return_tensors="pt")["pixel_values"]
    result = noised_pixels(clean, processor, SafeCoDeConfig(noise=noise), seed=3)
    assert result.shape == clean.shape
    assert result.dtype == clean.dtype
    frames = result.reshape(len(result), 3, processor.temporal_patch_size, -1)
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])
    assert not torch.equal(result, clean)
    if noise == "gaussian":
        flat = result.reshape(len(result), 3, -1)
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        assert (flat.amin((0, 2)) >= -mean / std - 1e-5).all()
        assert (flat.amax((0, 2)) <= (1 - mean) / std + 1e-5).all()
        # Every channel reaches its own ends: the channel axis was found.
        assert flat.amax((0, 2)).tolist() == pytest.approx(((1 - mean) / std).tolist(), abs=1e-5)


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_real_processors_output(name: str) -> None:
    processor = tiny_processor(name).image_processor
    clean = processor(images=[picture()], return_tensors="pt")["pixel_values"]
    result = noised_pixels(clean, processor, SafeCoDeConfig(), seed=3)
    assert (result.shape, result.dtype) == (clean.shape, clean.dtype)
    assert not torch.equal(result, clean)


@pytest.mark.parametrize("noise", ["gaussian", "diffusion"])
def test_noise_depends_on_seed_and_index_alone(noise: str) -> None:
    clean = grey_pixels(1, 3, 16, 16)
    once = noised(clean, 5, 0, noise=noise)
    assert torch.equal(once, noised(clean, 5, 0, noise=noise))
    different = [noised(clean, seed, index, noise=noise) for seed, index in ((5, 1), (6, 0), (50, 0), (2**63 - 1, 0))]
    assert all(not torch.equal(once, other) for other in different)
    assert image_generator(1, 23).initial_seed() != image_generator(12, 3).initial_seed()


def test_global_generators_are_not_touched() -> None:
    states = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["pos"], random.getstate()
    noised(grey_pixels(1, 3, 8, 8))
    noised_image(picture(), SafeCoDeConfig("paper"), seed=1)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state(legacy=False)["state"]["pos"]
    assert states[2] == random.getstate()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_comes_back_and_the_noise_is_the_same(dtype: torch.dtype) -> None:
    clean = grey_pixels(1, 3, 8, 8)
    result = noised(clean.to(dtype), noise_sigma=0.1)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), noised(clean, noise_sigma=0.1), atol=0.02, rtol=0.02)


def test_the_input_is_not_changed() -> None:
    clean = grey_pixels(1, 3, 8, 8)
    before = clean.clone()
    noised(clean)
    assert torch.equal(clean, before)


def test_other_ranges_of_pixels() -> None:
    unscaled = SimpleNamespace(do_normalize=False, do_rescale=False, rescale_factor=1 / 255)
    result = noised_pixels(torch.full((1, 3, 16, 16), 128.0), unscaled, SafeCoDeConfig(noise_sigma=5), seed=1)
    assert (result.min(), result.max()) == (0, 255)
    rescaled = SimpleNamespace(do_normalize=False, do_rescale=True, rescale_factor=1 / 255)
    result = noised_pixels(torch.full((1, 3, 16, 16), 0.5), rescaled, SafeCoDeConfig(noise_sigma=5), seed=1)
    assert (result.min(), result.max()) == (0, 1)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (10, 1175), (5,)])
def test_an_unknown_layout_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="pixel_values has shape"):
        noised(torch.zeros(shape))


def test_model_space_has_no_blur_and_image_space_no_diffusion() -> None:
    with pytest.raises(ConfigError, match='"image"'):
        noised(torch.zeros(1, 3, 8, 8), noise="blur", noise_space="image")
    with pytest.raises(ConfigError, match='"model"'):
        noised_image(picture(), SafeCoDeConfig("vcd"), seed=1)


def test_image_space_gaussian_round_trips_through_bytes() -> None:
    config = SafeCoDeConfig("paper")
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    first, second = noised_image(grey, config, seed=1), noised_image(grey, config, seed=1)
    assert (first.mode, first.size) == ("RGB", (64, 64))
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != noised_image(grey, config, seed=1, index=1).tobytes()
    assert np.asarray(first).std() / 255 == pytest.approx(0.1, rel=0.05)
    strong = np.asarray(noised_image(grey, config.replace(noise_sigma=9), seed=1))
    assert (strong.min(), strong.max()) == (0, 255)
    assert noised_image(picture(), config.replace(noise_sigma=0), seed=1).tobytes() == picture().tobytes()


def test_blur_and_blank_of_a_picture() -> None:
    blur = SafeCoDeConfig(noise="blur", noise_space="image", noise_sigma=0.5)
    expected = picture(90, 60).filter(ImageFilter.GaussianBlur(3))
    assert noised_image(picture(90, 60), blur, seed=1).tobytes() == expected.tobytes()
    blank = noised_image(picture(), SafeCoDeConfig(noise="blank", noise_space="image"), seed=1)
    assert blank.getcolors() == [(90 * 60, (128, 128, 128))]
