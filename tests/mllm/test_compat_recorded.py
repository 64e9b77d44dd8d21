"""The drop-in gives the ids that were recorded from the published code, with one vision call and nothing run twice."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from counting import counted
from published_cases import recorded
from published_models import DATA, IMAGE, MODEL_TYPES, published_model
from safecode_mllm import compat
from safecode_mllm.compat import model_types

GOLDEN = json.loads((DATA / "published_ids.json").read_text())
# The tokens of the published refusal prefixes, which the recording made less likely: as words, they give the same ids.
# The last one ends a text.
WORDS = (
    "I", "I'm", "I\u2019m", "am", "an", "a", "As", "AI", "Assistant", "It", "is", "not", "appropriate",
    "inappropriate", "allowed", "apologize", "cannot", "do", "Hello", "just", "language", "model", "Sorry", "sorry",
    "to", "unable", "</s>",
)  # fmt: skip
# What the recording chose from.
PHRASES = ("I am not allowed to", "apologize", "cannot", "Sorry", "I am unable to")
# Answers are compared as far as this many free tokens, the shortest limit; test_whole_recorded_answers has the rest.
CUT = 20


@cache
def model_of(model_type: str) -> tuple[Any, Any]:
    return published_model(model_type)


def decode(model_type: str, **arguments: Any) -> tuple[Any, list[int]]:
    model, processor = model_of(model_type)
    return compat.contrastive_decode_multistep_with_modulation(
        model, processor, processor.tokenizer, model_type=model_type, **arguments
    )


def golden_arguments(case: dict[str, Any], model_type: str) -> dict[str, Any]:
    model_of(model_type)  # building it draws from the generator that is seeded here
    torch.manual_seed(0)
    noised = compat.apply_gaussian_noise(Image.open(IMAGE), GOLDEN["noise_std"])
    torch.manual_seed(1)
    settings = ("alpha", "max_steps", "top_k", "lambda_supp", "lambda_boost")
    return {
        "real_img_path": IMAGE, "neutral_img": noised, "conversation": GOLDEN["query"], "verdict": case["verdict"],
        "refusal_prefixes": WORDS if case["verdict"] == "safe" else PHRASES,
    } | {name: GOLDEN[name] for name in settings}  # fmt: skip


def of_type(model_type: str) -> dict[str, Any]:
    return next(case for case in GOLDEN["cases"] if case["model_type"] == model_type)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_first_recording(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = of_type(model_type)
    whole = case["output_ids"]
    assert decode(model_type, **golden_arguments(case, model_type), generate_rest=False)[1] == case["guided_ids"]
    kind = model_types.MODEL_TYPES[model_type]
    start = len(case["prompt_ids"]) + len(case["guided_ids"])
    length = CUT if kind.length_name == "max_new_tokens" else start + CUT
    shorter = replace(kind, safe_length=length, unsafe_length=length)
    monkeypatch.setattr(model_types, "MODEL_TYPES", {model_type: shorter})
    assert decode(model_type, **golden_arguments(case, model_type))[1] == whole[: start + CUT]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_whole_recorded_answers(model_type: str) -> None:
    case = of_type(model_type)
    assert decode(model_type, **golden_arguments(case, model_type))[1] == case["output_ids"]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_recorded_cases(model_type: str, tmp_path: Path) -> None:
    cases = [(case, ids) for case, ids in recorded() if case.model_type == model_type]
    assert len(cases) >= 32
    model_of(model_type)
    for case, ids in cases:
        if case.depends_on_version and transformers.__version__.startswith("4."):
            continue  # recorded on version 5; tests/published compares on any
        arguments = case.arguments(tmp_path)
        assert decode(**arguments)[1] == ids, case.name


@pytest.mark.parametrize("verdict", ["safe", "unsafe"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_one_vision_call_and_one_cache(model_type: str, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both prompts in one pass, each guided step one column of two rows, then one row; the last token is never fed."""
    model, _ = model_of(model_type)
    prompt = len(of_type(model_type)["prompt_ids"])
    kind = model_types.MODEL_TYPES[model_type]
    limit = 3 if kind.length_name == "max_new_tokens" else prompt + 8
    monkeypatch.setattr(model_types, "MODEL_TYPES", {model_type: replace(kind, safe_length=limit, unsafe_length=limit)})
    arguments = golden_arguments({"verdict": verdict}, model_type)
    with counted(model) as counts:
        _, ids = decode(model_type, **arguments)
    passes = counts.passes
    assert counts.vision == 1
    assert passes[0] == (2, prompt)
    two_rows = [columns for rows, columns in passes[1:] if rows == 2]
    assert len(two_rows) <= (4 if verdict == "safe" else 0)
    # Where guided text is written into the prompt and read again, some columns are run again: its end, never the image.
    assert sum(columns for _, columns in passes) - prompt <= len(ids) - prompt - 1 + (6 if kind.continued else 0)
