"""The one place that says what a steered generation does: fields, legal ranges, presets, JSON."""

from __future__ import annotations

import hashlib
import json
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, Literal, get_args

from safecode_mllm.errors import ConfigError
from safecode_mllm.judges.protocol import Policy
from safecode_mllm.names import nearest_name_hint

ContrastScale = Literal["clean", "paper"]
Noise = Literal["gaussian", "diffusion", "blank", "blur"]
NoiseSpace = Literal["model", "image"]
BiasForm = Literal["soft", "hard", "none"]
RefusalKind = Literal["phrase_trie", "first_tokens"]
RefusalStyle = Literal["brief", "explain"]

# The paper's alpha of 0.3, written on the scale of the clean logits: 0.3 / 0.7, rounded.
DEFAULT_CONTRAST_WEIGHT = 0.43
# On Hazard World's validation scenes any sigma from 0.5 on does about as well (mean balanced accuracy of five models
# trained before claims came into their requests: 0.1 .778, 0.3 .814, 0.5 .875, 0.7 .884, 1.0 .886, 1.4 .886).
DEFAULT_SIGMA = 1.0
DEFAULT_STEPS = 5
# Two sentences about what is in the picture.
DEFAULT_REASON_TOKENS = 48
# VCD's schedule has 1000 steps, numbered from 0.
DIFFUSION_STEPS = 1000
# Beyond it a bias would last for the whole answer.
_LARGEST_DECAY = 0.99
# Hex digits of the digest: 48 bits tell any two configurations of a study apart and still fit a table.
DIGEST_LENGTH = 12

_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "contrast_weight": DEFAULT_CONTRAST_WEIGHT,
        "contrast_scale": "clean",
        "noise": "gaussian",
        "noise_space": "model",
        "noise_sigma": DEFAULT_SIGMA,
        "noise_step": 500,
        "plausibility_beta": 0.1,
        "bias_form": "soft",
        "lambda_boost": 1.0,
        "lambda_supp": 1.0,
        "refusal_tokens": "phrase_trie",
        "bias_scope": 0,
        "steps": DEFAULT_STEPS,
        "bias_decay": 0.0,
        "refusal_style": "brief",
        "reason_tokens": DEFAULT_REASON_TOKENS,
        "monotone": False,
        "on_judge_error": "raise",
        "on_unknown": "raise",
    }
)

# What each preset changes about the defaults.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "safecode": MappingProxyType({}),
        "paper": MappingProxyType(
            {
                "contrast_weight": 0.3 / 0.7,
                "contrast_scale": "paper",
                "noise_space": "image",
                "noise_sigma": 0.1,
                "plausibility_beta": 0.0,
                "bias_form": "hard",
                "refusal_tokens": "first_tokens",
                "bias_scope": 20,
            }
        ),
        "vcd": MappingProxyType(
            {"contrast_weight": 1.0, "noise": "diffusion", "noise_step": 500, "bias_form": "none", "steps": "all"}
        ),
        "contrast_only": MappingProxyType({"bias_form": "none"}),
        "verdict_only": MappingProxyType({"contrast_weight": 0.0}),
        "no_plausibility": MappingProxyType({"plausibility_beta": 0.0}),
    }
)


def _fail(field: str, value: object, legal: str) -> ConfigError:
    return ConfigError(f"{field}={value!r} is not legal: it must be {legal}")


