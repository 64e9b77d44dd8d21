"""Hints for names that are nearly right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest_name_hint(name: object, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name nearest to `name`, or "" if none is near."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
