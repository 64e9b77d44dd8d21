"""The cells of the support table: which family is tested in which mode, and why others are not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safecode_mllm.decoding.families import FAMILIES
from tiny_models import FAMILY_NAMES, TIER2_NAMES

MATRIX = Path(__file__).parent / "matrix"
VERSIONS = sorted((path.stem for path in MATRIX.glob("*.txt")), key=lambda v: tuple(map(int, v.split("."))))
NEWEST = VERSIONS[-1]
# In the order of the table's columns: one row, several rows, cache of fixed size, both branches of a prompt in one row,
# the model as its own judge.
MODES = ("dynamic", "batch", "static", "packed", "self_judge")
# Families whose prompts can be packed: decoding/families.py says for which that was shown to change nothing.
PACKED = tuple(name for name in FAMILY_NAMES if FAMILIES[name].pixels)


@dataclass(frozen=True)
class Cell:
    """One family in one mode."""

    family: str
    mode: str
    tier: int


CELLS = (
    *(Cell(family, mode, 1) for family in FAMILY_NAMES for mode in MODES if mode != "packed" or family in PACKED),
    *(Cell(family, mode, 2) for family in TIER2_NAMES for mode in MODES if mode not in ("static", "packed")),
)
