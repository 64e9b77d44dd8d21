"""What must not leak from one request to another, get lost, or pass in silence."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pipelines import CONFIG, PROMPT, Broken, front_door, picture
from safecode_mllm.config import PRESETS, SafeCoDeConfig
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.loop import SteeredGeneration
from safecode_mllm.errors import ConfigError, DecodeError, JudgeError
from safecode_mllm.judges.protocol import Verdict
from tiny_models import tiny_model
from tiny_refusal import TinyTrie

REQUESTS = [{"image": picture(i), "prompt": PROMPT, "seed": i} for i in range(3)]


@pytest.mark.parametrize("field", [{"num_return_sequences": 2, "do_sample": True}, {"return_dict_in_generate": True}])
def test_a_generation_config_cannot_hand_one_requests_answer_to_another(field: dict[str, Any]) -> None:
    sc = front_door()
    special = dict(pad_token_id=sc.builder.pad_token_id, eos_token_id=sc.model.generation_config.eos_token_id)
    config = GenerationConfig(max_new_tokens=6, **special, **field)
    together = sc.chat_batch(REQUESTS, generation_config=config)
    assert [r.token_ids for r in together] == [sc.chat(**q, generation_config=config).token_ids for q in REQUESTS]
    assert len({tuple(r.token_ids) for r in together}) == 3


def test_a_failed_verdict_ends_the_rows_of_its_request_only() -> None:
    tiny = tiny_model("llava")
    clean = tiny.prompts(2)
    loop = SteeredGeneration(
        clean,
        None,
        Guidance(CONFIG.replace(contrast_weight=0.0), [True, True], TinyTrie()),  # type: ignore[arg-type]
        verdict_source=lambda branches: [Verdict("unsafe"), JudgeError("down")],
        raise_row_errors=False,
    )
    loop.generate(tiny.model, max_new_tokens=4, do_sample=True, num_return_sequences=2, eos_token_id=-1)
    assert sorted(loop.report.row_errors) == [2, 3]
    assert loop.report.lengths == [4, 4, 0, 0]


@pytest.mark.parametrize("processors", [False, True], ids=["fused", "scores"])
@pytest.mark.parametrize("preset", PRESETS)
def test_steering_off_is_plain_sampling_whatever_the_preset(preset: str, processors: bool) -> None:
    plain = front_door(config=SafeCoDeConfig("contrast_only"), judge=None)
    other = front_door(config=SafeCoDeConfig(preset, on_unknown="no_bias"))
    mode: dict[str, Any] = dict(max_new_tokens=8, do_sample=True, temperature=3.0)
    if processors:
        mode["repetition_penalty"] = 1.2
    for seed in range(4):
        request = {"image": picture(), "prompt": PROMPT, "seed": seed, "steering": "off"}
        # Beside a steered one, so that the batch has guided steps.
        batch = other.chat_batch([request, {"image": picture(1), "prompt": PROMPT, "seed": 9}], **mode)
        assert batch[0].token_ids == plain.chat(**request, **mode).token_ids


class Poison(LogitsProcessor):
    """Sets the best token to a value that no model should give."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, scores.argmax(-1, keepdim=True), self.value)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("steering", ["on", "off"])
def test_a_processor_that_breaks_the_scores_is_an_error_everywhere(steering: Any, value: float) -> None:
    processors = LogitsProcessorList([Poison(value)])
    with pytest.raises(DecodeError, match=r"step 0.*Poison"):
        front_door().chat(picture(), PROMPT, steering=steering, max_new_tokens=4, logits_processor=processors)


class FailsOnce:
    """Answers, but its second call does not."""

    name = "fails_once"

    def __init__(self, error: Exception) -> None:
        self.error, self.calls = error, 0

    def judge_many(self, requests: Any) -> list[Verdict]:
        self.calls += 1
        if self.calls == 2:
            raise self.error
        return [Verdict("safe")] * len(requests)


def test_a_judge_that_times_out_is_that_batchs_error_and_follows_the_policy() -> None:
    results = front_door(judge=FailsOnce(TimeoutError("slow"))).chat_batch(REQUESTS, batch_size=1, max_new_tokens=3)
    assert [type(r.error) for r in results] == [type(None), JudgeError, type(None)]
    treated = front_door(judge=FailsOnce(TimeoutError()), config=CONFIG.replace(on_judge_error="treat_as_unsafe"))
    verdicts = [r.verdict for r in treated.chat_batch(REQUESTS, batch_size=1, max_new_tokens=3)]
    assert [v.policy for v in verdicts if v] == [None, "treat_as_unsafe", None]


def test_a_bug_in_a_judge_loses_no_finished_answer(caplog: pytest.LogCaptureFixture) -> None:
    results = front_door(judge=FailsOnce(ZeroDivisionError("bug"))).chat_batch(REQUESTS, batch_size=1, max_new_tokens=3)
    assert [type(r.error) for r in results] == [type(None), ZeroDivisionError, type(None)]
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(ZeroDivisionError):
        front_door(judge=FailsOnce(ZeroDivisionError())).judge_batch(REQUESTS, batch_size=1)


