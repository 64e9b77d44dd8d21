"""A class that nobody tested is compared with its own generate, once, and either works or says what differs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers

from naive import NaiveSteering, naive_generate
from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding import probe
from safecode_mllm.decoding.families import FAMILIES, family_of, family_of_config, placeholder_ids
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.loop import SteeredGeneration
from safecode_mllm.errors import UnsupportedModelError
from support_cells import NEWEST
from tiny_models import TinyModel, noised_copy, tiny_model
from tiny_unlisted import unlisted_model

CONFIG = SafeCoDeConfig(contrast_weight=0.8, bias_form="none", steps=3)
NEW_TOKENS = 6


def unknown(name: str, model_class: Any = None) -> TinyModel:
    """The tiny model of a family under a type that nobody knows, perhaps of another class."""
    tiny = tiny_model(name)
    tiny.model.config.model_type = "never_heard_of"
    if model_class is not None:
        tiny.model.__class__ = model_class
    return tiny


def steer(tiny: TinyModel) -> tuple[torch.Tensor, torch.Tensor]:
    clean = tiny.prompts(2, extra=(0, 3))
    noised = noised_copy(clean)
    generation = SteeredGeneration(clean, noised, Guidance(CONFIG, [True, True]))
    ids = generation.generate(
        tiny.model, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, eos_token_id=-1, do_sample=False
    )
    naive = NaiveSteering(0.8, 0.1, 3, banned=tuple(placeholder_ids(tiny.model)))
    return ids, naive_generate(tiny.model, clean, noised, naive, NEW_TOKENS)[0]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3", "instructblip"])
def test_a_class_that_fits_works_and_is_looked_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, compared = unknown(name), []
    assert not family_of(tiny.model).verified
    monkeypatch.setattr(probe, "_compare", lambda *call, real=probe._compare: (compared.append(call[2]), real(*call)))
    ids, wanted = steer(tiny)
    assert torch.equal(ids, wanted)
    assert "behind the prompt, noised rows" in compared and "of a question on the prompt's cache" in compared
    compared.clear()
    steer(tiny)
    assert compared == []


@pytest.mark.skipif(transformers.__version__ != NEWEST, reason=f"built on transformers {NEWEST}")
@pytest.mark.parametrize("name", ["vipllava", "aya_vision"])
def test_real_classes_that_are_not_listed_work(name: str) -> None:
    tiny = unlisted_model(name)
    assert not family_of(tiny.model).verified
    ids, wanted = steer(tiny)
    assert torch.equal(ids, wanted)


@pytest.mark.skipif(transformers.__version__ != NEWEST, reason=f"built on transformers {NEWEST}")
def test_a_real_class_whose_layers_keep_a_state_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="layers whose memory is no row of columns"):
        steer(unlisted_model("lfm2_vl"))


class MixesRows(transformers.LlavaForConditionalGeneration):
    """What it says about one row depends on the others."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.1 * output.logits.mean(0)
        return output


class LosesPositions(transformers.LlavaForConditionalGeneration):
    """Counts twice as fast where there are more than two rows."""

    def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        if position_ids is not None and len(position_ids) > 2:
            position_ids = position_ids * 2
        return super().forward(*args, position_ids=position_ids, **kwargs)


class Fails(transformers.LlavaForConditionalGeneration):
    """Takes two rows at most."""

    def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        if position_ids is not None and len(position_ids) > 2:
            raise TypeError("one request at a time, please\nand more lines")
        return super().forward(*args, position_ids=position_ids, **kwargs)


for spoiled in (MixesRows, LosesPositions, Fails):
    # generate() asks the signature which arguments there are.
    spoiled.forward.__signature__ = inspect.signature(transformers.LlavaForConditionalGeneration.forward)


@pytest.mark.parametrize(
    ("model_class", "text"),
    [
        (MixesRows, r"MixesRows .* behind the prompt, clean rows differ by \d.* at a spread of"),
        (LosesPositions, "LosesPositions .* differ by"),
        (Fails, r"could not be checked .* TypeError: one request at a time, please$"),
    ],
)
def test_a_class_that_does_not_fit_says_what_differs(model_class: Any, text: str) -> None:
    with pytest.raises(UnsupportedModelError, match=text):
        steer(unknown("llava", model_class))


def test_a_class_that_does_not_fit_is_refused_again() -> None:
    tiny = unknown("llava", MixesRows)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="MixesRows"):
            steer(tiny)


def test_a_model_without_images_is_refused() -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM .*'llama'.* takes no images"):
        family_of(transformers.LlamaForCausalLM(config))
    with pytest.raises(UnsupportedModelError, match="no model of it that takes images"):
        family_of_config(config)


def test_every_type_that_transformers_can_load_has_a_family() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as LOADABLE

    for model_type in LOADABLE:
        config = transformers.PretrainedConfig()
        config.model_type = model_type
        assert family_of_config(config).verified is (model_type in FAMILIES)


def test_a_video_is_refused() -> None:
    tiny = tiny_model("qwen2_5_vl")
    clean = tiny.prompts(1)
    clean["pixel_values_videos"] = clean["pixel_values"]
    guidance = Guidance(SafeCoDeConfig(contrast_weight=0.0, bias_form="none"), [True])
    with pytest.raises(UnsupportedModelError, match="pixel_values_videos: videos are not supported"):
        SteeredGeneration(clean, None, guidance).generate(tiny.model, max_new_tokens=1)
