"""SafeCoDeConfig: presets, ranges, JSON, and errors that say what to do."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest

from safecode_mllm.config import DEFAULT_SIGMA, PRESETS, SafeCoDeConfig
from safecode_mllm.errors import ConfigError

# Method section 5, written out a second time on purpose.
EXPECTED: dict[str, dict[str, Any]] = {
    "safecode": dict(
        contrast_weight=0.43, contrast_scale="clean", noise="gaussian", noise_space="model", noise_sigma=DEFAULT_SIGMA,
        plausibility_beta=0.1, bias_form="soft", lambda_boost=1.0, lambda_supp=1.0, refusal_tokens="phrase_trie",
        bias_scope=0, steps=5, monotone=False, on_judge_error="raise", on_unknown="raise",
    ),
    "paper": dict(
        contrast_weight=0.3 / 0.7, contrast_scale="paper", noise="gaussian", noise_space="image", noise_sigma=0.1,
        plausibility_beta=0.0, bias_form="hard", lambda_boost=1.0, lambda_supp=1.0, refusal_tokens="first_tokens",
        bias_scope=20, steps=5,
    ),
    "vcd": dict(
        contrast_weight=1.0, contrast_scale="clean", noise="diffusion", noise_space="model", noise_step=500,
        plausibility_beta=0.1, bias_form="none", steps="all",
    ),
    "contrast_only": dict(contrast_weight=0.43, bias_form="none", plausibility_beta=0.1, steps=5),
    "verdict_only": dict(contrast_weight=0.0, bias_form="soft", plausibility_beta=0.1, steps=5),
    "no_plausibility": dict(contrast_weight=0.43, bias_form="soft", plausibility_beta=0.0, steps=5),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_presets_are_those_of_the_method(name: str) -> None:
    config = SafeCoDeConfig.from_preset(name)
    assert config.preset == name
    assert {key: getattr(config, key) for key in EXPECTED[name]} == EXPECTED[name]


def test_there_are_no_other_presets() -> None:
    assert list(PRESETS) == list(EXPECTED)


def test_the_papers_alpha_comes_back_from_its_weight() -> None:
    a = SafeCoDeConfig.from_preset("paper").contrast_weight
    assert a / (1 + a) == pytest.approx(0.3, rel=1e-15)


def test_a_preset_named_in_the_constructor_brings_its_values() -> None:
    assert SafeCoDeConfig(preset="paper") == SafeCoDeConfig.from_preset("paper")
    assert SafeCoDeConfig() == SafeCoDeConfig.from_preset("safecode")
    assert SafeCoDeConfig.from_preset("vcd", steps=3).overrides() == {"steps": 3}
    assert SafeCoDeConfig.from_preset("vcd").overrides() == {}


def test_presets_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PRESETS["safecode"]["steps"] = 3  # type: ignore[index]


@pytest.mark.parametrize("name", EXPECTED)
def test_json_round_trip(name: str) -> None:
    config = SafeCoDeConfig.from_preset(name, noise_sigma=0.1 + 0.2)
    again = SafeCoDeConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)
    assert again.digest() == config.digest()
    assert SafeCoDeConfig.from_dict(config.to_dict()) == config
    assert json.loads(config.to_json()) == config.to_dict()
    assert list(json.loads(config.to_json())) == sorted(config.to_dict()), "the digest must not depend on field order"


def test_fields_left_out_of_json_come_from_the_preset() -> None:
    config = SafeCoDeConfig.from_json('{"preset": "paper", "steps": 2}')
    assert config == SafeCoDeConfig.from_preset("paper", steps=2)


def test_digest_depends_on_every_field_and_on_nothing_else() -> None:
    base = SafeCoDeConfig()
    changed = dict(
        preset="no_plausibility", contrast_weight=0.5, contrast_scale="paper", noise="blank", noise_space="image",
        noise_sigma=0.5, noise_step=1, plausibility_beta=0.2, bias_form="hard", lambda_boost=2, lambda_supp=2,
        refusal_tokens="first_tokens", bias_scope=1, steps=1, monotone=True, on_judge_error="no_bias",
        on_unknown="treat_as_unsafe", bias_decay=0.5, refusal_style="explain", reason_tokens=9,
    )  # fmt: skip
    assert set(changed) == {field.name for field in dataclasses.fields(SafeCoDeConfig)}
    digests = {base.replace(**{key: value}).digest() for key, value in changed.items()}
    assert len(digests | {base.digest()}) == len(changed) + 1
    assert SafeCoDeConfig(contrast_weight=1).digest() == SafeCoDeConfig(contrast_weight=1.0).digest()
    assert len(base.digest()) == 12
    assert int(base.digest(), 16) >= 0


def test_frozen_hashable_picklable_replaceable() -> None:
    config = SafeCoDeConfig(steps=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 4  # type: ignore[misc]
    assert {config: 1}[SafeCoDeConfig(steps=3)] == 1
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.replace(steps=5) == SafeCoDeConfig()
    assert dataclasses.replace(config, steps=5) == SafeCoDeConfig()
    assert "steps=3" in repr(config)


def test_numpy_numbers_become_plain_ones() -> None:
    config = SafeCoDeConfig(contrast_weight=np.float32(0.5), steps=np.int64(3))
    assert type(config.contrast_weight) is float
    assert type(config.steps) is int
    assert SafeCoDeConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("field", "value", "legal"),
    [
        ("contrast_weight", -0.1, ">= 0"),
        ("contrast_weight", math.inf, "finite"),
        ("contrast_weight", math.nan, "finite"),
        ("contrast_weight", "0.5", "finite number"),
        ("contrast_weight", True, "finite number"),
        ("contrast_scale", "papre", "'clean', 'paper'"),
        ("noise", "gauss", "'gaussian', 'diffusion', 'blank', 'blur'"),
        ("noise_space", "pixel", "'model', 'image'"),
        ("noise_sigma", -1, ">= 0"),
        ("noise_step", 1000, "[0, 999]"),
        ("noise_step", -1, "[0, 999]"),
        ("noise_step", 1.5, "integer"),
        ("plausibility_beta", 1.01, "[0, 1]"),
        ("plausibility_beta", -0.01, "[0, 1]"),
        ("bias_form", "firm", "'soft', 'hard', 'none'"),
        ("bias_form", None, "'soft', 'hard', 'none'"),
        ("lambda_boost", -1, ">= 0"),
        ("lambda_supp", math.nan, ">= 0"),
        ("refusal_tokens", "all", "'phrase_trie', 'first_tokens'"),
        ("bias_scope", -1, ">= 0"),
        ("bias_scope", 2.0, "integer"),
        ("steps", 0, '>= 1, "all" or "adaptive"'),
        ("steps", "ALL", '>= 1, "all" or "adaptive"'),
        ("steps", True, '>= 1, "all" or "adaptive"'),
        ("steps", None, '>= 1, "all" or "adaptive"'),
        ("monotone", 1, "True or False"),
        ("on_judge_error", "ignore", "'raise', 'treat_as_unsafe', 'no_bias'"),
        ("on_unknown", "safe", "'raise', 'treat_as_unsafe', 'no_bias'"),
    ],
)
def test_errors_name_field_value_and_range(field: str, value: Any, legal: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SafeCoDeConfig(**{field: value})
    message = str(caught.value)
    assert f"{field}={value!r}" in message
    assert legal in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("contrast_weight", 0), ("noise_sigma", 0), ("noise_step", 0), ("noise_step", 999), ("plausibility_beta", 0),
        ("plausibility_beta", 1), ("lambda_boost", 0), ("lambda_supp", 0), ("bias_scope", 0), ("steps", 1),
        ("steps", "all"),
    ],
)  # fmt: skip
def test_ends_of_ranges_are_legal(field: str, value: Any) -> None:
    assert getattr(SafeCoDeConfig(**{field: value}), field) == value


@pytest.mark.parametrize("make", [SafeCoDeConfig, SafeCoDeConfig().replace, lambda **kw: SafeCoDeConfig.from_dict(kw)])
def test_an_unknown_field_suggests_the_nearest(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"'contrast_wieght'.*Did you mean 'contrast_weight'"):
        make(contrast_wieght=1)
    with pytest.raises(ConfigError, match=r"'prest'.*Did you mean 'preset'"):
        make(prest="vcd")


def test_an_unknown_preset_or_value_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"preset='contrast-only'.*Did you mean 'contrast_only'"):
        SafeCoDeConfig.from_preset("contrast-only")
    with pytest.raises(ConfigError, match=r"Did you mean 'phrase_trie'"):
        SafeCoDeConfig(refusal_tokens="phrasetrie")
    with pytest.raises(ConfigError, match=r"known are .*'safecode'"):
        SafeCoDeConfig.from_preset("???")


@pytest.mark.parametrize(("text", "reason"), [("{", "not valid JSON"), ("[1]", "not list"), ("3", "not int")])
def test_json_that_is_no_configuration(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        SafeCoDeConfig.from_json(text)


@pytest.mark.parametrize(("noise", "space", "fix"), [("blur", "model", '"image"'), ("diffusion", "image", '"model"')])
def test_noise_that_its_space_cannot_have(noise: str, space: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=f"noise_space={fix}"):
        SafeCoDeConfig(noise=noise, noise_space=space)


def test_what_a_configuration_needs() -> None:
    assert SafeCoDeConfig().uses_contrast
    assert not SafeCoDeConfig.from_preset("verdict_only").uses_contrast
    assert SafeCoDeConfig().uses_verdict
    assert not SafeCoDeConfig.from_preset("vcd").uses_verdict
    assert not SafeCoDeConfig(lambda_boost=0, lambda_supp=0).uses_verdict
    assert SafeCoDeConfig(lambda_boost=0).uses_verdict
    assert not SafeCoDeConfig(lambda_boost=0, monotone=True).uses_verdict
