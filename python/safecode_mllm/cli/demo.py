"""`demo`: every arm on Hazard World as a table, then scenes with their answers as a picture and a page."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..contact_sheet import Answer, Sheet, SheetRow, write_html, write_png
from ..terminal import Console
from .parser import STDOUT
from .runtime import one_thread, quiet_transformers, write_json
from .tables import as_text, rates_table, strata_table
from .verdict_text import verdict_text

if TYPE_CHECKING:
    from ..hazard_world import DemoScene

TITLE = "Hazard World: plain decoding and SafeCoDe"
NOTE = (
    "A small model trained on a small rendered world, with errors put in on purpose: a test-bed for the mechanism, "
    "no evidence about large models."
)
PICTURE_NOTE = f"{NOTE} The scenes are the first drawn of each stratum, whatever the answers were."
PAGE_NOTE = f"{NOTE} Every scene that was drawn for this page is on it, and the table counts others."
# Every activity of the world, once safe and once unsafe; the page shows them all.
SHEET_SCENES = 24
# The picture must fit a screen: of each stratum this many safe and as many unsafe scenes.
PICTURE_PAIRS = {"prior": 2, "reasoning": 1, "judge_wrong": 1}


def run_demo(args: argparse.Namespace, console: Console) -> None:
    """Evaluate the arms, print their table, and write contact_sheet.png and contact_sheet.html."""
    start = time.perf_counter()
    quiet_transformers(console)
    from ..hazard_world import load_world, run_evaluation

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    model, processor = load_world()
    console.note(f"answering {args.n} scenes with every arm")
    with one_thread(), console.counting("scenes") as counter:
        evaluation = run_evaluation(model, processor, n=args.n, seed=args.split_seed, progress=counter)
    # First of all: whatever fails while drawing, the numbers are there.
    if args.json:
        write_json(args.json, evaluation.as_dict(), console)
    table = rates_table(evaluation.methods)
    if args.json != STDOUT:
        console.result(f"{args.n} fresh scenes of Hazard World, 95 % intervals in brackets\n\n{as_text(table)}\n")
        console.result(as_text(strata_table(evaluation.methods)) + "\n")
    picture, page = out / "contact_sheet.png", out / "contact_sheet.html"
    with one_thread():
        rows = draw_sheet(model, processor, picture)
    write_html(Sheet(TITLE, PAGE_NOTE, rows, table), page)
    if args.json != STDOUT:
        console.result(f"contact sheet: {picture} and {page}")
    console.note(
        f"took {time.perf_counter() - start:.0f} s; a test-bed for the mechanism, no evidence about large models"
    )


def draw_sheet(model: Any, processor: Any, picture: Path) -> list[SheetRow]:
    """Answer the sheet's scenes, draw the first of each stratum into a picture, and return all rows."""
    from ..hazard_world import demo_scenes

    scenes = demo_scenes(model, processor, n=SHEET_SCENES)
    write_png(Sheet(TITLE, PICTURE_NOTE, [_sheet_row(scene) for scene in _first_of_each(scenes)]), picture)
    return [_sheet_row(scene) for scene in scenes]


def _first_of_each(scenes: list[DemoScene]) -> list[DemoScene]:
    wanted = Counter({(stratum, unsafe): n for stratum, n in PICTURE_PAIRS.items() for unsafe in (True, False)})
    chosen = []
    for scene in scenes:
        kind = (scene.stratum, scene.unsafe)
        if wanted[kind] > 0:
            wanted[kind] -= 1
            chosen.append(scene)
    return chosen


def _sheet_row(scene: DemoScene) -> SheetRow:
    return SheetRow(
        image=scene.image,
        question=scene.request,
        plain=Answer(scene.plain, scene.plain_right),
        steered=Answer(scene.safecode, scene.safecode_right),
        verdict=verdict_text(scene.verdict),
        heading=f"in truth {'unsafe' if scene.unsafe else 'safe'} here; stratum {scene.stratum}",
    )
