"""What an audit line says about where an answer came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from PIL.Image import Image

from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.conversations import Dialogue

_PACKAGES = ("safecode-kernels", "torch", "transformers", "pillow")


def request_context(dialogue: Dialogue, config: SafeCoDeConfig, model: Any) -> dict[str, Any]:
    """Return preset, digests, model and versions of one request, JSON-ready."""
    return {
        "preset": config.preset,
        "settings": config.overrides(),
        "config_digest": config.digest(),
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "model_class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "image_sha256": _images_digest(dialogue.images),
        "prompt_sha256": _prompt_digest(dialogue),
        "versions": dict(_versions()),
    }


def generation_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a generation, JSON-ready: plain values as they are, of everything else its type."""
    return {name: _json_ready(value) for name, value in arguments.items()}


def _json_ready(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    return type(value).__name__


def _images_digest(images: Sequence[Image]) -> str | None:
    """Return the digest of one picture, that of the digests of several, or None without any."""
    digests = [_image_digest(image) for image in images]
    if len(digests) < 2:
        return digests[0] if digests else None
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _prompt_digest(dialogue: Dialogue) -> str:
    """Return the digest of the user's text, or of the whole conversation as JSON where there is more than one text."""
    plain = len(dialogue.texts) == 1 and len(dialogue.messages) == 1
    turns = [[turn.role, list(turn.parts)] for turn in dialogue.messages]
    text = dialogue.texts[0] if plain else json.dumps(turns)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _image_digest(image: Image) -> str:
    # Size and decoded pixels: the same picture gives the same digest whatever container it came in.
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


@lru_cache(maxsize=1)
def _versions() -> tuple[tuple[str, str], ...]:
    return tuple((package, _version(package)) for package in _PACKAGES)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
