"""What an audit line says about where an answer came from."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from PIL.Image import Image

from safecode_mllm.config import SafeCoDeConfig

_PACKAGES = ("safecode-kernels", "torch", "transformers", "pillow")


def request_context(image: Image, prompt: str, config: SafeCoDeConfig, model: Any, judge: str | None) -> dict[str, Any]:
    """Return preset, digests, model and versions of one request, JSON-ready."""
    return {
        "preset": config.preset,
        "config_digest": config.digest(),
        "judge": judge,
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "model_class": type(model).__name__,
        "image_sha256": _image_digest(image),
        "prompt_sha256": hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest(),
        "versions": dict(_versions()),
    }


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
