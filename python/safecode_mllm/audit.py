"""What an audit line says about where an answer came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from PIL.Image import Image

from safecode_mllm.config import SafeCoDeConfig

_PACKAGES = ("safecode-kernels", "torch", "transformers", "pillow")


def request_context(image: Image, prompt: str, config: SafeCoDeConfig, model: Any) -> dict[str, Any]:
    """Return preset, digests, model and versions of one request, JSON-ready."""
    return {
        "preset": config.preset,
        "settings": config.overrides(),
        "config_digest": config.digest(),
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "model_class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "image_sha256": _image_digest(image),
        "prompt_sha256": hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest(),
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
