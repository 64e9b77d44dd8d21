"""A cache of fixed size gives the tokens of the growing one, for every family, and its buffers never move."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StoppingCriteriaList

from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding import kv
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.loop import SteeredGeneration
from safecode_mllm.decoding.static import LENGTH_STEPS, StaticBranches, static_length
from safecode_mllm.errors import JudgeError, UnsupportedModelError
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
    stays = "processor" not in mode and (mode == "greedy" or rng == "philox")
    assert report.notes["steps"].startswith("on the device" if stays else "looked at one by one")
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("steps", [2, 5, "all"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_steps_on_the_device_leave_the_same_record(steps: Any, sampled: bool) -> None:
    tiny = model_of("llava")
    clean = tiny.prompts(2, extra=(0, 3))

    def run(**arguments: Any) -> tuple[torch.Tensor, Any]:
        guidance = Guidance([CONFIG.replace(steps=steps), CONFIG], [True, True], TinyTrie())
        generation = SteeredGeneration(
            clean, noised_copy(clean), guidance, lambda branches: VERDICTS, rng="philox", seeds=[3, 4], record=True
        )
        return generation.generate(tiny.model, max_new_tokens=NEW_TOKENS, do_sample=sampled, **arguments), generation

    (wanted, theirs), (ours, mine) = run(), run(cache_implementation="static")
    assert torch.equal(ours, wanted)
    assert mine.report.lengths == theirs.report.lengths
    for expected, found in zip(theirs.report.guided, mine.report.guided, strict=True):
        assert [(t.token_id, t.n_kept) for t in found] == [(t.token_id, t.n_kept) for t in expected]
        for name in ("p_steered", "p_plain"):
            values = [getattr(t, name) for t in expected]
            assert [getattr(t, name) for t in found] == pytest.approx(values, abs=SCORE_TOLERANCE)


class Collect:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


def test_steps_on_the_device_feed_streamers_and_stop_where_criteria_say() -> None:
    tiny = model_of("qwen2_5_vl")
    clean = tiny.prompts(1)
    prompt = clean["input_ids"].shape[1]

    def stop(ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        return torch.full((len(ids),), ids.shape[1] >= prompt + 4)

    def run(**arguments: Any) -> tuple[torch.Tensor, Collect]:
        collect = Collect()
        guidance = Guidance(CONFIG, [True], TinyTrie())
        generation = SteeredGeneration(
            clean, noised_copy(clean), guidance, lambda branches: VERDICTS[:1], streamer=collect
        )
        criteria = StoppingCriteriaList([stop])
        return generation.generate(tiny.model, max_new_tokens=9, stopping_criteria=criteria, **arguments), collect

    (wanted, theirs), (ours, mine) = run(), run(cache_implementation="static")
    assert torch.equal(ours, wanted) and ours.shape[1] == prompt + 4
    assert mine.seen == theirs.seen


def test_rows_end_at_their_end_token_and_get_padding() -> None:
    tiny = model_of("llava")
    clean = tiny.prompts(2, extra=(0, 3))
    free, _ = generate(tiny, clean, "philox")
    prompt = clean["input_ids"].shape[1]
    end = int(free[0, prompt + 3])  # what the first row writes fourth
    wanted, theirs = generate(tiny, clean, "philox", eos_token_id=end)
    ours, mine = generate(tiny, clean, "philox", eos_token_id=end, cache_implementation="static")
    assert torch.equal(ours, wanted)
    assert mine.lengths == theirs.lengths and mine.lengths[0] == 4
    assert (ours[0, prompt + 4 :] == tiny.model.generation_config.pad_token_id).all()


def test_a_row_that_fails_is_named_and_the_other_finishes() -> None:
    tiny = tiny_model("llava")
    clean = tiny.prompts(2, extra=(0, 3))
    calls = []

    def spoil(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            output[0] = torch.nan
        return output

    wanted, _ = generate(tiny, clean, "philox")
    hook = tiny.model.get_output_embeddings().register_forward_hook(spoil)
    try:
        guidance = Guidance(CONFIG, [True, True], TinyTrie())
        generation = SteeredGeneration(
            clean, noised_copy(clean), guidance, lambda branches: VERDICTS, raise_row_errors=False
        )
        ours = generation.generate(tiny.model, max_new_tokens=NEW_TOKENS, cache_implementation="static")
    finally:
        hook.remove()
    assert list(generation.report.row_errors) == [0]
    assert "row 0, step 3: a clean logit is NaN" in str(generation.report.row_errors[0])
    assert torch.equal(ours[1], wanted[1])


def test_a_judge_that_fails_on_every_row_writes_nothing() -> None:
    tiny = model_of("llava")
    clean = tiny.prompts(2)
    generation = SteeredGeneration(
        clean, noised_copy(clean), Guidance(CONFIG, [True, True], TinyTrie()),
        lambda branches: [JudgeError("gone")] * 2, raise_row_errors=False,
    )  # fmt: skip
    ours = generation.generate(tiny.model, max_new_tokens=NEW_TOKENS, cache_implementation="static")
    assert ours.shape == clean["input_ids"].shape
    assert generation.report.lengths == [0, 0]


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


def test_other_caches_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="cache class list is not supported"):
        kv.empty_cache([])


def test_lengths_are_rounded_up_so_that_steps_have_few_shapes() -> None:
    for kind, step in LENGTH_STEPS.items():
        assert [static_length(n, torch.device(kind)) for n in (1, step, step + 1)] == [step, step, 2 * step]


def test_a_model_with_a_sliding_window_keeps_the_growing_cache() -> None:
    tiny = tiny_model("llava_next")
    text = tiny.model.config.text_config
    text.sliding_window, text.layer_types = 16, ["sliding_attention"] * text.num_hidden_layers
    clean = tiny.prompts(2)
    wanted, _ = generate(tiny, clean, "torch")
    ours, report = generate(tiny, clean, "torch", cache_implementation="static")
    assert "sliding window" in report.notes["cache"]
    assert torch.equal(ours, wanted)
