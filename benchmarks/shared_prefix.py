"""When does sharing the text before the image pay? Prefills of both branches, in turns, over the length of that text.

    python benchmarks/shared_prefix.py [--geometry G1] [--batch 1] [--rounds 10] [--json FILE]

Side by side is the base. "packed" is one row per pair; "stored" finds the text in a store; "kept" processes it on its
own first, as a store does the first time. Ratios are medians over rounds of one way's time over the base's in the same
round: processor time of one thread on a CPU, wall clock on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from generate import wall_clock
from generate_models import Geometry, build
from timing import machine
from transformers import DynamicCache

from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding import packed
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.prefix_store import PrefixStore
from safecode_mllm.noise import noised_pixels
from safecode_mllm.prompts import PromptBuilder, collate

COLUMNS = (16, 64, 128, 256, 512, 1024)
ROUNDS = 10
# Any token that is plain text.
_FILLER = 100
_STORE_BYTES = 2**32


def inputs(geometry: Geometry, batch: int, columns: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return clean and noised inputs whose image stands behind so many columns of text."""
    builder = PromptBuilder(geometry.processor)
    rows = [builder.build(geometry.picture(seed), geometry.prompt) for seed in range(batch)]
    clean = collate(rows, builder.pad_token_id)
    ids = clean["input_ids"]
    image = int((ids == geometry.model.config.image_token_id).any(0).nonzero()[0])
    more = max(0, columns - image)
    for key, fill in (("input_ids", _FILLER), ("attention_mask", 1), ("mm_token_type_ids", 0)):
        if key in clean:
            clean[key] = torch.cat([clean[key].new_full((batch, more), fill), clean[key]], 1)
    pixels = noised_pixels(clean["pixel_values"], builder.image_processor, SafeCoDeConfig(), 1, index=0)
    device, dtype = geometry.model.device, geometry.model.dtype
    placed = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in clean.items()}
    return placed, dict(placed, pixel_values=pixels.to(device, dtype))


def ways(model: Any, clean: dict[str, Tensor], noised: dict[str, Tensor]) -> dict[str, Callable[[], Branches]]:
    """Return the ways to prefill, by name."""
    full = PrefixStore(_STORE_BYTES)

    @torch.no_grad()
    def run(store: PrefixStore | None, least: int) -> Branches:
        packed.PACKED_MIN_PREFIX = least
        branches = Branches(model, clean, noised, DynamicCache(), store)
        branches.prefill()
        return branches

    never = 10**9
    found: dict[str, Callable[[], Branches]] = {
        "side by side": lambda: run(None, never),
        "packed": lambda: run(None, 0),
        "stored": lambda: run(full, never),
        "kept": lambda: run(PrefixStore(_STORE_BYTES), never),
    }
    beginnings = {"side by side": "branches side by side", "packed": "both branches in one row", "stored": "behind"}
    for name, way in found.items():  # also the first, untimed run
        assert way().prefilled.startswith(beginnings.get(name, "behind"))
    return found


def main() -> int:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", action="append", help="G1, G2, llava-7b or qwen-7b; may be repeated")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--columns", type=int, nargs="+", default=COLUMNS, help="lengths of the text before the image")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    on_gpu = options.device != "cpu"
    clock = wall_clock if on_gpu else time.process_time
    rows = []
    print("geometry  batch columns prompt  side by side   packed  stored    kept")
    for name in options.geometry or ["G1", "G2"]:
        geometry = build(name, options.device, torch.bfloat16 if on_gpu else torch.float32)
        for columns in options.columns:
            clean, noised = inputs(geometry, options.batch, columns)
            taken: dict[str, list[float]] = {}
            found = ways(geometry.model, clean, noised)
            for _ in range(options.rounds):
                for way, run in found.items():
                    start = clock()
                    run()
                    taken.setdefault(way, []).append(clock() - start)
            base = taken["side by side"]
            row: dict[str, Any] = {"geometry": name, "batch": options.batch, "columns": columns}
            row |= {"prompt": clean["input_ids"].shape[1], "rounds": options.rounds}
            row["seconds"] = round(statistics.median(base), 4)
            for way in ("packed", "stored", "kept"):
                row[way] = round(statistics.median(a / b for a, b in zip(taken[way], base, strict=True)), 3)
            rows.append(row)
            print(
                f"{name:<9}{options.batch:>6}{columns:>8}{row['prompt']:>7}{row['seconds']:>12.3f} s"
                f"{row['packed']:>9.2f}{row['stored']:>8.2f}{row['kept']:>8.2f}",
                flush=True,
            )
            if options.json:
                report = {"machine": machine(), "rows": rows}
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
