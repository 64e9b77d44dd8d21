"""The only place of this package that reads environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass

BACKEND_VARIABLE = "SAFECODE_KERNELS_BACKEND"
REQUIRE_VARIABLE = "SAFECODE_REQUIRE"


@dataclass(frozen=True)
class Settings:
    """What the environment asks of the kernels.

    Attributes:
        backend: name that `backend="auto"` stands for, "auto" if the environment names none (SAFECODE_KERNELS_BACKEND).
        required: back ends that an automatic choice may not pass over (SAFECODE_REQUIRE, separated by commas).
    """

    backend: str = "auto"
    required: tuple[str, ...] = ()


def read_settings() -> Settings:
    """Return the settings as the environment has them now."""
    required = (name.strip() for name in os.environ.get(REQUIRE_VARIABLE, "").split(","))
    return Settings(
        backend=os.environ.get(BACKEND_VARIABLE, "").strip() or "auto",
        required=tuple(name for name in required if name),
    )
