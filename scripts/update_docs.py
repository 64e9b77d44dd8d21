"""Writes the measured tables into README.md and the pages of docs, and with --pictures draws their pictures again.

    python scripts/update_docs.py             # tables, from benchmarks/results and docs/support.json
    python scripts/update_docs.py --check     # change nothing; exit code 1 if a table is out of date
    python scripts/update_docs.py --pictures  # also the contact sheet and the example scene, from the packaged model

A table, or a few words, stands between <!-- NAME --> and <!-- /NAME --> and is never edited by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from judge_tables import judge_tables, spread
from speed_tables import markdown, speed_tables
from support_markdown import support_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "hazard_world" / "summary.json"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
IMAGES = ROOT / "docs" / "images"
RATES = {"unsafe_refused": "unsafe refused", "safe_answered": "safe answered", "balanced_accuracy": "balanced accuracy"}
# Settles which run the example scene is, and no more.
SCENE_SEED = 2_000


def main() -> int:
    """Parse the command line, update or check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--pictures", action="store_true")
    arguments = parser.parse_args()
    tables = {**make_tables(json.loads(RESULTS.read_text())), **judge_tables(), **speed_tables()}
    stale = [page for page in PAGES if updated(page.read_text(), tables) != page.read_text()]
    if arguments.check:
        for page in stale:
            print(f"{page.relative_to(ROOT)} is out of date: run python scripts/update_docs.py", file=sys.stderr)
        return 1 if stale else 0
    for page in stale:
        page.write_text(updated(page.read_text(), tables))
        print(f"updated {page.relative_to(ROOT)}")
    if arguments.pictures:
        draw_pictures()
    return 0


def make_tables(summary: dict[str, Any]) -> dict[str, str]:
    """Return the tables by name, as Markdown."""
    return {
        "arms": rates_table(summary["methods"]),
        "controls": rates_table(summary["controls"]),
        "strata": strata_table(summary["methods"]),
        "comparisons": comparisons_table(summary),
        "support": support_table(),
    }


def updated(page: str, tables: dict[str, str]) -> str:
    """Return a page with the text between each pair of table marks replaced."""
    for name, table in tables.items():
        block = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        page = re.sub(block, lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", page, flags=re.DOTALL)
        words = rf"(<!-- {name} -->)(?!\n).*?(<!-- /{name} -->)"
        page = re.sub(words, lambda found, table=table: found[1] + table + found[2], page)
    return page


def rates_table(methods: dict[str, Any]) -> str:
    """Return the rates of each arm: mean over the seeds, lowest and highest in brackets."""
    rows = [["arm", *RATES.values(), "garbled"]]
    for name, found in methods.items():
        rows.append([f"`{name}`", *(spread(found[metric]) for metric in (*RATES, "garbled"))])
    return markdown(rows)


def strata_table(methods: dict[str, Any]) -> str:
    """Return the balanced accuracy of each arm per stratum."""
    strata = list(next(iter(methods.values()))["strata"])
    rows = [["balanced accuracy", *(f"`{stratum}`" for stratum in strata)]]
    for name, found in methods.items():
        rows.append([f"`{name}`", *(spread(found["strata"][stratum]) for stratum in strata)])
    return markdown(rows)


def comparisons_table(summary: dict[str, Any]) -> str:
    """Return what was expected of each pair of arms and in how many seeds it held."""
    seeds = len(summary["seeds"])
    rows = [["expected", "arms", "rate", "scenes", "difference", "held"]]
    for item in summary["comparisons"]:
        arms = f"`{item['first']}` - `{item['second']}`"
        scenes = f"`{item['stratum']}`" if item["stratum"] else "all"
        metric = RATES[item["metric"]]
        rows.append(
            [item["claim"], arms, metric, scenes, spread(item["difference"], "+"), f"{item['held']} of {seeds}"]
        )
    return markdown(rows)


def draw_pictures() -> None:
    """Draw the contact sheet and the example scene into docs/images."""
    from safecode_mllm.cli.demo import draw_sheet
    from safecode_mllm.hazard_world import demo_scenes, load_world

    model, processor = load_world()
    scenes = demo_scenes(model, processor, n=2, seed=SCENE_SEED)
    scenes[-1].image.resize((480, 480), resample=0).save(IMAGES / "scene.png", optimize=True)
    draw_sheet(model, processor, IMAGES / "hazard_world.png")
    print(f"drew {IMAGES.relative_to(ROOT)}; the example scene's request is: {scenes[-1].request}")


if __name__ == "__main__":
    sys.exit(main())
