"""Every error a user can meet, in one place: each message names the argument, the value and the fix."""

from __future__ import annotations


class SafeCoDeError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(SafeCoDeError, ValueError):
    """A configuration field is unknown or out of its legal range."""


class ImageError(SafeCoDeError, ValueError):
    """An image is missing, truncated, too large or of a format that is not allowed."""


class PromptError(SafeCoDeError, ValueError):
    """A prompt is empty, not text, or cannot be put into the model's chat template."""


class ModelError(SafeCoDeError):
    """A model cannot be loaded: nothing usable is at the given place."""


class UnsupportedModelError(SafeCoDeError):
    """The model's class, or a generation mode asked of it, is not supported; the message says why."""


class JudgeError(SafeCoDeError):
    """A judge failed or could not be reached; never the same thing as an unknown verdict."""


class UnknownVerdictError(JudgeError):
    """A judge replied, but neither safe nor unsafe could be read from the reply."""


class DecodeError(SafeCoDeError):
    """A row's logits cannot be decoded (NaN, +inf or nothing finite); names row and step."""


class MissingExtraError(SafeCoDeError, ImportError):
    """An optional dependency is not installed; the message is the pip command that installs it."""


class CapacityError(SafeCoDeError):
    """A request does not fit into memory, however small its batch is."""
