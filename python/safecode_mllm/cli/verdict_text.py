"""A verdict in a few words."""

from __future__ import annotations

from ..judges.protocol import Verdict


def verdict_text(verdict: Verdict) -> str:
    """Return a verdict in words, for instance "unsafe (p = 0.97)"; says which policy was applied, if one was."""
    text = verdict.label if verdict.p_unsafe is None else f"{verdict.label} (p = {verdict.p_unsafe:.2f})"
    return text if verdict.policy is None else f"{text}, policy {verdict.policy}"
