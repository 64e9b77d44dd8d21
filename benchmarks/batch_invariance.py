"""Does an answer depend on the batch it is in? Greedy answers of Hazard World's model alone and in batches, per dtype.

    python benchmarks/batch_invariance.py                     240 requests in batches of 8, a few minutes on a CPU
    python benchmarks/batch_invariance.py --model PATH --device cuda --json FILE

Draws and masks are the same in any batch; logits are not, since a matrix product of another shape rounds differently.
So a token can differ where the best two scores were closer than that. For each dtype: how many answers differ, and how
close the best two steered scores were where they part.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from timing import machine

from safecode_mllm import SafeCoDe
from safecode_mllm.hazard_world.render import render
from safecode_mllm.hazard_world.splits import draw_items

SCENE_SEED = 77
NEW_TOKENS = 40
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Gaps:
    """A logits processor that notes by how much the best score of one row leads, and changes nothing."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best, second = scores[0].float().topk(2).values.tolist()
        self.found.append(best - second)
        return scores


def compare(safecode: SafeCoDe, requests: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    """Return how many answers differ, and the leads of the tokens where they part."""
    arguments: dict[str, Any] = dict(max_new_tokens=NEW_TOKENS, record=False)
    together = safecode.chat_batch(requests, batch_size=batch, progress=True, **arguments)
    leads, smallest = [], float("inf")
    for request, batched in zip(requests, together, strict=True):
        gaps = Gaps()
        alone = safecode.chat(**request, **arguments, logits_processor=[gaps])
        pairs = zip(alone.token_ids, batched.token_ids, strict=False)
        parts = next((step for step, (mine, theirs) in enumerate(pairs) if mine != theirs), None)
        smallest = min([smallest, *gaps.found[:parts]])
        if parts is not None:
            leads.append(gaps.found[parts])
    return {"requests": len(requests), "differ": len(leads), "leads": sorted(leads), "closest_that_held": smallest}


def main() -> None:
    """Measure every dtype and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hazard-world")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    items = draw_items("test", options.requests, SCENE_SEED)
    requests = [{"image": render(item.scene), "prompt": item.request, "seed": row} for row, item in enumerate(items)]
    rows = []
    for name, dtype in DTYPES.items():
        safecode = SafeCoDe.from_pretrained(options.model, device=options.device, dtype=dtype)
        rows.append({"model": options.model, "dtype": name, "batch": options.batch})
        rows[-1] |= compare(safecode, requests, options.batch)
        differ, largest = rows[-1]["differ"], max(rows[-1]["leads"], default=0.0)
        print(f"{name}: {differ} of {len(requests)} answers differ; largest lead that was lost {largest:.2g}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
