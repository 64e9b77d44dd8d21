"""The front door on tiny random models of every family, with their real processors."""

from __future__ import annotations

import copy
import json
import re
import threading
from functools import partial
from typing import Any

import pytest
import torch
from PIL import Image

from naive import NaiveSteering, last_logits, naive_generate
from pipelines import CONFIG, PROMPT, Broken, chat_model, front_door, picture
from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding.families import placeholder_ids
from safecode_mllm.errors import ConfigError, DecodeError, ImageError, JudgeError, PromptError, UnsupportedModelError
from safecode_mllm.judges.protocol import Verdict
from safecode_mllm.judges.question import LABEL_ORDERS, questions
from safecode_mllm.judges.self_judge import SelfJudge, letter_ids
from safecode_mllm.noise import noised_pixels
from safecode_mllm.pipeline import SafeCoDe
from safecode_mllm.refusal import refusal_tokens
from tiny_models import CHAT_NAMES, tiny_chat_model
from tiny_processors import TEXT_FIRST_TEMPLATE

PROBABILITY_TOLERANCE = 1e-6


@pytest.fixture
def everything_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model's letters hold little mass: accept any, so that its probability is used."""
    monkeypatch.setattr("safecode_mllm.judges.letters.MIN_LETTER_MASS", 0.0)


def naive_p_unsafe(sc: SafeCoDe, image: Image.Image, prompt: str) -> float:
    """Both questions from scratch: the whole conversation through the processor, no cache."""
    found = []
    for question, labels in zip(questions(), LABEL_ORDERS, strict=True):
        inputs = sc.builder.build(image, f"{prompt}\n\n{question}")
        p = last_logits(sc.model, inputs, inputs["input_ids"]).double().softmax(-1)[0]
        letters = [float(p[list(ids)].sum()) for ids in letter_ids(sc.builder.tokenizer)]
        found.append(letters[labels.index("unsafe")] / sum(letters))
    return sum(found) / len(found)


@pytest.mark.usefixtures("everything_counts")
@pytest.mark.parametrize("name", CHAT_NAMES)
def test_chat_equals_the_naive_loop_with_a_naive_judge(name: str) -> None:
    sc = front_door(name)
    image = picture()
    result = sc.chat(image, PROMPT, seed=11, max_new_tokens=8, min_new_tokens=8, eos_token_id=-1)
    assert result.verdict is not None and result.verdict.p_unsafe is not None
    assert result.verdict.p_unsafe == pytest.approx(naive_p_unsafe(sc, image, PROMPT), abs=PROBABILITY_TOLERANCE)

    clean = sc.builder.build(image, PROMPT)
    pixels = noised_pixels(clean["pixel_values"], sc.builder.image_processor, CONFIG, 11, index=0)
    noised = dict(clean, pixel_values=pixels)
    from safecode_mllm.judges.bias import verdict_bias

    trie = refusal_tokens(sc.builder.tokenizer, sc.model.get_output_embeddings().weight.shape[0], "phrase_trie")
    bias = [verdict_bias(result.verdict, CONFIG)]
    naive = NaiveSteering(0.8, 0.1, 5, bias, trie, tuple(placeholder_ids(sc.model)))
    ids, _ = naive_generate(sc.model, clean, noised, naive, 8)
    assert result.token_ids == ids[0, clean["input_ids"].shape[1] :].tolist()


@pytest.mark.usefixtures("everything_counts")
def test_a_template_with_the_image_last_gets_a_prefill_of_its_own() -> None:
    model, processor = tiny_chat_model("llava")
    processor = copy.copy(processor)
    processor.chat_template = TEXT_FIRST_TEMPLATE
    sc = SafeCoDe(model, processor, config=CONFIG)
    result = sc.chat(picture(), PROMPT, seed=1, max_new_tokens=2)
    assert result.verdict is not None
    assert result.verdict.p_unsafe == pytest.approx(naive_p_unsafe(sc, picture(), PROMPT), abs=PROBABILITY_TOLERANCE)
    assert "prefill of its own" in sc.explain()["judge"]
    assert "no second prefill" in front_door().explain()["judge"]
    assert "eager" in sc.explain()["decode_step"]


