"""The committed support table fits the tests that it is made from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import transformers

from safecode_mllm.decoding.families import FAMILIES
from support_cells import CELLS, NEWEST, VERSIONS
from tiny_models import CHAT_NAMES, build_class
from tiny_tier2_processors import TIER2_CHAT_NAMES

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from support_markdown import COLUMNS, EMPTY, ROWS, UNTESTED  # noqa: E402

PASSED = json.loads((ROOT / "docs" / "support.json").read_text())


def test_every_cell_is_a_test_and_every_test_a_cell() -> None:
    wanted = {(cell.family, cell.mode): VERSIONS if cell.tier == 1 else [NEWEST] for cell in CELLS}
    wanted |= {(name, "front_door"): VERSIONS for name in CHAT_NAMES}
    wanted |= {(name, "front_door"): [NEWEST] for name in ("idefics3", *TIER2_CHAT_NAMES)}
    found = {(family, mode): versions for family, modes in PASSED.items() for mode, versions in modes.items()}
    assert found == wanted, "run make support-table"


def test_every_family_has_a_row_and_every_empty_cell_a_reason() -> None:
    assert set(ROWS) == set(PASSED)
    page = (ROOT / "docs" / "models.md").read_text()
    empty = {(mode, family) for family in ROWS for mode in COLUMNS if mode not in PASSED[family]}
    assert set(EMPTY) <= empty
    assert {mode for mode, _ in empty - set(EMPTY)} == set(UNTESTED)
    assert all(f"- ({letter}) " in page for letter in {*EMPTY.values(), *UNTESTED.values()})


@pytest.mark.skipif(transformers.__version__ != NEWEST, reason=f"tiny models of tier 2 are built on {NEWEST}")
def test_rows_name_the_class_that_is_tested() -> None:
    types = set()
    for family, (_, model_class) in ROWS.items():
        config, found = build_class(family)
        assert found.__name__ == model_class
        types.add(config.model_type)
    assert types == set(FAMILIES)