def _number(low: float, high: float = math.inf) -> Callable[[str, object], float]:
    legal = f"a finite number >= {low:g}" if math.isinf(high) else f"a number in [{low:g}, {high:g}]"

    def check(field: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise _fail(field, value, legal)
        number = float(value)
        if not math.isfinite(number) or not low <= number <= high:
            raise _fail(field, value, legal)
        return number

    return check


def _integer(low: int, high: int | None = None) -> Callable[[str, object], int]:
    legal = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"

    def check(field: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise _fail(field, value, legal)
        number = int(value)
        if number < low or (high is not None and number > high):
            raise _fail(field, value, legal)
        return number

    return check


def _choice(literal: Any) -> Callable[[str, object], str]:
    names = get_args(literal)

    def check(field: str, value: object) -> str:
        if not isinstance(value, str) or value not in names:
            raise ConfigError(f"{_fail(field, value, f'one of {list(names)}')}.{nearest_name_hint(value, names)}")
        return value

    return check


def _steps(field: str, value: object) -> int | str:
    if isinstance(value, str) and value in ("all", "adaptive"):
        return value
    try:
        return _integer(1)(field, value)
    except ConfigError:
        raise _fail(field, value, 'an integer >= 1, "all" or "adaptive"') from None


def _flag(field: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _fail(field, value, "True or False")
    return value


_CHECKS: Mapping[str, Callable[[str, object], Any]] = MappingProxyType(
    {
        "contrast_weight": _number(0),
        "contrast_scale": _choice(ContrastScale),
        "noise": _choice(Noise),
        "noise_space": _choice(NoiseSpace),
        "noise_sigma": _number(0),
        "noise_step": _integer(0, DIFFUSION_STEPS - 1),
        "plausibility_beta": _number(0, 1),
        "bias_form": _choice(BiasForm),
        "lambda_boost": _number(0),
        "lambda_supp": _number(0),
        "refusal_tokens": _choice(RefusalKind),
        "bias_scope": _integer(0),
        "steps": _steps,
        "bias_decay": _number(0, _LARGEST_DECAY),
        "refusal_style": _choice(RefusalStyle),
        "reason_tokens": _integer(1),
        "monotone": _flag,
        "on_judge_error": _choice(Policy),
        "on_unknown": _choice(Policy),
    }
)


@dataclass(frozen=True, init=False)
class SafeCoDeConfig:
    """Everything that decides how an answer is steered; frozen, hashable, JSON in and out.

    Attributes:
        preset: the name in PRESETS whose values stand where nothing else was given.
        contrast_weight: a >= 0 in s = (1 + a) z - a n; 0 runs no noised branch.
        contrast_scale: "clean" keeps the scale of the clean logits; "paper" multiplies temperature and bias by
            1 + a in guided steps, which is the paper's z - alpha n with alpha = a / (1 + a).
        noise: how the image of the second branch is spoiled. "blur" works in image space only, "diffusion" in
            model space only.
        noise_space: "model" spoils the processor's output, "image" the picture before it is resized.
        noise_sigma: gaussian: standard deviation on pixels in [0, 1]; blur: radius in tenths of the shorter side.
            Finite, >= 0.
        noise_step: diffusion step t in [0, 999].
        plausibility_beta: in [0, 1]; tokens below beta times the best probability are cut; 0 cuts nothing.
        bias_form: "soft" scales the bias with the judge's probability, "hard" takes its label, "none" asks no judge.
        lambda_boost: bias in logits on refusal tokens for an unsafe verdict. Finite, >= 0.
        lambda_supp: bias in logits off refusal tokens for a safe verdict. Finite, >= 0.
        refusal_tokens: "phrase_trie" or "first_tokens".
        bias_scope: bias only the K best tokens; 0 = all.
        steps: guided steps, >= 1; "all"; or "adaptive": until a row's refusal phrase is complete or its answer is under
            way.
        bias_decay: factor in [0, 0.99] by which the bias shrinks at each token after the guided steps; 0 ends it there.
        refusal_style: "brief" leaves a refusal as the model writes it; "explain" lets the model add, after a refusal
            that the verdict asked for, what in the scene is dangerous.
        reason_tokens: longest such reason, on top of the answer's own limit, >= 1.
        monotone: never suppress refusals.
        on_judge_error: "raise", "treat_as_unsafe" or "no_bias" when the judge fails.
        on_unknown: the same when the judge's reply cannot be read.

    Raises:
        ConfigError: an unknown field (with the nearest name), or a value out of its range.

    Source: SafeCoDe (arXiv 2509.19212); the plausibility cut and the diffusion noise: VCD (arXiv 2311.16922).
    """

    preset: str
    contrast_weight: float
    contrast_scale: ContrastScale
    noise: Noise
    noise_space: NoiseSpace
    noise_sigma: float
    noise_step: int
    plausibility_beta: float
    bias_form: BiasForm
    lambda_boost: float
    lambda_supp: float
    refusal_tokens: RefusalKind
    bias_scope: int
    steps: int | Literal["all", "adaptive"]
    bias_decay: float
    refusal_style: RefusalStyle
    reason_tokens: int
    monotone: bool
    on_judge_error: Policy
    on_unknown: Policy

    def __init__(self, preset: str = "safecode", **overrides: Any) -> None:
        # Written by hand so that a preset named here brings its values: a generated one would only record the label.
        if preset not in PRESETS:
            raise ConfigError(
                f"preset={preset!r} is unknown: known are {list(PRESETS)}.{nearest_name_hint(preset, PRESETS)}"
            )
        for name in overrides:
            if name not in _CHECKS:
                known = ["preset", *_CHECKS]
                raise ConfigError(f"{name!r} is no field of the configuration.{nearest_name_hint(name, known)}")
        values = {**_DEFAULTS, **PRESETS[preset], **overrides}
        object.__setattr__(self, "preset", preset)
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, values[name]))
        if self.noise == "blur" and self.noise_space == "model":
            raise ConfigError('noise="blur" needs whole pictures: set noise_space="image"')
        if self.noise == "diffusion" and self.noise_space == "image":
            raise ConfigError('noise="diffusion" is defined on normalised values: set noise_space="model"')

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> SafeCoDeConfig:
        """Return the preset `name` with some fields overridden."""
        return cls(name, **overrides)

    def replace(self, **changes: Any) -> SafeCoDeConfig:
        """Return a copy with some fields changed; a new `preset` changes the label alone, `from_preset` the values."""
        return type(self)(**{**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return every field as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SafeCoDeConfig:
        """Return the configuration that `values` describe; fields left out come from its preset."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"a configuration is an object with fields, not {type(values).__name__}")
        return cls(**{str(name): value for name, value in values.items()})

    def to_json(self) -> str:
        """Return every field as canonical JSON: sorted keys, no spaces."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> SafeCoDeConfig:
        """Return the configuration written in `text`; fields left out come from its preset."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the configuration is not valid JSON: {error}") from error
        return cls.from_dict(values)

    def digest(self) -> str:
        """Return the first 12 hex digits of the SHA-256 of the canonical JSON: the preset hash of an audit record."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:DIGEST_LENGTH]

    def overrides(self) -> dict[str, Any]:
        """Return the fields that differ from the named preset."""
        plain = type(self)(self.preset)
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != getattr(plain, f.name)}

    @property
    def uses_contrast(self) -> bool:
        """Whether a noised branch is run at all."""
        return self.contrast_weight > 0

    @property
    def uses_verdict(self) -> bool:
        """Whether any verdict could change a logit, so that a judge has to be asked."""
        suppresses = self.lambda_supp > 0 and not self.monotone
        return self.bias_form != "none" and (self.lambda_boost > 0 or suppresses)
