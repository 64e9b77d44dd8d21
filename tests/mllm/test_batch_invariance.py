"""An answer does not depend on the batch it is in, as far as float32 can tell two tokens apart.

Draws and masks are exactly the same in any batch. The logits are not: a matrix product of another shape rounds
differently. So a token may differ only where the best two tokens were closer than that rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines import CONFIG, PROMPT, front_door, picture
from safecode_kernels.rng import gumbel, row_bits
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.loop import SteeredGeneration
from safecode_mllm.judges.protocol import Verdict
from safecode_mllm.pipeline import SafeCoDe
from safecode_mllm.requests import ChatRequest, prepare_request
from tiny_models import CHAT_NAMES

# Rounding moves the logits of these models by up to 1e-5; contrast and temperature enlarge that.
LARGEST_GAP_OF_A_FLIP = 1e-4
NEW_TOKENS = 12
LENGTHS = ("", " And why?", " Tell me more about it, please, and do not leave anything out of what you see.")
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 50},
}


def requests() -> list[dict[str, Any]]:
    verdicts = (Verdict("unsafe", 0.9), Verdict("safe", 0.1))
    rows: list[dict[str, Any]] = []
    for n in range(6):
        verdict = verdicts[n % 2]
        rows.append({"image": picture(n), "prompt": PROMPT + LENGTHS[n % 3], "seed": n, "verdict": verdict})
    return rows


def decision_gaps(sc: SafeCoDe, fields: dict[str, Any], arguments: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Answer a request alone; returns its tokens, and by how much each of them won."""
    row = prepare_request(ChatRequest.of(fields), sc.builder, CONFIG)
    generation = SteeredGeneration(
        row.clean,
        row.noised,
        Guidance(CONFIG, [True], sc._answerer.refusal(CONFIG)),
        verdict_source=lambda branches: [row.request.verdict],
        rng="philox",
        seeds=[row.seed],
    )
    output = generation.generate(
        sc.model,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=sc.builder.pad_token_id,
        return_dict_in_generate=True,
        output_scores=True,
        **arguments,
    )
    gaps = [_gap(scores, row.seed, step, bool(arguments)) for step, scores in enumerate(output.scores)]
    return output.sequences[0, row.length :].tolist(), gaps


def _gap(scores: Tensor, seed: int, step: int, sampled: bool) -> float:
    keys = scores.double()
    if sampled:
        seeds, stream = torch.tensor([seed]), torch.tensor([0])
        keys = keys + gumbel(row_bits(keys.shape[1], seeds=seeds, stream=stream, step=step))
    best, second = keys[0].topk(2).values.tolist()
    return float(best - second)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CHAT_NAMES)
def test_answers_do_not_depend_on_the_batch(name: str, mode: str) -> None:
    sc, rows, smallest = front_door(name), requests(), float("inf")
    together = sc.chat_batch(rows, batch_size=len(rows), max_new_tokens=NEW_TOKENS, **MODES[mode])
    for fields, batched in zip(rows, together, strict=True):
        alone, gaps = decision_gaps(sc, fields, MODES[mode])
        pairs = list(zip(alone, batched.token_ids, strict=False))
        flip = next((step for step, (mine, theirs) in enumerate(pairs) if mine != theirs), None)
        if flip is None:
            assert len(batched.token_ids) == len(alone)
        compared = gaps if flip is None else gaps[:flip]
        smallest = min([smallest, *compared])
        assert flip is None or gaps[flip] < LARGEST_GAP_OF_A_FLIP, (flip, gaps[flip])
    print(f"{name}, {mode}: the closest decision was won by {smallest:.2e}")
    assert 0 < smallest < float("inf")
