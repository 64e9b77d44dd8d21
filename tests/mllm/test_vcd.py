"""Preset `vcd` is visual contrastive decoding, step by step, for every family, and answers to VCD's argument names."""

from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from naive import last_logits
from safecode_mllm import compat
from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding.families import placeholder_ids
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.loop import SteeredGeneration
from safecode_mllm.errors import ConfigError
from safecode_mllm.noise import noised_pixels
from tiny_models import FAMILY_NAMES, TinyModel, tiny_model

NEW_TOKENS = 8
SCORE_TOLERANCE = 5e-5  # contrast with weight 1 adds up three times the noise of one branch
# Any processor with this size of patches; normalised already.
IMAGE_PROCESSOR = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3, patch_size=4, temporal_patch_size=2)
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}
FIXED_LENGTH = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "eos_token_id": -1}


@cache
def model_of(name: str) -> TinyModel:
    return tiny_model(name)


def diffused(clean: dict[str, Tensor], config: SafeCoDeConfig) -> dict[str, Tensor]:
    return dict(clean, pixel_values=noised_pixels(clean["pixel_values"], IMAGE_PROCESSOR, config, seed=5))


@torch.no_grad()
def vcd_by_hand(
    tiny: TinyModel, clean: Any, noised: Any, alpha: float, beta: float, warpers: Any
) -> tuple[Tensor, list[Tensor]]:
    """Two passes per step over everything so far; cut on the raw logits, then the warpers, then the draw."""
    ids, all_scores = clean["input_ids"], []
    for _ in range(NEW_TOKENS):
        z, n = last_logits(tiny.model, clean, ids), last_logits(tiny.model, noised, ids)
        z[:, placeholder_ids(tiny.model)] = -torch.inf
        scores = (1 + alpha) * z - alpha * n
        scores[z < math.log(beta) + z.amax(-1, keepdim=True)] = -torch.inf
        scores = warpers(ids, scores)
        all_scores.append(scores)
        token = torch.multinomial(scores.softmax(-1), 1) if len(warpers) else scores.argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
    return ids, all_scores


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_preset_is_the_formula_at_every_step(name: str, sampling: dict[str, Any]) -> None:
    tiny, config = model_of(name), SafeCoDeConfig("vcd")
    clean = tiny.prompts(2, extra=(0, 3))
    noised = diffused(clean, config)
    names = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
    warpers = [warper(value) for warper, value in zip(names, list(sampling.values())[1:], strict=False)]
    torch.manual_seed(1)
    ids, scores = vcd_by_hand(tiny, clean, noised, 1.0, 0.1, LogitsProcessorList(warpers))
    torch.manual_seed(1)
    output = SteeredGeneration(clean, noised, Guidance(config, [True, True])).generate(
        tiny.model, return_dict_in_generate=True, output_scores=True, **FIXED_LENGTH, **sampling
    )
    assert torch.equal(output.sequences, ids)
    for ours, wanted in zip(output.scores, scores, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=SCORE_TOLERANCE)
    assert any((step > -torch.inf).sum() < step.numel() for step in output.scores), "nothing was cut"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics"])
def test_the_alias_takes_vcds_names(name: str) -> None:
    tiny = model_of(name)
    clean = tiny.prompts(2, extra=(0, 3))
    noised = diffused(clean, compat.vcd())
    generate = {**FIXED_LENGTH, **SAMPLING}
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.9)])
    for given, (alpha, beta) in [({}, (0.5, 0.1)), ({"cd_alpha": 2.0, "cd_beta": 0.3}, (2.0, 0.3))]:
        torch.manual_seed(1)
        ids, _ = vcd_by_hand(tiny, clean, noised, alpha, beta, warpers)
        torch.manual_seed(1)
        ours = compat.vcd_generate(tiny.model, clean, images_cd=noised["pixel_values"], **given, **generate)
        assert torch.equal(ours, ids)
    torch.manual_seed(1)
    plain = compat.vcd_generate(tiny.model, clean, **generate)
    torch.manual_seed(1)
    assert torch.equal(plain, tiny.model.generate(**clean, **generate))
    assert not torch.equal(plain, ours)


def test_the_configuration_is_the_preset() -> None:
    assert compat.vcd() == SafeCoDeConfig("vcd")
    changed = compat.vcd(cd_alpha=0.5, cd_beta=0.2, noise_step=700)
    assert (changed.contrast_weight, changed.plausibility_beta, changed.noise_step) == (0.5, 0.2, 700)
    assert (changed.steps, changed.bias_form, changed.noise) == ("all", "none", "diffusion")
    with pytest.raises(ConfigError, match="contrast_weight=-1"):
        compat.vcd(cd_alpha=-1)


@pytest.mark.parametrize(("step", "kept", "added"), [(500, 0.863, 0.505), (700, 0.593, 0.805), (999, 0.285, 0.959)])
def test_diffusion_keeps_and_adds_what_vcd_does(step: int, kept: float, added: float) -> None:
    pixels = torch.full((4, 3, 50, 50), 2.0)
    torch.manual_seed(0)
    noised = compat.add_diffusion_noise(pixels, step)
    torch.manual_seed(0)
    noise = torch.randn_like(pixels)
    torch.testing.assert_close(noised, kept * pixels + added * noise, rtol=0, atol=2e-3 * 5)
    ours = noised_pixels(pixels, IMAGE_PROCESSOR, compat.vcd(noise_step=step), seed=0)
    assert ours.mean() == pytest.approx(2 * kept, abs=0.02) and ours.std() == pytest.approx(added, abs=0.02)
    with pytest.raises(ConfigError, match="noise_step=1000"):
        compat.add_diffusion_noise(pixels, 1000)
