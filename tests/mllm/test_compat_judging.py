"""The published load and judge functions over this package's: no verdict is made up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines import picture
from safecode_mllm import compat
from safecode_mllm.compat import judging, loading
from safecode_mllm.errors import ConfigError, JudgeError, ModelError, SafeCoDeError, UnknownVerdictError
from safecode_mllm.judges import FixedJudge, Verdict
from safecode_mllm.judges.hf_models import JudgeModel
from safecode_mllm.judges.protocol import failed
from tiny_models import tiny_chat_model


@pytest.fixture(autouse=True)
def judge_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "_active", dict(judging._active))
    judging._local_judge.cache_clear()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    picture().save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


class Saying:
    """A judge that says what it is given, and keeps what it was asked."""

    name = "saying"

    def __init__(self, verdict: Verdict) -> None:
        self.verdict, self.asked = verdict, []

    def judge_many(self, requests: Any) -> list[Verdict]:
        self.asked += requests
        return [self.verdict]


def test_any_judge_can_be_set(path: Path) -> None:
    judge = Saying(Verdict("unsafe", raw="a cliff"))
    compat.set_judge(judge)
    assert compat.get_judge() == "saying"
    assert compat.prepare_caption_and_verdict(str(path), "How do I run faster?") == ("a cliff", "unsafe")
    assert judge.asked[0].prompt == "How do I run faster?" and judge.asked[0].image.size == picture().size
    compat.set_judge(FixedJudge("safe"))
    assert compat.prepare_caption_and_verdict(path, "hi") == ("", "safe")


def test_an_unreadable_reply_is_no_verdict(path: Path) -> None:
    compat.set_judge(Saying(Verdict("unknown", raw="hard to say")))
    with pytest.raises(UnknownVerdictError, match=r"'saying'.*hard to say"):
        compat.prepare_caption_and_verdict(path, "hi")


def test_a_judge_that_failed_gave_no_verdict(path: Path) -> None:
    compat.set_judge(Saying(failed("saying", "no connection")))
    with pytest.raises(JudgeError, match="no connection"):
        compat.prepare_caption_and_verdict(path, "hi")


def test_the_endpoint_asks_for_its_key_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(SafeCoDeError, match=r"OPENAI_API_KEY|openai is not installed"):
        compat.set_judge("gpt4o")
    compat.set_judge("unsafe")
    assert compat.get_judge() == "unsafe"


def test_unknown_judges_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"judge='gpt5'.*gpt4o"):
        compat.set_judge("gpt5")
    with pytest.raises(ConfigError, match="is no judge"):
        compat.set_judge(object())


def test_the_local_judge_is_loaded_once_at_the_first_question(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(name: str, **_: Any) -> Any:
        loaded.append(name)
        return JudgeModel(*tiny_chat_model("qwen3_vl"), sees=True)

    monkeypatch.setattr("safecode_mllm.judges.local.load_judge_model", load)
    monkeypatch.setattr("safecode_mllm.judges.letters.MIN_LETTER_MASS", 0.0)
    compat.set_judge("qwen")
    assert (compat.get_judge(), loaded) == ("qwen", [])
    first = compat.prepare_caption_and_verdict(path, "hi")
    assert first == compat.prepare_caption_and_verdict(path, "hi")
    assert first[0] and first[1] in ("safe", "unsafe")
    assert loaded == [judging.QWEN_JUDGE_MODEL]
    compat.prepare_caption_and_verdict_qwen(path, "hi", model_repo="another/model")
    assert loaded == [judging.QWEN_JUDGE_MODEL, "another/model"]


def test_models_load_as_the_drivers_ask(tmp_path: Path) -> None:
    model, processor = tiny_chat_model("llava_next")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, its_processor, tokenizer = compat.load_model(SimpleNamespace(model_type="LLaVA", model_path=str(tmp_path)))
    assert type(loaded) is type(model) and not loaded.training
    assert tokenizer is its_processor.tokenizer
    half = torch.float16 if torch.cuda.is_available() else torch.float32
    assert {weight.dtype for weight in loaded.parameters()} == {half}


def test_what_does_not_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model_type='blip'"):
        compat.load_model(SimpleNamespace(model_type="blip", model_path="x"))
    with pytest.raises(ModelError, match="no such folder"):
        compat.load_model(SimpleNamespace(model_type="qwen", model_path=str(tmp_path / "missing")))


def test_qwen_pictures_are_scaled_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def load(path: str, **arguments: Any) -> Any:
        seen.update(arguments)
        return tiny_chat_model("qwen2_5_vl")

    monkeypatch.setattr(loading.loading, "load_model", load)
    compat.load_model(SimpleNamespace(model_type="qwen", model_path="x"))
    assert seen["processor_arguments"] == {"min_pixels": 200704, "max_pixels": 200704}
