"""SafeCoDeLogitsProcessor in a stock `generate` writes what the loop writes, and refuses what it cannot follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from habits import UNSTEERED, by_chat, model_of, new_ids, two_prompts
from pipelines import CONFIG, Broken, chat_model, front_door
from safecode_mllm import SafeCoDeConfig, SafeCoDeLogitsProcessor, Verdict, generate_fn
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.loop import SteeredGeneration
from safecode_mllm.errors import ConfigError, DecodeError, JudgeError, SafeCoDeError, UnsupportedModelError
from tiny_models import FAMILY_NAMES, noised_copy
from tiny_refusal import TinyTrie

VERDICTS = [Verdict("unsafe", 0.9), Verdict("safe", 0.2)]
# float32 noise floor of one branch is 4e-6, and contrast adds up two.
SCORE_TOLERANCE = 2e-5
CONFIGS = {
    "default": CONFIG.replace(lambda_boost=3.0),
    "dense_adaptive_fading": CONFIG.replace(plausibility_beta=0.0, steps="adaptive", bias_decay=0.9, lambda_boost=6.0),
    "all_steps": CONFIG.replace(steps="all"),
}


def processor_for(clean: dict[str, torch.Tensor], model: Any, **options: Any) -> SafeCoDeLogitsProcessor:
    settings = dict(verdict=VERDICTS, config=CONFIG, noised=noised_copy(clean), refusal=TinyTrie())
    return SafeCoDeLogitsProcessor(model, object(), clean, **settings | options)


@pytest.mark.parametrize("mode", ["greedy", "sampling"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_equals_the_loop(name: str, mode: str) -> None:
    tiny = model_of(name)
    clean = tiny.prompts(2, extra=(0, 3))
    arguments: dict[str, Any] = dict(max_new_tokens=9, return_dict_in_generate=True, output_scores=True)
    if mode == "sampling":
        arguments |= dict(do_sample=True, temperature=1.2, top_k=60, num_return_sequences=2)
    guidance = Guidance(CONFIG, [True, True], TinyTrie())
    loop = SteeredGeneration(clean, noised_copy(clean), guidance, verdict_source=lambda branches: VERDICTS)
    torch.manual_seed(0)
    wanted = loop.generate(tiny.model, **arguments)
    processor = processor_for(clean, tiny.model, num_return_sequences=arguments.get("num_return_sequences", 1))
    torch.manual_seed(0)
    output = tiny.model.generate(**clean, logits_processor=[processor], **arguments)
    # Some wrappers' generate returns the answer without the prompt, or not, by version.
    assert torch.equal(output.sequences[:, -9:], wanted.sequences[:, -9:])
    for ours, theirs in zip(output.scores, wanted.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=SCORE_TOLERANCE)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_kind_of_window_equals_the_loop(config: SafeCoDeConfig) -> None:
    tiny = model_of("llava")
    clean = tiny.prompts(2, extra=(0, 3))
    function = generate_fn(object(), verdict=VERDICTS, config=config, noised=noised_copy(clean), refusal=TinyTrie())
    wanted = tiny.model.generate(**clean, custom_generate=function, max_new_tokens=14)
    processor = processor_for(clean, tiny.model, config=config)
    assert torch.equal(tiny.model.generate(**clean, logits_processor=[processor], max_new_tokens=14), wanted)


def test_with_a_processor_and_the_models_own_judge_it_writes_what_chat_writes() -> None:
    inputs, wanted = two_prompts("qwen2_5_vl"), by_chat(front_door("qwen2_5_vl"), max_new_tokens=8)
    model, processor = chat_model("qwen2_5_vl")
    steering = SafeCoDeLogitsProcessor(model, processor, inputs, config=CONFIG, seed=5)
    assert [verdict.judge for verdict in steering.verdicts] == ["self"] * 2
    output = model.generate(**inputs, logits_processor=[steering], max_new_tokens=8)
    assert new_ids(output, inputs, wanted) == wanted


def test_without_steering_scores_pass_through_and_no_second_branch_runs() -> None:
    tiny = model_of("llava")
    clean = tiny.prompts(2)
    passes: list[int] = []
    hook = tiny.model.register_forward_pre_hook(lambda *_: passes.append(1))
    processor = SafeCoDeLogitsProcessor(tiny.model, object(), clean, config=UNSTEERED)
    output = tiny.model.generate(**clean, logits_processor=[processor], max_new_tokens=4, min_new_tokens=4)
    hook.remove()
    assert len(passes) == 4
    assert torch.equal(output, tiny.model.generate(**clean, max_new_tokens=4, min_new_tokens=4))


def test_the_noised_branch_ends_with_the_window() -> None:
    tiny = model_of("llava")
    clean = tiny.prompts(2)
    passes: list[int] = []
    hook = tiny.model.register_forward_pre_hook(lambda *_: passes.append(1))
    processor = processor_for(clean, tiny.model, config=CONFIG.replace(steps=3))
    tiny.model.generate(**clean, logits_processor=[processor], max_new_tokens=8, min_new_tokens=8)
    hook.remove()
    assert len(passes) == 8 + 3


# ---- what it cannot follow ----


def test_it_serves_one_generation() -> None:
    tiny = model_of("llava")
    clean = tiny.prompts(1)
    processor = processor_for(clean, tiny.model, verdict="unsafe")
    tiny.model.generate(**clean, logits_processor=[processor], max_new_tokens=3)
    with pytest.raises(SafeCoDeError, match="has seen its prompt already: make a new one"):
        tiny.model.generate(**clean, logits_processor=[processor], max_new_tokens=3)


@pytest.mark.parametrize("mode", [dict(num_beams=3), dict(do_sample=True, num_return_sequences=2)])
def test_rows_it_was_not_made_for_are_refused(mode: dict[str, Any]) -> None:
    tiny = model_of("llava")
    clean = tiny.prompts(2)
    with pytest.raises(SafeCoDeError, match=r"num_return_sequences if there are several\. Beam search is not"):
        tiny.model.generate(**clean, logits_processor=[processor_for(clean, tiny.model)], max_new_tokens=3, **mode)


def test_other_prompts_are_refused() -> None:
    tiny = model_of("llava")
    clean = tiny.prompts(2)
    others = dict(clean, input_ids=clean["input_ids"].roll(1, 0))
    with pytest.raises(SafeCoDeError, match="pass it the same inputs as generate"):
        tiny.model.generate(**others, logits_processor=[processor_for(clean, tiny.model)], max_new_tokens=3)


def test_beams_and_assisted_decoding_are_noticed() -> None:
    tiny = model_of("llava")
    clean = tiny.prompts(1)
    words = "beam search, assisted decoding and contrastive search cannot be steered; use greedy decoding or sampling"
    beams = processor_for(clean, tiny.model, verdict="safe", num_return_sequences=3)
    with pytest.raises(UnsupportedModelError, match=words):
        tiny.model.generate(**clean, logits_processor=[beams], max_new_tokens=12, min_new_tokens=12, num_beams=3)
    looked_up = processor_for(clean, tiny.model, verdict="safe")
    with pytest.raises(SafeCoDeError, match=r"[Aa]ssisted decoding.* cannot be steered"):
        tiny.model.generate(**clean, logits_processor=[looked_up], max_new_tokens=12, assistant_model=tiny.model)


def test_a_row_that_cannot_be_decoded_is_named() -> None:
    tiny = model_of("llava")
    clean = tiny.prompts(2)
    broken: Callable[..., torch.Tensor] = lambda ids, scores: scores.index_fill(  # noqa: E731
        0, torch.tensor([1]), torch.nan
    )
    with pytest.raises(DecodeError, match="row 1, step 0"):
        tiny.model.generate(**clean, logits_processor=[broken, processor_for(clean, tiny.model)], max_new_tokens=3)


def test_a_language_model_with_an_encoder_is_refused() -> None:
    tiny = model_of("instructblip_t5")
    with pytest.raises(UnsupportedModelError, match="reads its prompt with an encoder"):
        processor_for(tiny.prompts(1), tiny.model)


def test_a_judge_that_fails_raises_when_the_processor_is_made() -> None:
    model, processor = chat_model("llava")
    inputs = two_prompts("llava")
    with pytest.raises(JudgeError, match="out of order"):
        SafeCoDeLogitsProcessor(
            model, processor, inputs, judge=Broken(JudgeError("out of order")), requests=[None, None], config=CONFIG
        )
    with pytest.raises(ConfigError, match="refusal_style='explain'"):
        SafeCoDeLogitsProcessor(model, processor, inputs, config=CONFIG.replace(refusal_style="explain"))
