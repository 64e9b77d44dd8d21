"""Errors of the kernels: each message names the argument, the value and what is legal."""

from __future__ import annotations


class ArgumentError(ValueError):
    """An argument has the right type but an illegal value, shape or device."""


class ArgumentTypeError(TypeError):
    """An argument has the wrong type or dtype."""


class BackendUnavailable(RuntimeError):
    """A back end that was asked for, or is required, cannot serve; the message says why."""


class LaunchError(RuntimeError):
    """CUDA refused to launch a kernel, or an earlier kernel has failed; the message holds CUDA's own text."""
