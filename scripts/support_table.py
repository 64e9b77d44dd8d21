"""Reads what the tests of the support table came to on each version of transformers, and writes docs/support.json.

    make support-table   # runs them, this script, and scripts/update_docs.py, which writes docs/models.md

A test of tests/mllm/test_families.py is a cell; so is one of test_real_processors_through_the_front_door.
"""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUPPORT = ROOT / "docs" / "support.json"
CELL = re.compile(r"^test_tier_[12]_cell\[(?P<family>\w+)-(?P<mode>\w+)\]$")
FRONT_DOOR = re.compile(r"^test_real_processors_through_the_front_door\[(?P<family>\w+)-(?P<mode>[\w ]+)\]$")


def main() -> int:
    """Collect and write; return the exit code."""
    versions = sorted((ROOT / "tests" / "matrix").glob("*.txt"), key=lambda path: version_key(path.stem))
    passed: dict[str, dict[str, list[str]]] = {}
    for version in (path.stem for path in versions):
        report = ROOT / ".matrix" / f"{version}.xml"
        if not report.exists():
            print(f"{report.relative_to(ROOT)} is not there: run make test-matrix", file=sys.stderr)
            return 1
        found = cells(report)
        failed = sorted(cell for cell, outcome in found.items() if outcome == "failed")
        if failed:
            print(f"failed on transformers {version}: {failed}", file=sys.stderr)
            return 1
        for (family, mode), outcome in found.items():
            if outcome == "passed":
                passed.setdefault(family, {}).setdefault(mode, []).append(version)
    SUPPORT.write_text(json.dumps(passed, indent=1, sort_keys=True) + "\n")
    print(f"wrote {SUPPORT.relative_to(ROOT)}: {sum(map(len, passed.values()))} cells")
    return 0


def cells(report: Path) -> dict[tuple[str, str], str]:
    """Return the outcome of each cell in a JUnit file: passed, failed or skipped; the worst of several tests."""
    outcomes: dict[tuple[str, str], list[str]] = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        match = CELL.match(case.get("name", "")) or FRONT_DOOR.match(case.get("name", ""))
        if match is None:
            continue
        mode = "front_door" if match.re is FRONT_DOOR else match["mode"]
        inside = {child.tag for child in case}
        outcome = "failed" if inside & {"failure", "error"} else "skipped" if "skipped" in inside else "passed"
        outcomes.setdefault((match["family"], mode), []).append(outcome)
    order = ("failed", "skipped", "passed")
    return {cell: min(found, key=order.index) for cell, found in outcomes.items()}


def version_key(version: str) -> tuple[int, ...]:
    """Return what versions are sorted by."""
    return tuple(map(int, version.split(".")))


if __name__ == "__main__":
    sys.exit(main())
