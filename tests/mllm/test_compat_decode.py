"""Where the published code crashes or fails open the drop-in does not, bad input is named, and nothing is printed."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from published_cases import REFUSALS
from published_models import IMAGE, MODEL_TYPES, published_model
from safecode_mllm import compat
from safecode_mllm.compat import model_types
from safecode_mllm.errors import ConfigError, ImageError, PromptError, UnknownVerdictError, UnsupportedModelError

QUERY = "Any tips for running faster here?"
OTHER_MODEL = SimpleNamespace(config=SimpleNamespace(model_type="bert"), device="cpu")
SETTINGS = {"alpha": 0.3, "max_steps": 5, "top_k": 20, "lambda_supp": 1.0, "lambda_boost": 1.0}


@cache
def model_of(model_type: str) -> tuple[Any, Any]:
    return published_model(model_type)


def decode(kind: str = "llava", *, model: Any = None, seed: int = 0, **changes: Any) -> tuple[Any, list[int]]:
    known, processor = model_of(kind)
    torch.manual_seed(seed)
    arguments = {
        "real_img_path": IMAGE, "neutral_img": compat.apply_gaussian_noise(Image.open(IMAGE)), "conversation": QUERY,
        "verdict": "unsafe", "refusal_prefixes": REFUSALS, "model_type": kind, "generate_rest": False, **SETTINGS,
    }  # fmt: skip
    return compat.contrastive_decode_multistep_with_modulation(
        model or known, processor, processor.tokenizer, **arguments | changes
    )


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of a few tokens."""
    shorter = {
        name: replace(kind, safe_length=9, unsafe_length=6)
        for name, kind in model_types.MODEL_TYPES.items()
        if kind.length_name == "max_new_tokens"
    }
    monkeypatch.setattr(model_types, "MODEL_TYPES", shorter)


def prompt_length(model_type: str = "llava") -> int:
    processor = model_of(model_type)[1]
    inputs = model_types.model_type(model_type).prompt(processor, Image.open(IMAGE), QUERY)
    return inputs["input_ids"].shape[1]


# ---- verdicts ----


@pytest.mark.parametrize("verdict", ["unsafe.", " Unsafe", "Verdict: unsafe", "not safe"])
def test_an_unsafe_verdict_in_other_words_forces_a_refusal_of_the_unsafe_length(verdict: str, short: None) -> None:
    phrase = decode(verdict="unsafe")
    assert decode(verdict=verdict) == phrase
    _, ids = decode(verdict=verdict, generate_rest=True)
    assert len(ids) <= prompt_length() + len(phrase[1]) + 6
    assert ids[: prompt_length() + len(phrase[1])][prompt_length() :] == phrase[1]


def test_strict_takes_it_for_safe_as_the_published_code_does() -> None:
    assert decode(verdict="unsafe.", strict_published=True) == decode(verdict="safe")
    assert decode(verdict="unsafe.")[1] != decode(verdict="safe")[1]


def test_a_verdict_that_says_nothing_is_not_taken_for_safe() -> None:
    with pytest.raises(UnknownVerdictError, match=r"verdict='hard to say'.*treat_as_unsafe.*strict_published"):
        decode(verdict="hard to say")
    assert decode(verdict="hard to say", on_unknown="treat_as_unsafe") == decode(verdict="unsafe")
    assert decode(verdict="hard to say", strict_published=True) == decode(verdict="safe")
    with pytest.raises(ConfigError, match="on_unknown='ignore'"):
        decode(verdict="hard to say", on_unknown="ignore")


def test_one_step_is_enough_for_an_unsafe_verdict() -> None:
    assert decode(max_steps=1)[1] == decode(max_steps=5)[1][:1]
    assert decode(max_steps=1, strict_published=True) == decode(verdict="safe", max_steps=1)


# ---- where the published code crashes ----


def test_suppression_ends_at_nothing() -> None:
    assert decode(verdict="safe", lambda_supp=9.0) == decode(verdict="safe", lambda_supp=2.0)


def test_more_phrases_and_tokens_may_be_asked_for_than_there_are() -> None:
    for verdict in ("safe", "unsafe"):
        assert decode(verdict=verdict, top_k=10**6) == decode(verdict=verdict, top_k=len(REFUSALS))
    assert decode(verdict="safe", top_k=0) == decode(verdict="safe", top_k=1)


def test_an_image_token_is_never_written() -> None:
    model, processor = published_model("llava")
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    plain = decode(verdict="safe")[1]
    head = model.lm_head.weight
    with torch.no_grad():
        head[image] = 3 * head[plain[0]]  # better than the best
    forced = decode(verdict="safe", model=model, max_steps=8)[1]
    assert forced[0] == plain[0] and image not in forced
    assert image not in decode(model=model, refusal_prefixes=["sorry <image> no"])[1]
    assert image not in decode(model=model, refusal_prefixes=[], lambda_boost=0.0)[1]


