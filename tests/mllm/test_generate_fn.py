"""`model.generate(**inputs, custom_generate=generate_fn(...))`: the front door's answers from the usual call."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from habits import OTHER_PROMPT, UNSTEERED, Collect, by_chat, model_of, new_ids, two_prompts
from pipelines import CONFIG, PROMPT, Broken, chat_model, front_door, picture
from safecode_mllm import RECIPE, JudgeRequest, SafeCoDeConfig, Verdict, generate_fn
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.loop import SteeredGeneration
from safecode_mllm.errors import ConfigError, ImageError, UnsupportedModelError
from tiny_models import CHAT_NAMES, FAMILY_NAMES, TIER2_NAMES, noised_copy
from tiny_refusal import TinyTrie

SAMPLING = dict(max_new_tokens=8, do_sample=True, temperature=1.3, top_p=0.9)

# ---- the usual call ----


@pytest.mark.parametrize("judge", ["self", "safe"])
@pytest.mark.parametrize("name", CHAT_NAMES)
def test_the_usual_call_writes_what_chat_writes(name: str, judge: str) -> None:
    inputs, wanted = two_prompts(name), by_chat(front_door(name, judge=judge), **SAMPLING)
    model, processor = chat_model(name)
    function = generate_fn(processor, judge=judge, config=CONFIG, seed=5, record=True)
    output = model.generate(**inputs, custom_generate=function, **SAMPLING)
    assert new_ids(output, inputs, wanted) == wanted
    assert [verdict.judge for verdict in function.report.verdicts] == ["self" if judge == "self" else "fixed"] * 2
    assert len(function.report.guided[0]) == min(CONFIG.steps, len(wanted[0]))


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_every_key_of_a_processor_travels_in_both_branches_and_images_are_encoded_once(name: str) -> None:
    inputs = two_prompts(name)
    model, processor = chat_model(name)
    # In transformers 4 some models are run without their output head: there the inner module is the one that is called.
    passes: dict[Any, list[dict[str, Any]]] = {model: [], model.base_model: [], model.model: []}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, kwargs: passes[module].append(kwargs), with_kwargs=True)
        for module in passes
    ]
    model.generate(
        **inputs, custom_generate=generate_fn(processor, verdict="unsafe", config=CONFIG, seed=5), max_new_tokens=3
    )
    for hook in hooks:
        hook.remove()
    first, *later = passes[model] or passes[model.model]
    assert not any("pixel_values" in kwargs for kwargs in later)
    for key, value in inputs.items():
        clean, noised = first[key].chunk(2)
        assert torch.equal(clean, value), key
        assert torch.equal(noised, value) is (key != "pixel_values"), key


@pytest.mark.parametrize(
    "mode", [{}, dict(do_sample=True, num_return_sequences=3, top_k=40), dict(repetition_penalty=1.3, min_new_tokens=4)]
)
def test_unsteered_and_unseeded_it_is_stock_generate(mode: dict[str, Any]) -> None:
    tiny = model_of("qwen2_5_vl")
    clean = tiny.prompts(2, extra=(0, 3))
    wanted = dict(max_new_tokens=12, return_dict_in_generate=True, output_scores=True, output_logits=True) | mode
    torch.manual_seed(0)
    stock = tiny.model.generate(**clean, **wanted)
    torch.manual_seed(0)
    function = generate_fn(chat_model("llava")[1], config=UNSTEERED)
    ours = tiny.model.generate(**clean, custom_generate=function, **wanted)
    assert torch.equal(stock.sequences, ours.sequences)
    for field in ("scores", "logits"):
        for theirs, mine in zip(getattr(stock, field), getattr(ours, field), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in TIER2_NAMES]


@pytest.mark.parametrize("name", [*FAMILY_NAMES, *SLOW])
def test_families_without_a_chat_work_with_given_verdict_and_noised_inputs(name: str) -> None:
    tiny = model_of(name)
    clean = tiny.prompts(2, extra=(0, 3))
    guidance = Guidance(CONFIG, [True, True], TinyTrie())
    verdicts = [Verdict("unsafe", 0.9), Verdict("safe", 0.2)]
    loop = SteeredGeneration(clean, noised_copy(clean), guidance, verdict_source=lambda branches: verdicts)
    wanted = loop.generate(tiny.model, max_new_tokens=8)
    function = generate_fn(object(), verdict=verdicts, config=CONFIG, noised=noised_copy(clean), refusal=TinyTrie())
    assert torch.equal(function.generate(tiny.model, **clean, max_new_tokens=8), wanted)
    if name.startswith(("instructblip", "blip")):
        with pytest.raises(UnsupportedModelError, match=r"generate_fn\(\.\.\.\)\.generate\(model"):
            tiny.model.generate(**clean, custom_generate=function, max_new_tokens=8)
    else:
        assert torch.equal(tiny.model.generate(**clean, custom_generate=function, max_new_tokens=8), wanted)


# ---- what people pass besides ----


def test_a_streamer_sees_what_stock_generate_shows_it() -> None:
    tiny, stock, ours, bound = model_of("llava"), Collect(), Collect(), Collect()
    clean = tiny.prompts(1)
    processor = chat_model("llava")[1]
    tiny.model.generate(**clean, streamer=stock, max_new_tokens=6)
    tiny.model.generate(
        **clean, streamer=ours, custom_generate=generate_fn(processor, config=UNSTEERED), max_new_tokens=6
    )
    function = generate_fn(processor, config=UNSTEERED, streamer=bound)
    tiny.model.generate(**clean, custom_generate=function, max_new_tokens=6)
    assert ours.seen == stock.seen == bound.seen


def test_stop_strings_need_no_tokenizer() -> None:
    inputs, wanted = two_prompts("llava"), by_chat(front_door(judge="safe"), **SAMPLING)
    model, processor = chat_model("llava")
    stop = re.findall("[a-z]{2}", processor.tokenizer.decode(wanted[0][:-2]))[0]
    stopped = by_chat(front_door(judge="safe"), stop_strings=[stop], **SAMPLING)
    assert len(stopped[0]) < len(wanted[0])
    function = generate_fn(processor, verdict="safe", config=CONFIG, seed=5)
    output = model.generate(**inputs, custom_generate=function, stop_strings=[stop], **SAMPLING)
    assert new_ids(output, inputs, stopped) == stopped
    assert torch.equal(function.generate(model, **inputs, stop_strings=[stop], **SAMPLING), output)


def test_bans_prefixes_and_time_limits_hold() -> None:
    inputs = two_prompts("qwen2_vl")
    model, processor = chat_model("qwen2_vl")
    start = inputs["input_ids"].shape[1]

    def generate(**options: Any) -> torch.Tensor:
        function = generate_fn(processor, verdict="unsafe", config=CONFIG)
        return model.generate(**inputs, custom_generate=function, max_new_tokens=6, **options)[:, start:]

    free = generate()
    banned = int(free[0, 0])
    assert banned not in generate(bad_words_ids=[[banned]])[0].tolist()
    assert set(generate(prefix_allowed_tokens_fn=lambda row, ids: [100, 101]).flatten().tolist()) <= {100, 101}
    assert generate(max_time=1e-9).shape[1] == 1 < free.shape[1]


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (dict(num_beams=2), "num_beams=2"),
        (dict(penalty_alpha=0.6, top_k=4), "penalty_alpha=0.6"),
        (dict(prompt_lookup_num_tokens=2), "prompt_lookup_num_tokens=2"),
        (dict(dola_layers="low"), "dola_layers"),
        (dict(assistant_model="itself"), "assistant_model"),
    ],
)
def test_searches_that_cannot_be_steered_are_refused_with_the_alternative(mode: dict[str, Any], words: str) -> None:
    model, processor = chat_model("llava")
    mode = {key: model if value == "itself" else value for key, value in mode.items()}
    function = generate_fn(processor, verdict="unsafe", config=CONFIG)
    for call in (lambda **a: model.generate(custom_generate=function, **a), lambda **a: function.generate(model, **a)):
        with pytest.raises(UnsupportedModelError, match=f"{words}.*use greedy decoding or sampling"):
            call(**two_prompts("llava"), max_new_tokens=3, **mode)


@pytest.mark.parametrize("output", ["output_attentions", "output_hidden_states"])
def test_outputs_that_are_not_kept_are_refused(output: str) -> None:
    model, processor = chat_model("llava")
    function = generate_fn(processor, verdict="unsafe", config=CONFIG)
    with pytest.raises(UnsupportedModelError, match=f"{output}=True.*on the finished ids"):
        model.generate(**two_prompts("llava"), custom_generate=function, return_dict_in_generate=True, **{output: True})


def test_a_refusal_style_and_a_fading_bias_are_those_of_chat() -> None:
    inputs = two_prompts("llava")
    model, processor = chat_model("llava")
    fading = CONFIG.replace(bias_decay=0.9, lambda_boost=8.0, steps=2)
    function = generate_fn(processor, verdict="unsafe", config=fading, seed=5)
    output = model.generate(**inputs, custom_generate=function, **SAMPLING)
    assert torch.equal(function.generate(model, **inputs, **SAMPLING), output)
    plain = generate_fn(processor, verdict="unsafe", config=fading.replace(bias_decay=0.0), seed=5)
    assert not torch.equal(model.generate(**inputs, custom_generate=plain, **SAMPLING), output)
    explaining = generate_fn(processor, verdict="unsafe", config=CONFIG.replace(refusal_style="explain"), seed=5)
    with pytest.raises(ConfigError, match="refusal_style='explain'"):
        model.generate(**inputs, custom_generate=explaining, **SAMPLING)
    assert explaining.generate(model, **inputs, **SAMPLING).shape[1] >= output.shape[1]


# ---- configurations in files ----


def test_a_generation_config_file_may_hold_the_configuration(tmp_path: Path) -> None:
    inputs = two_prompts("llava")
    model, processor = chat_model("llava")
    fields = dict(preset="verdict_only", lambda_boost=6.0, steps=3)
    special = dict(pad_token_id=processor.tokenizer.pad_token_id, eos_token_id=processor.tokenizer.eos_token_id)
    GenerationConfig(**SAMPLING, **special, safecode=fields).save_pretrained(tmp_path)
    loaded = GenerationConfig.from_pretrained(tmp_path)
    explicit = generate_fn(processor, verdict="unsafe", config=SafeCoDeConfig.from_dict(fields), seed=5)
    wanted = model.generate(**inputs, custom_generate=explicit, **SAMPLING)
    function = generate_fn(processor, verdict="unsafe", seed=5)
    output = model.generate(**inputs, custom_generate=function, generation_config=loaded)
    assert torch.equal(output, wanted)
    # What is given in the call counts.
    chosen = generate_fn(processor, verdict="unsafe", config=CONFIG, seed=5)
    assert not torch.equal(model.generate(**inputs, custom_generate=chosen, generation_config=loaded), wanted)
    loaded.safecode = {"step": 3}
    with pytest.raises(ConfigError, match=r"field 'safecode'.*Did you mean 'steps'"):
        model.generate(**inputs, custom_generate=function, generation_config=loaded)


def test_the_front_door_reads_the_models_own_file() -> None:
    model, processor = chat_model("qwen3_vl")
    model.generation_config.safecode = {"preset": "vcd"}
    try:
        assert type(front_door("qwen3_vl"))(model, processor).config == SafeCoDeConfig("vcd")
        assert front_door("qwen3_vl").config == CONFIG
    finally:
        del model.generation_config.safecode


# ---- the recipe ----


def test_the_recipe_folder_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    inputs, wanted = two_prompts("llava"), by_chat(front_door(), **SAMPLING)
    model, processor = chat_model("llava")
    streamed = Collect()
    output = model.generate(
        **inputs, custom_generate=RECIPE, trust_remote_code=True, processor=processor, safecode=CONFIG.to_dict(),
        seed=5, **SAMPLING,
    )  # fmt: skip
    assert new_ids(output, inputs, wanted) == wanted
    one = {key: value[:1] for key, value in inputs.items()}
    model.generate(
        **one, custom_generate=RECIPE, trust_remote_code=True, processor=processor, verdict="safe", streamer=streamed,
        max_new_tokens=2,
    )  # fmt: skip
    assert streamed.seen[0] == one["input_ids"][0].tolist()
    assert streamed.seen[-1] == "end"
    with pytest.raises(ConfigError, match="processor is None"):
        model.generate(**inputs, custom_generate=RECIPE, trust_remote_code=True)


# ---- images and judges ----


def test_several_images_in_a_prompt_are_each_noised() -> None:
    tiny = model_of("llava")
    single = tiny.prompts(2)
    places = single["input_ids"][:1]
    inputs = dict(
        input_ids=torch.cat([places, torch.full((1, 1), 20), places], 1),
        attention_mask=torch.ones(1, 2 * places.shape[1] + 1, dtype=torch.long),
        pixel_values=single["pixel_values"],
    )
    processor = chat_model("llava")[1]
    function = generate_fn(processor, verdict="unsafe", config=CONFIG, refusal=TinyTrie(), seed=3)
    prepared = function.plan.prepare(tiny.model, inputs, CONFIG)
    noise = prepared.noised["pixel_values"] - inputs["pixel_values"]
    assert not torch.equal(noise[0], noise[1])
    # A prompt's pictures are noised in one draw, whoever else is in the batch.
    lonely = {key: value[1:] for key, value in single.items()}
    alone = generate_fn(processor, verdict="unsafe", config=CONFIG, refusal=TinyTrie(), seed=4)
    expected = alone.plan.prepare(tiny.model, lonely, CONFIG).noised["pixel_values"]
    batch = function.plan.prepare(tiny.model, single, CONFIG).noised["pixel_values"]
    assert torch.equal(batch[1:], expected)
    assert tiny.model.generate(**inputs, custom_generate=function, max_new_tokens=3).shape[0] == 1
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"], inputs["pixel_values"][:1]])
    with pytest.raises(ImageError, match=r"holds 3 images, but the prompts have room for \[2\]"):
        tiny.model.generate(**inputs, custom_generate=function, max_new_tokens=3)


def test_without_an_image_the_verdict_still_applies() -> None:
    tiny = model_of("llava")
    inputs = dict(input_ids=torch.tensor([[1, 11, 12, 13]]), attention_mask=torch.ones(1, 4, dtype=torch.long))
    boosting = CONFIG.replace(lambda_boost=1000.0)
    function = generate_fn(object(), verdict="unsafe", config=boosting, refusal=TinyTrie())
    output = tiny.model.generate(**inputs, custom_generate=function, max_new_tokens=2)
    assert tuple(output[0, 4:].tolist()) in {phrase[:2] for phrase in TinyTrie.phrases}


def test_a_judge_gets_the_requests() -> None:
    inputs = two_prompts("llava")
    model, processor = chat_model("llava")
    requests = [JudgeRequest(picture(1), PROMPT), JudgeRequest(picture(2), OTHER_PROMPT)]
    judge = Broken(Verdict("safe", 0.1, judge="broken"))
    function = generate_fn(processor, judge=judge, requests=requests, config=CONFIG)
    model.generate(**inputs, custom_generate=function, max_new_tokens=2)
    assert [verdict.p_unsafe for verdict in function.report.verdicts] == [0.1, 0.1]
    with pytest.raises(ConfigError, match=r"judge 'broken' needs pictures and prompts.*requests=\[JudgeRequest"):
        model.generate(**inputs, custom_generate=generate_fn(processor, judge=judge, config=CONFIG), max_new_tokens=2)
    function = generate_fn(processor, judge=judge, requests=requests[:1], config=CONFIG)
    with pytest.raises(ConfigError, match="requests holds 1 entries for 2 prompts"):
        model.generate(**inputs, custom_generate=function, max_new_tokens=2)


def test_the_self_judge_says_when_it_cannot_read_a_prompt() -> None:
    inputs = dict(two_prompts("qwen2_vl"))
    model, processor = chat_model("qwen2_vl")
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][1, -1] = 100  # no longer the template's end
    with pytest.raises(ConfigError, match=r"cannot read prompt 1 from its ids.*requests="):
        model.generate(**inputs, custom_generate=generate_fn(processor, config=CONFIG), max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(verdict="maybe"), "verdict='maybe' is not legal"),
        (dict(verdict="safe", config=SafeCoDeConfig("vcd")), "verdict is given, but preset 'vcd'"),
        (dict(judge=None, config=CONFIG), "needs a verdict, but judge is None"),
        (dict(judge="selfish"), "selfish"),
        (dict(seed=-1), "seed must be an integer"),
        (dict(config={"steps": 3}), "config must be a SafeCoDeConfig, got dict"),
    ],
)
def test_bad_arguments_are_named_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        generate_fn(chat_model("llava")[1], **options)


def test_bad_inputs_are_named_before_the_model_runs() -> None:
    inputs = two_prompts("llava")
    model, processor = chat_model("llava")

    def generate(processor: Any = processor, config: SafeCoDeConfig = CONFIG, **options: Any) -> Any:
        function = generate_fn(processor, **dict(verdict="safe", config=config) | options)
        return model.generate(**inputs, custom_generate=function, max_new_tokens=2)

    hook = model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    try:
        with pytest.raises(ConfigError, match='noise_space="image" needs whole pictures'):
            generate(config=CONFIG.replace(noise_space="image"))
        with pytest.raises(ConfigError, match="without an image processor"):
            generate(processor.tokenizer)
        with pytest.raises(ConfigError, match="noised does not fit the inputs in pixel_values"):
            generate(noised=dict(inputs, pixel_values=inputs["pixel_values"][:1]))
        with pytest.raises(ConfigError, match="noised does not fit the inputs in input_ids"):
            generate(noised=dict(inputs, input_ids=inputs["input_ids"].roll(1, 0)))
        with pytest.raises(ConfigError, match="verdict holds 3 entries for 2 prompts"):
            generate(verdict=["safe"] * 3)
        with pytest.raises(ConfigError, match="input_ids is missing"):
            generate_fn(processor, verdict="safe").generate(model, pixel_values=inputs["pixel_values"])
    finally:
        hook.remove()


def test_user_processors_come_in_the_methods_order() -> None:
    """The list that generate() made reaches the loop as it is."""
    model, processor = chat_model("llava")

    class Only:
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            kept = torch.full_like(scores, -torch.inf)
            kept[:, 300] = scores[:, 300]
            return kept

    function = generate_fn(processor, verdict="unsafe", config=CONFIG)
    output = model.generate(
        **two_prompts("llava"), custom_generate=function, max_new_tokens=2,
        logits_processor=LogitsProcessorList([Only()]),
    )  # fmt: skip
    assert output[:, -2:].flatten().tolist() == [300] * 4
