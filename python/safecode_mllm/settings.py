"""The environment variables that this package reads, and the only place that reads them."""

from __future__ import annotations

import os


def openai_api_key() -> str | None:
    """Return OPENAI_API_KEY, the key of the endpoint judge; None if it is unset or empty."""
    return os.environ.get("OPENAI_API_KEY") or None


def openai_base_url() -> str | None:
    """Return OPENAI_BASE_URL, where the endpoint judge is; None if it is unset or empty."""
    return os.environ.get("OPENAI_BASE_URL") or None
