"""Both branches in one row: the same logits and cache as side by side, with the shared text processed once."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from counting import counted
from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding import packed
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.families import FAMILIES
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.loop import SteeredGeneration
from safecode_mllm.judges.protocol import Verdict
from tiny_models import FAMILY_NAMES, IMAGE, TinyModel, noised_copy, tiny_model
from tiny_refusal import TinyTrie

# Sums of other lengths in other orders: the float32 noise floor of these models is 4e-6.
TOLERANCE = 2e-5
# A decision closer than this may fall either way when sums are ordered differently.
MIN_GAP = 1e-4
CONFIG = SafeCoDeConfig(contrast_weight=0.8, lambda_boost=2.0, lambda_supp=1.5)
VERDICTS = [Verdict("unsafe", 0.9), Verdict("safe", 0.2)]
NEW_TOKENS = 9
PACKED_NAMES = tuple(name for name in FAMILY_NAMES if FAMILIES[name].pixels)


@cache
def model_of(name: str) -> TinyModel:
    return tiny_model(name)


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A switch for packing, whatever the length of the shared text."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(packed, "PACKED_MIN_PREFIX", 1 if on else 10**9)

    return switch


@torch.no_grad()
def prefilled(tiny: TinyModel, clean: dict[str, torch.Tensor]) -> tuple[Branches, tuple[torch.Tensor, Any]]:
    branches = Branches(tiny.model, clean, noised_copy(clean), DynamicCache())
    return branches, branches.prefill()


@pytest.mark.parametrize("name", sorted(set(FAMILY_NAMES) - set(PACKED_NAMES)))
def test_other_families_say_why_not(name: str, packing: Any) -> None:
    tiny = model_of(name)
    packing(True)
    branches, _ = prefilled(tiny, tiny.prompts(1))
    # InstructBLIP's query tokens stand in front of all text: there is nothing to share.
    reason = "0 columns stand before the image" if name == "instructblip" else "it has not been shown"
    assert reason in branches.prefilled


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", PACKED_NAMES)
@torch.no_grad()
def test_equals_side_by_side(name: str, rows: int, packing: Any) -> None:
    tiny = model_of(name)
    clean = tiny.prompts(rows, extra=(0, 3)[:rows])
    packing(False)
    plain, wanted = prefilled(tiny, clean)
    packing(True)
    with counted(tiny.model) as counts:
        ours, found = prefilled(tiny, clean)
    assert ours.prefilled.startswith("both branches in one row"), ours.prefilled
    length, shared = clean["input_ids"].shape[1], int((clean["input_ids"] == IMAGE).any(0).nonzero()[0])
    assert shared > 5
    assert counts.passes == [(rows, shared + 2 * (length - shared))]
    assert (counts.vision, counts.heads) == (1, [(rows, 2)])
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE)
    assert (found[0] - found[1]).abs().max() > 0.1  # the branches differ, so they were not mixed up
    real = plain.mask.bool()
    for mine, theirs in zip(ours.cache.layers, plain.cache.layers, strict=True):
        for states, expected in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            assert states.shape == expected.shape
            torch.testing.assert_close(
                states.transpose(1, 2)[real], expected.transpose(1, 2)[real], rtol=0, atol=TOLERANCE
            )
    # Everything that follows works on what the prefill left behind.
    asked = [b.ask([[33, 44], [71]] * rows, [1, 0] * rows, [*range(rows)] * 2) for b in (ours, plain)]
    torch.testing.assert_close(*asked, rtol=0, atol=TOLERANCE)
    for mine, theirs in zip(*(b.step(torch.arange(20, 20 + rows)) for b in (ours, plain)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", PACKED_NAMES)
def test_tokens_equal_those_of_side_by_side(name: str, packing: Any) -> None:
    tiny = model_of(name)
    clean = tiny.prompts(2, extra=(3, 0))

    def run(on: bool) -> Any:
        packing(on)
        generation = SteeredGeneration(
            clean, noised_copy(clean), Guidance(CONFIG, [True, True], TinyTrie()), verdict_source=lambda _: VERDICTS
        )
        output = generation.generate(
            tiny.model, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, num_return_sequences=1,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        assert generation.report.notes["prefill"].startswith("both" if on else "branches side by side")
        return output

    wanted, ours = run(False), run(True)
    for row in range(2):
        for step in range(NEW_TOKENS):
            best = wanted.scores[step][row].topk(2).values
            at = clean["input_ids"].shape[1] + step
            if ours.sequences[row, at] == wanted.sequences[row, at]:
                continue
            assert best[0] - best[1] <= MIN_GAP, f"row {row} step {step}: another token, {best[0] - best[1]:.1e} ahead"
            break  # what follows another token is another text


@torch.no_grad()
def test_eager_attention_takes_the_mask_too(packing: Any) -> None:
    tiny = tiny_model("llava")
    tiny.model.set_attn_implementation("eager")
    clean = tiny.prompts(2, extra=(0, 3))
    packing(False)
    _, wanted = prefilled(tiny, clean)
    packing(True)
    ours, found = prefilled(tiny, clean)
    assert ours.prefilled.startswith("both branches in one row")
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_what_is_not_packed_says_why(packing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_model("llava")
    clean = tiny.prompts(1)
    assert "columns stand before the image, and packing pays from" in prefilled(tiny, clean)[0].prefilled
    packing(True)
    alone = Branches(tiny.model, clean, None, DynamicCache())
    alone.prefill()
    assert "one branch only" in alone.prefilled
    text = tiny.model.config.get_text_config(decoder=True)
    monkeypatch.setattr(text, "sliding_window", 8, raising=False)
    assert "sliding window" in prefilled(tiny, clean)[0].prefilled
    monkeypatch.undo()
    monkeypatch.setattr(packed, "PACKED_MIN_PREFIX", 1)
    monkeypatch.setattr(packed, "_TAKES_ANY_MASK", ())
    assert "takes no mask of its own" in prefilled(tiny, clean)[0].prefilled
