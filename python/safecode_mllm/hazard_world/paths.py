"""Where the trained model lies; apart from model.py so that asking for it imports nothing."""

from __future__ import annotations

from pathlib import Path

# The model that ships with the package.
WEIGHTS = Path(__file__).parent / "weights"