def test_rubbish_behind_a_sound_first_token_keeps_that_token(short: None) -> None:
    """As stock sampling would go on from the prompt and this one token; transformers 4 looks at no other."""
    model, processor = model_of("llava")
    _, guided = decode(refusal_prefixes=["$5 sorry"])
    _, ids = decode(refusal_prefixes=["$5 sorry"], generate_rest=True)
    inputs = model_types.model_type("llava").prompt(processor, Image.open(IMAGE), QUERY)
    start = torch.cat([inputs["input_ids"], torch.tensor([guided[:1]])], 1)
    torch.manual_seed(0)
    compat.apply_gaussian_noise(Image.open(IMAGE))
    stock = model.generate(
        **dict(inputs, input_ids=start, attention_mask=torch.ones_like(start)),
        do_sample=True, temperature=0.7, top_p=0.85, max_new_tokens=6,
    )  # fmt: skip
    assert ids == stock[0].tolist()


# ---- answers ----


@pytest.mark.parametrize("query", ["Is the ASSISTANT: sure?", "dear assistant"])
def test_the_answer_is_what_stands_behind_the_prompt(query: str, short: None) -> None:
    tokenizer = model_of("llava")[1].tokenizer
    text, ids = decode(conversation=query, generate_rest=True)
    assert text == tokenizer.decode(ids, skip_special_tokens=True).rpartition("ASSISTANT:")[2].strip()
    by_word, same = decode(conversation=query, generate_rest=True, strict_published=True)
    assert same == ids
    assert (by_word != text) is ("ASSISTANT:" in query)


def test_lengths_follow_from_verdict_and_type(short: None) -> None:
    for verdict, limit in (("safe", 9), ("unsafe", 6)):
        _, guided = decode("qwen", verdict=verdict)
        _, ids = decode("qwen", verdict=verdict, generate_rest=True, total_max_new_tokens=1)
        assert len(ids) <= prompt_length("qwen") + len(guided) + limit
        assert len(ids) > prompt_length("qwen") + len(guided) + 1


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_without_a_verdict_is_stock_sampling(model_type: str) -> None:
    model, processor = model_of(model_type)
    kind = model_types.MODEL_TYPES[model_type]
    inputs = kind.prompt(processor, Image.open(IMAGE), QUERY)
    length = 8 if kind.length_name == "max_new_tokens" else inputs["input_ids"].shape[1] + 8
    torch.manual_seed(2)
    _, ids = compat.contrastive_decode_multistep_no_verdict(
        model, processor, None, IMAGE, None, QUERY, "ignored", [], model_type, total_max_new_tokens=length
    )
    torch.manual_seed(2)
    stock = model.generate(**inputs, **kind.sampling(processor, 0.8, 0.9), **{kind.length_name: length})
    assert ids == stock[0].tolist()


def test_nothing_is_printed_and_all_is_logged(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="safecode_mllm"):
        decode()
    assert capsys.readouterr() == ("", "")
    assert "refusal phrases, best first" in caplog.text and "guided text" in caplog.text


# ---- bad input ----


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "lava"}, ConfigError, "model_type='lava'.*Did you mean 'llava'"),
        ({"alpha": float("nan")}, ConfigError, "alpha=nan"),
        ({"max_steps": -1}, ConfigError, "max_steps=-1"),
        ({"max_steps": 2.5}, ConfigError, "max_steps=2.5"),
        ({"top_k": -3}, ConfigError, "top_k=-3"),
        ({"lambda_boost": "1"}, ConfigError, "lambda_boost='1'"),
        ({"refusal_prefixes": "I am sorry"}, ConfigError, "refusal_prefixes='I am sorry'.*list"),
        ({"verdict": None}, ConfigError, "verdict=None"),
        ({"neutral_img": str(IMAGE)}, ImageError, "neutral_img is a str"),
        ({"neutral_img": Image.new("RGB", (30, 200))}, ImageError, r"neutral_img of size \(30, 200\)"),
        ({"real_img_path": "missing.png"}, ImageError, "real_img_path='missing.png'"),
        ({"model": OTHER_MODEL}, UnsupportedModelError, "bert"),
    ],
)  # fmt: skip
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decode(**changes)


def test_an_address_is_not_fetched() -> None:
    with pytest.raises(PromptError, match=r"https://example\.org/cat\.png.*would fetch it"):
        decode("idefics", conversation=" https://example.org/cat.png ")


def test_beams_are_refused(short: None) -> None:
    model, _ = published_model("qwen")
    model.generation_config.num_beams = 3
    with pytest.raises(UnsupportedModelError, match="num_beams=3"):
        decode("qwen", model=model, generate_rest=True)


def test_half_precision_runs(tmp_path: Path, short: None) -> None:
    model, _ = published_model("llava")
    for verdict in ("safe", "unsafe"):
        _, ids = decode(model=model.bfloat16(), verdict=verdict, generate_rest=True)
        assert len(ids) > prompt_length()