@pytest.mark.parametrize("nonsense", [None, "safe", {"label": "safe"}])
def test_a_judge_that_returns_no_verdict_has_failed(nonsense: Any) -> None:
    with pytest.raises(JudgeError, match="instead of a Verdict"):
        front_door(judge=Broken(nonsense), config=SafeCoDeConfig()).chat(picture(), PROMPT, max_new_tokens=2)


def test_a_judge_cannot_switch_the_policy_off() -> None:
    smuggled = Verdict("unknown", policy="no_bias")
    with pytest.raises(JudgeError):
        front_door(judge=Broken(smuggled), config=SafeCoDeConfig()).chat(picture(), PROMPT, max_new_tokens=2)
    with pytest.raises(JudgeError):
        front_door(config=SafeCoDeConfig()).chat(picture(), PROMPT, verdict=smuggled, max_new_tokens=2)


def test_a_verdict_or_judge_that_nothing_would_use_is_refused() -> None:
    sc = front_door(config=SafeCoDeConfig("contrast_only"), judge=None)
    with pytest.raises(ConfigError, match="judge is given"):
        sc.chat(picture(), PROMPT, judge="unsafe", max_new_tokens=2)
    with pytest.raises(ConfigError, match="verdict is given"):
        sc.chat(picture(), PROMPT, verdict=Verdict("unsafe"), max_new_tokens=2)
    with pytest.raises(ConfigError, match="judge is given"):
        front_door(config=SafeCoDeConfig("vcd"), judge="unsafe")


@pytest.mark.parametrize("config", [CONFIG, CONFIG.replace(lambda_boost=0.0)])
def test_an_unsafe_verdict_without_effect_says_so_even_when_its_bias_is_zero(
    config: SafeCoDeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    result = front_door(config=config).chat(picture(), PROMPT, verdict=Verdict("unsafe", 0.5), max_new_tokens=4)
    assert result.steering_effective is False
    assert "1 of 1 answers open with no refusal" in caplog.text


def test_token_ids_hold_no_padding_however_a_row_ended() -> None:
    sc = front_door()
    free = sc.chat_batch(REQUESTS, max_new_tokens=10)
    end = free[0].token_ids[2]
    stopped = sc.chat_batch(REQUESTS, max_new_tokens=10, eos_token_id=[end])
    assert stopped[0].token_ids == free[0].token_ids[: free[0].token_ids.index(end) + 1]
    for whole, cut in zip(free, stopped, strict=True):
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


def test_the_plain_probability_is_the_same_in_both_ways_of_picking() -> None:
    sc = front_door()
    mode: dict[str, Any] = dict(seed=4, max_new_tokens=1, do_sample=True, temperature=0.5)
    fused = sc.chat(picture(), PROMPT, **mode)
    scored = sc.chat(picture(), PROMPT, suppress_tokens=[7], **mode)
    assert fused.record is not None and scored.record is not None
    assert fused.record[0].token_id == scored.record[0].token_id
    assert fused.record[0].p_plain == pytest.approx(scored.record[0].p_plain, rel=1e-5)


def test_the_audit_repeats_the_answer() -> None:
    sc = front_door()
    arguments = dict(max_new_tokens=7, do_sample=True, temperature=1.4)
    first = sc.chat(picture(), PROMPT, **arguments)
    line = json.loads(json.dumps(first.audit()))
    config = SafeCoDeConfig(line["preset"], **line["settings"])
    assert config.digest() == line["config_digest"]
    again = front_door(config=config).chat(picture(), PROMPT, seed=line["seed"], **line["generation"])
    assert again.text == line["text"] and again.token_ids == first.token_ids
    (failed,) = sc.chat_batch([{"image": b"", "prompt": PROMPT}])
    assert failed.seed is None and failed.audit()["seed"] is None


def test_judge_batch_checks_its_batch_size() -> None:
    for size in (0, -1):
        with pytest.raises(ConfigError, match="batch_size"):
            front_door().judge_batch(REQUESTS, batch_size=size)


def test_an_unexpected_error_while_preparing_is_its_requests_own(monkeypatch: pytest.MonkeyPatch) -> None:
    sc = front_door()
    build = sc.builder.build

    def fails_on_the_second(images: Any, dialogue: Any) -> Any:
        if dialogue.request == "second":
            raise ValueError("the processor's own")
        return build(images, dialogue)

    monkeypatch.setattr(sc.builder, "build", fails_on_the_second)
    requests = [REQUESTS[0], REQUESTS[1] | {"prompt": "second"}, REQUESTS[2]]
    results = sc.chat_batch(requests, max_new_tokens=3)
    assert [type(r.error) for r in results] == [type(None), ValueError, type(None)]


def test_a_stream_whose_judge_failed_writes_nothing() -> None:
    stream = front_door(judge=Broken(JudgeError("down")), config=SafeCoDeConfig()).stream(
        picture(), PROMPT, max_new_tokens=5, eos_token_id=-1
    )
    pieces: list[str] = []
    with pytest.raises(JudgeError, match="down"):
        pieces.extend(stream)
    assert pieces == []
