"""A request as the user writes it, and as the model takes it."""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.conversations import Dialogue
from safecode_mllm.errors import ConfigError, ImageError, JudgeError
from safecode_mllm.images import load_image
from safecode_mllm.judges.protocol import JudgeRequest, Turn, Verdict
from safecode_mllm.noise import noised_image, noised_pixels
from safecode_mllm.prompts import PromptBuilder
from safecode_mllm.results import Steering

SEED_BITS = 63


@dataclass(frozen=True)
class ChatRequest:
    """One request.

    Attributes:
        image: path, bytes, PIL image or array; a list of them, each of which is noised; or None: then there is nothing
            to contrast, and only the verdict steers.
        prompt: the user's text, behind all pictures; or a conversation as transformers takes it, a list of mappings
            with role and content and a part {"type": "image"} for each picture. Data, never instructions to this
            package.
        steering: "on", or "off" for plain decoding.
        seed: integer in [0, 2^63) for noise and draws; None draws one.
        verdict: a verdict to use instead of asking a judge.
        noised_image: a picture to use as the noised view, as large as `image` (a list for several); None makes it from
            the configuration.
        config: a configuration for this request instead of the pipeline's.
        max_new_tokens: longest answer in tokens, at least 1; None leaves it to the arguments of the call.
    """

    image: Any
    prompt: Any
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
    dialogue: Dialogue
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
        return judge_request(self.dialogue)


def judge_request(dialogue: Dialogue) -> JudgeRequest:
    """Return what a judge is asked about a dialogue; one that reads one picture sees all of them side by side."""
    said = [
        Turn("user" if m.role == "user" else "assistant", "\n".join(filter(None, m.parts)))
        for m in dialogue.messages[:-1]
        if m.role != "system"
    ]
    rules = [text for m in dialogue.messages[:-1] if m.role == "system" for text in m.parts if text]
    whole = None if dialogue.is_plain else dialogue
    return JudgeRequest(dialogue.sheet(), "\n".join([*rules, dialogue.request]), tuple(said), dialogue=whole)


def prepare_request(request: ChatRequest, builder: PromptBuilder, config: SafeCoDeConfig) -> PreparedRequest:
    """Load the image and build both views; everything wrong with a request is found here, before the model runs.

    Raises:
        ImageError: the image cannot be used.
        PromptError: the prompt cannot be used.
    """
    dialogue = Dialogue.of(request.image, request.prompt)
    clean = builder.build(dialogue.images, dialogue)
    seed = secrets.randbits(SEED_BITS) if request.seed is None else request.seed
    if not dialogue.images and config.uses_contrast:
        config = config.replace(contrast_weight=0.0)
    needs_noise = request.steering == "on" and config.uses_contrast
    noised = _noised_view(request, dialogue, clean, seed, builder, config) if needs_noise else None
    return PreparedRequest(request, config, dialogue, seed, clean, noised)


def _noised_view(
    request: ChatRequest,
    dialogue: Dialogue,
    clean: dict[str, Tensor],
    seed: int,
    builder: PromptBuilder,
    config: SafeCoDeConfig,
) -> dict[str, Tensor]:
    if request.noised_image is not None:
        return _given_view(request.noised_image, dialogue, clean, builder)
    if config.noise_space == "image":
        views = [noised_image(image, config, seed, index) for index, image in enumerate(dialogue.images)]
        return builder.build(views, dialogue)
    # One draw over the pixels of all pictures: each has noise of its own.
    pixels = noised_pixels(clean["pixel_values"], builder.image_processor, config, seed, index=0)
    return dict(clean, pixel_values=pixels)


def _given_view(given: Any, dialogue: Dialogue, clean: dict[str, Tensor], builder: PromptBuilder) -> dict[str, Tensor]:
    views = [load_image(view) for view in (given if isinstance(given, list | tuple) else [given])]
    sizes = [image.size for image in dialogue.images]
    if len(views) != len(sizes):
        raise ImageError(f"noised_image: {len(views)} pictures for {len(sizes)} of image; pass one for each")
    noised = builder.build(views, dialogue)
    if noised["pixel_values"].shape != clean["pixel_values"].shape:
        size = sizes[0] if len(sizes) == 1 else sizes
        raise ImageError(f"noised_image must be as large as image ({size}): both must give the same patches")
    return noised


def stack_noised(rows: Sequence[PreparedRequest]) -> list[dict[str, Tensor]] | None:
    """Return the noised inputs of all rows, the clean ones standing in for rows without; None if no row has any."""
    if all(row.noised is None for row in rows):
        return None
    return [row.clean if row.noised is None else row.noised for row in rows]
