"""A request as the user writes it, and as the model takes it."""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from PIL.Image import Image
from torch import Tensor

from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.errors import ConfigError, ImageError, JudgeError, PromptError
from safecode_mllm.images import load_image
from safecode_mllm.judges.protocol import JudgeRequest, Verdict
from safecode_mllm.noise import noised_image, noised_pixels
from safecode_mllm.prompts import PromptBuilder
from safecode_mllm.results import Steering

SEED_BITS = 63


@dataclass(frozen=True)
class ChatRequest:
    """One request.

    Attributes:
        image: path, bytes, PIL image or array.
        prompt: the user's text; data, never instructions to this package.
        steering: "on", or "off" for plain decoding.
        seed: integer in [0, 2^63) for noise and draws; None draws one.
        verdict: a verdict to use instead of asking a judge.
        noised_image: a picture to use as the noised view, as large as `image`; None makes it from the configuration.
        config: a configuration for this request instead of the pipeline's.
        max_new_tokens: longest answer in tokens, at least 1; None leaves it to the arguments of the call.
    """

    image: Any
    prompt: str
    steering: Steering = "on"
    seed: int | None = None
    verdict: Verdict | None = None
    noised_image: Any = None
    config: SafeCoDeConfig | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.steering not in ("on", "off"):
            raise ConfigError(f"steering must be 'on' or 'off', got {self.steering!r}")
        is_seed = isinstance(self.seed, int) and not isinstance(self.seed, bool) and 0 <= self.seed < 2**SEED_BITS
        if self.seed is not None and not is_seed:
            raise ConfigError(f"seed must be an integer in [0, 2^{SEED_BITS}), got {self.seed!r}")
        if self.verdict is not None and not isinstance(self.verdict, Verdict):
            kind = type(self.verdict).__name__
            raise ConfigError(f"verdict must be a Verdict, got {kind}; for a fixed label use judge='safe' or 'unsafe'")
        if self.config is not None and not isinstance(self.config, SafeCoDeConfig):
            raise ConfigError(f"config must be a SafeCoDeConfig, got {type(self.config).__name__}")
        limit = self.max_new_tokens
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise ConfigError(f"max_new_tokens must be an integer of at least 1, got {limit!r}")

    @classmethod
    def of(cls, request: ChatRequest | Mapping[str, Any]) -> ChatRequest:
        """Return the request, made from a mapping if need be; an unknown or missing key raises ConfigError."""
        if isinstance(request, ChatRequest):
            return request
        if not isinstance(request, Mapping):
            raise ConfigError(f"a request must be a mapping with 'image' and 'prompt', got {type(request).__name__}")
        names = [field.name for field in fields(cls)]
        for key in request:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"unknown request key {key!r}{hint} (known: {', '.join(names)})")
        missing = [name for name in ("image", "prompt") if name not in request]
        if missing:
            raise ConfigError(f"a request needs {' and '.join(map(repr, missing))}; got the keys {sorted(request)}")
        return cls(**request)


@dataclass
class PreparedRequest:
    """A request ready for the model: processor outputs are batches of one on the CPU.

    Attributes:
        asked: waits for the verdict of a judge elsewhere; None before it is asked. It is kept here because a batch that
            runs out of memory is tried again in parts, and a judge costs money.
    """

    request: ChatRequest
    config: SafeCoDeConfig
    image: Image
    seed: int
    clean: dict[str, Tensor]
    noised: dict[str, Tensor] | None
    asked: Callable[[], Verdict | JudgeError] | None = None

    @property
    def steered(self) -> bool:
        """Whether this request is steered at all."""
        return self.request.steering == "on"

    @property
    def length(self) -> int:
        """Columns of the prompt, the image's among them."""
        return self.clean["input_ids"].shape[1]

    def for_judge(self) -> JudgeRequest:
        """What a judge is asked about it."""
        return JudgeRequest(self.image, self.request.prompt)


def prepare_request(request: ChatRequest, builder: PromptBuilder, config: SafeCoDeConfig) -> PreparedRequest:
    """Load the image and build both views; everything wrong with a request is found here, before the model runs.

    Raises:
        ImageError: the image cannot be used.
        PromptError: the prompt cannot be used.
    """
    if not isinstance(request.prompt, str):
        raise PromptError(f"prompt must be text, got {type(request.prompt).__name__}")
    image = load_image(request.image)
    clean = builder.build(image, request.prompt)
    seed = secrets.randbits(SEED_BITS) if request.seed is None else request.seed
    needs_noise = request.steering == "on" and config.uses_contrast
    noised = _noised_view(request, image, clean, seed, builder, config) if needs_noise else None
    return PreparedRequest(request, config, image, seed, clean, noised)


def _noised_view(
    request: ChatRequest,
    image: Image,
    clean: dict[str, Tensor],
    seed: int,
    builder: PromptBuilder,
    config: SafeCoDeConfig,
) -> dict[str, Tensor]:
    if request.noised_image is not None:
        noised = builder.build(load_image(request.noised_image), request.prompt)
        if noised["pixel_values"].shape != clean["pixel_values"].shape:
            raise ImageError(f"noised_image must be as large as image ({image.size}): both must give the same patches")
        return noised
    if config.noise_space == "image":
        return builder.build(noised_image(image, config, seed, index=0), request.prompt)
    pixels = noised_pixels(clean["pixel_values"], builder.image_processor, config, seed, index=0)
    return dict(clean, pixel_values=pixels)


def stack_noised(rows: Sequence[PreparedRequest]) -> list[dict[str, Tensor]] | None:
    """Return the noised inputs of all rows, the clean ones standing in for rows without; None if no row has any."""
    if all(row.noised is None for row in rows):
        return None
    return [row.clean if row.noised is None else row.noised for row in rows]
