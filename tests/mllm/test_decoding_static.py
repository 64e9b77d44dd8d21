"""A cache of fixed size gives the tokens of the growing one, for every family, and its buffers never move."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.loop import SteeredGeneration
from safecode_mllm.decoding.static import LENGTH_STEP, StaticBranches, static_length
from safecode_mllm.judges.protocol import Verdict
from tiny_models import FAMILY_NAMES, TinyModel, noised_copy, tiny_model
from tiny_refusal import TinyTrie

CONFIG = SafeCoDeConfig(contrast_weight=0.8, lambda_boost=2.0, lambda_supp=1.5)
VERDICTS = [Verdict("unsafe", 0.9), Verdict("safe", 0.2)]
NEW_TOKENS = 9
SCORE_TOLERANCE = 2e-5
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.9, "top_k": 40},
    "two answers": {"do_sample": True, "num_return_sequences": 2},
    "processor": {"repetition_penalty": 1.3},
}


@cache
def model_of(name: str) -> TinyModel:
    return tiny_model(name)


def generate(tiny: TinyModel, clean: dict[str, torch.Tensor], rng: Any, **arguments: Any) -> Any:
    guidance = Guidance(CONFIG, [True, True], TinyTrie())
    generation = SteeredGeneration(
        clean, noised_copy(clean), guidance, verdict_source=lambda branches: VERDICTS, rng=rng, seeds=[3, 4]
    )
    torch.manual_seed(0)
    output = generation.generate(tiny.model, max_new_tokens=NEW_TOKENS, **arguments)
    return output, generation.report


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rng", ["torch", "philox"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_equals_the_growing_cache(name: str, rng: Any, mode: str) -> None:
    tiny = model_of(name)
    clean = tiny.prompts(2, extra=(0, 3))
    wanted, _ = generate(tiny, clean, rng, **MODES[mode])
    ours, report = generate(tiny, clean, rng, cache_implementation="static", **MODES[mode])
    assert report.notes["cache"] == "of fixed size"
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_scores_equal_those_of_the_growing_cache(name: str) -> None:
    tiny = model_of(name)
    clean = tiny.prompts(2, extra=(0, 3))
    arguments = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    wanted, _ = generate(tiny, clean, "torch", **arguments)
    ours, _ = generate(tiny, clean, "torch", cache_implementation="static", **arguments)
    for field in ("scores", "logits"):
        for theirs, mine in zip(getattr(wanted, field), getattr(ours, field), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=SCORE_TOLERANCE)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_buffers_never_move(name: str) -> None:
    tiny = model_of(name)
    clean = tiny.prompts(2)
    with torch.no_grad():
        branches = Branches(tiny.model, clean, noised_copy(clean), DynamicCache())
        branches.prefill()
        fixed = StaticBranches(branches, clean["input_ids"].shape[1] + 8)
        buffers = [fixed.tokens, fixed.positions, fixed.column, fixed.mask]

        def addresses() -> list[int]:
            layers = [tensor for layer in fixed.cache.layers for tensor in (layer.keys, layer.values)]
            return [tensor.data_ptr() for tensor in (*buffers, *layers)]

        before = addresses()
        for step in range(4):
            if step == 2:
                fixed.drop_noised()
            fixed.step(torch.tensor([20, 21]))
        assert addresses() == before
    assert {layer.keys.shape[0] for layer in fixed.cache.layers} == {2}


def test_lengths_are_rounded_up_so_that_steps_have_few_shapes() -> None:
    assert [static_length(n) for n in (1, LENGTH_STEP, LENGTH_STEP + 1)] == [LENGTH_STEP, LENGTH_STEP, 2 * LENGTH_STEP]


def test_a_model_with_a_sliding_window_keeps_the_growing_cache() -> None:
    tiny = tiny_model("llava_next")
    text = tiny.model.config.text_config
    text.sliding_window, text.layer_types = 16, ["sliding_attention"] * text.num_hidden_layers
    clean = tiny.prompts(2)
    wanted, _ = generate(tiny, clean, "torch")
    ours, report = generate(tiny, clean, "torch", cache_implementation="static")
    assert "sliding window" in report.notes["cache"]
    assert torch.equal(ours, wanted)