@pytest.mark.usefixtures("everything_counts")
@pytest.mark.parametrize("name", CHAT_NAMES)
def test_a_batch_gives_what_the_requests_give_alone(name: str) -> None:
    sc = front_door(name)
    requests = [
        {"image": picture(1), "prompt": PROMPT, "seed": 1},
        {"image": picture(2), "prompt": "What is this? It is a longer question about the picture.", "seed": 2},
        {"image": picture(3), "prompt": PROMPT, "seed": 3, "steering": "off"},
        {"image": picture(4), "prompt": PROMPT, "seed": 4, "verdict": Verdict("unsafe")},
    ]
    sampling = dict(max_new_tokens=10, do_sample=True, temperature=0.9, top_p=0.95)
    together = sc.chat_batch(requests, batch_size=4, **sampling)
    for request, batched in zip(requests, together, strict=True):
        alone = sc.chat(**request, **sampling)
        assert batched.token_ids == alone.token_ids
        assert batched.text == alone.text
        assert (batched.verdict is None) == (alone.verdict is None)
        if batched.verdict is not None and batched.verdict.p_unsafe is not None:
            assert batched.verdict.p_unsafe == pytest.approx(alone.verdict.p_unsafe, abs=PROBABILITY_TOLERANCE)
    assert together[2].verdict is None and together[2].steering == "off"
    assert together[3].verdict == Verdict("unsafe")


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_steering_off_is_stock_generate(name: str) -> None:
    sc = front_door(name)
    inputs = sc.builder.build(picture(), PROMPT)
    stock = sc.model.generate(**inputs, max_new_tokens=10)
    result = sc.chat(picture(), PROMPT, steering="off", max_new_tokens=10)
    assert result.token_ids == stock[0, inputs["input_ids"].shape[1] :].tolist()
    assert result.verdict is None and result.steering_effective is None and not any(result.record or [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Steered it runs; unsteered it is stock generate, in the model's own dtype."""
    model, processor = tiny_chat_model(name)
    sc = SafeCoDe(model.to(dtype), processor, config=CONFIG)
    inputs = {
        key: v.to(dtype) if v.is_floating_point() else v for key, v in sc.builder.build(picture(), PROMPT).items()
    }
    stock = model.generate(**inputs, max_new_tokens=8)
    plain = sc.chat(picture(), PROMPT, steering="off", max_new_tokens=8)
    assert plain.token_ids == stock[0, inputs["input_ids"].shape[1] :].tolist()
    steered = sc.chat(picture(), PROMPT, seed=1, max_new_tokens=8, do_sample=True, top_p=0.9)
    assert steered.record and all(0 < token.p_steered <= 1 for token in steered.record)


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_every_preset_runs_on_every_family(name: str) -> None:
    from safecode_mllm.config import PRESETS

    for preset in PRESETS:
        sc = front_door(name, SafeCoDeConfig(preset, on_unknown="no_bias"))
        result = sc.chat(picture(), PROMPT, seed=5, max_new_tokens=7)
        assert result.token_ids and result.context["preset"] == preset


def test_the_seed_repeats_an_answer_and_is_returned() -> None:
    sc = front_door()
    sampling = dict(max_new_tokens=12, do_sample=True, temperature=1.5)
    first = sc.chat(picture(), PROMPT, **sampling)
    again = sc.chat(picture(), PROMPT, seed=first.seed, **sampling)
    others = [sc.chat(picture(), PROMPT, seed=first.seed ^ (1 << bit), **sampling).token_ids for bit in range(3)]
    assert first.token_ids == again.token_ids
    assert any(other != first.token_ids for other in others)


def test_global_random_state_is_left_alone() -> None:
    sc = front_door()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    sc.chat(picture(), PROMPT, max_new_tokens=6, do_sample=True)
    assert torch.equal(torch.rand(3), expected)


def test_audit_is_json_and_names_its_sources() -> None:
    result = front_door().chat(picture(), PROMPT, max_new_tokens=6)
    line = json.loads(json.dumps(result.audit(), allow_nan=False))
    assert line["preset"] == "safecode" and line["config_digest"] == CONFIG.digest()
    assert line["versions"]["torch"] and len(line["image_sha256"]) == 64
    assert len(line["guided_tokens"]) <= 5
    assert line["verdict"]["policy"] == "treat_as_unsafe"
    assert PROMPT not in json.dumps(line)


def test_record_false_leaves_no_record() -> None:
    assert front_door().chat(picture(), PROMPT, max_new_tokens=6, record=False).record is None


def test_stream_gives_the_text_of_chat() -> None:
    sc = front_door()
    stream = sc.stream(picture(), PROMPT, seed=3, max_new_tokens=12)
    pieces = list(stream)
    whole = sc.chat(picture(), PROMPT, seed=3, max_new_tokens=12)
    assert "".join(pieces).rstrip() == whole.text
    assert stream.result.token_ids == whole.token_ids


def test_leaving_a_stream_stops_the_generation() -> None:
    stream = front_door().stream(picture(), PROMPT, seed=3, max_new_tokens=400, eos_token_id=-1)
    for _ in stream:
        break
    assert len(stream.result.token_ids) < 400


def test_stop_strings_and_user_processors_work() -> None:
    sc = front_door()
    free = sc.chat(picture(), PROMPT, seed=3, max_new_tokens=12)
    stop = re.findall("[a-z]{3}", free.text)[0]
    stopped = sc.chat(picture(), PROMPT, seed=3, max_new_tokens=12, stop_strings=[stop])
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) < len(free.token_ids)
    banned = sc.chat(picture(), PROMPT, seed=3, max_new_tokens=12, bad_words_ids=[[free.token_ids[0]]])
    assert free.token_ids[0] not in banned.token_ids


def test_a_bad_request_in_a_batch_is_its_own_error() -> None:
    results = front_door().chat_batch(
        [
            {"image": picture(), "prompt": PROMPT, "seed": 1},
            {"image": b"not an image", "prompt": PROMPT},
            {"image": picture(), "prompt": "   "},
            {"image": picture(), "prompt": PROMPT, "verdict": Verdict("safe", p_unsafe=0.9)},
        ],
        max_new_tokens=5,
    )
    assert [type(result.error) for result in results] == [type(None), ImageError, PromptError, JudgeError]
    assert results[0].token_ids and all(result.text == "" for result in results[1:])
    assert "ImageError" in results[1].audit()["error"]


@pytest.mark.parametrize(
    ("outcome", "field"), [(JudgeError("down"), "on_judge_error"), (Verdict("unknown", raw="hm"), "on_unknown")]
)
def test_judge_failures_follow_their_policy_and_never_fail_open(outcome: Any, field: str) -> None:
    ask = partial(front_door, judge=Broken(outcome))
    with pytest.raises(JudgeError):
        ask(config=SafeCoDeConfig()).chat(picture(), PROMPT, max_new_tokens=3)
    (failed,) = ask(config=SafeCoDeConfig()).chat_batch([{"image": picture(), "prompt": PROMPT}], max_new_tokens=3)
    assert isinstance(failed.error, JudgeError)
    for policy, bias in (("treat_as_unsafe", 1.0), ("no_bias", 0.0)):
        sc = ask(config=SafeCoDeConfig(**{field: policy}))
        result = sc.chat(picture(), PROMPT, max_new_tokens=3)
        assert result.verdict is not None and result.verdict.policy == policy and result.verdict.label == "unknown"
        assert (result.steering_effective is not None) == (bias > 0)


def test_wrong_number_of_verdicts_is_an_error() -> None:
    class Short(Broken):
        def judge_many(self, requests: Any) -> Any:
            return []

    with pytest.raises(JudgeError, match="0 verdicts for 1"):
        front_door(judge=Short(None), config=SafeCoDeConfig()).chat(picture(), PROMPT, max_new_tokens=3)


def test_verdict_moves_the_answer_towards_and_away_from_refusals() -> None:
    strong = SafeCoDeConfig(contrast_weight=0.0, plausibility_beta=0.0, lambda_boost=30.0, lambda_supp=30.0)
    sc = front_door(config=strong)
    # As long as the phrase it chooses: behind its end a random model writes anything, glued to it.
    refused = sc.chat(picture(), PROMPT, verdict=Verdict("unsafe"), max_new_tokens=4)
    answered = sc.chat(picture(), PROMPT, verdict=Verdict("safe"), max_new_tokens=8)
    assert refused.steering_effective is True
    assert not sc._answerer.refusal(CONFIG).starts_with_refusal(answered.text)


def test_nan_weights_are_reported_with_row_and_step() -> None:
    sc = SafeCoDe(*tiny_chat_model("llava", seed=1), config=CONFIG, judge="unsafe")
    with torch.no_grad():
        sc.model.get_output_embeddings().weight[7, 0] = float("nan")
    with pytest.raises(DecodeError, match=r"row 0, step 0.*NaN"):
        sc.chat(picture(), PROMPT, max_new_tokens=3)
    (failed,) = sc.chat_batch([{"image": picture(), "prompt": PROMPT}], max_new_tokens=3)
    assert isinstance(failed.error, DecodeError) and failed.text == ""


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(num_beams=2), UnsupportedModelError, "num_beams=2"),
        (dict(num_return_sequences=2), ConfigError, "num_return_sequences"),
        (dict(contrast_weight=1.0), ConfigError, "SafeCoDeConfig"),
        (dict(seed=-1), ConfigError, "seed"),
        (dict(steering="of"), ConfigError, "steering"),
        (dict(judge="selv"), ConfigError, "self"),
        (dict(verdict="unsafe"), ConfigError, "Verdict"),
        (dict(cache_implementation="offloaded"), UnsupportedModelError, "offloaded"),
        (dict(use_cache=False), UnsupportedModelError, "use_cache"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(arguments: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        front_door().chat(picture(), PROMPT, max_new_tokens=3, **arguments)


def test_unknown_request_keys_and_batch_sizes_are_refused_before_any_work() -> None:
    with pytest.raises(ConfigError, match="did you mean 'prompt'"):
        front_door().chat_batch([{"image": picture(), "promt": PROMPT}])
    with pytest.raises(ConfigError, match="batch_size"):
        front_door().chat_batch([], batch_size=0)
    assert front_door().chat_batch([]) == []


def test_no_judge_where_one_is_needed() -> None:
    with pytest.raises(ConfigError, match="needs a verdict"):
        front_door(judge=None).chat(picture(), PROMPT, max_new_tokens=3)
    result = front_door(judge=None, config=SafeCoDeConfig("contrast_only")).chat(picture(), PROMPT, max_new_tokens=3)
    assert result.verdict is None


def test_noised_image_override_takes_the_noised_branch() -> None:
    sc = front_door(config=SafeCoDeConfig("contrast_only", contrast_weight=2.0))
    request = {"image": picture(1), "prompt": PROMPT, "seed": 1}
    same, other = (
        sc.chat_batch([request | {"noised_image": image}], max_new_tokens=10)[0] for image in (picture(1), picture(2))
    )
    plain = sc.chat(**request, steering="off", max_new_tokens=10)
    assert same.token_ids == plain.token_ids  # n == z: contrast changes nothing
    assert other.token_ids != plain.token_ids
    (wrong,) = sc.chat_batch([request | {"noised_image": picture(1, size=(20, 90))}], max_new_tokens=2)
    assert wrong.error is None or isinstance(wrong.error, ImageError)


@pytest.mark.usefixtures("everything_counts")
def test_self_judge_alone_equals_the_one_inside_the_loop() -> None:
    sc = front_door()
    requests = [{"image": picture(i), "prompt": PROMPT, "seed": i} for i in range(3)]
    alone = sc.judge_batch(requests, batch_size=2)
    inside = sc.chat_batch(requests, max_new_tokens=1)
    assert [v.p_unsafe for v in alone] == pytest.approx([r.verdict.p_unsafe for r in inside], abs=PROBABILITY_TOLERANCE)


def test_too_little_mass_on_the_letters_is_unknown() -> None:
    sc = front_door(config=SafeCoDeConfig())
    (verdict,) = sc.judge_batch([{"image": picture(), "prompt": PROMPT}])
    assert verdict.label == "unknown" and verdict.p_unsafe is None
    with pytest.raises(JudgeError):
        sc.chat(picture(), PROMPT, max_new_tokens=2)


def test_an_unbound_self_judge_says_so() -> None:
    from safecode_mllm.errors import SafeCoDeError
    from safecode_mllm.judges.protocol import JudgeRequest

    with pytest.raises(SafeCoDeError, match="no model"):
        SelfJudge().judge_many([JudgeRequest(picture(), PROMPT)])


def test_unsupported_model_types_are_named() -> None:
    _, processor = chat_model("llava")

    class Other:
        config = type("Config", (), {"model_type": "mystery"})

    with pytest.raises(UnsupportedModelError, match="mystery"):
        SafeCoDe(Other(), processor)


def test_a_remote_judge_is_asked_while_the_prompt_is_prefilled() -> None:
    """Both wait for each other: if one came after the other, neither would come through."""
    meeting = threading.Barrier(2, timeout=30)
    met: list[bool] = []

    class Remote:
        name = "remote"
        remote = True

        def judge_many(self, requests: Any) -> list[Verdict]:
            meeting.wait()
            return [Verdict("unsafe", 0.9, judge=self.name) for _ in requests]

    sc = front_door(judge=Remote())

    def prefill(*_: Any) -> None:
        if not met:
            met.append(True)
            meeting.wait()

    hook = sc.model.register_forward_pre_hook(prefill)
    try:
        results = sc.chat_batch([{"image": picture(n), "prompt": PROMPT} for n in range(2)], max_new_tokens=2)
    finally:
        hook.remove()
    assert [r.verdict.p_unsafe for r in results if r.verdict] == [0.9, 0.9]
    assert results[0].error is None


@pytest.mark.parametrize("failure", [JudgeError("down"), OSError("no route"), ZeroDivisionError("a bug")])
def test_a_remote_judge_that_fails_fails_its_requests(failure: Exception) -> None:
    judge = Broken(failure)
    judge.remote = True  # type: ignore[attr-defined]
    (result,) = front_door(judge=judge).chat_batch([{"image": picture(), "prompt": PROMPT}], max_new_tokens=2)
    assert result.error is not None and str(failure) in str(result.error)
