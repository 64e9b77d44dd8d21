"""Where a trained model and what belongs to it lie; apart from model.py so that asking for it imports nothing."""

from __future__ import annotations

from pathlib import Path

# The model that ships with the package.
WEIGHTS = Path(__file__).parent / "weights"
# The settings chosen for a model, beside its weights.
TUNED_FILE = "tuned.json"
