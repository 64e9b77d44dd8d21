"""The published judge functions, over the judges of this package."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

from safecode_mllm.compat.noise import open_picture
from safecode_mllm.errors import ConfigError, UnknownVerdictError
from safecode_mllm.judges import Judge, JudgeRequest, make_judge

logger = logging.getLogger(__name__)

# The published names; any other judge of this package may be set too.
AVAILABLE_JUDGES = ("gpt4o", "qwen")
GPT_JUDGE = "openai:gpt-4o"
QWEN_JUDGE_MODEL = "Qwen/Qwen3-VL-8B-Instruct"

_active: dict[str, Any] = {"name": AVAILABLE_JUDGES[0], "judge": None}


def set_judge(name: str | Judge) -> None:
    """Choose who judges from now on.

    Args:
        name: "gpt4o" (OpenAI's endpoint, OPENAI_API_KEY is needed), "qwen" (a Qwen-VL on this machine, loaded at the
            first question), or a judge: any object with `name` and `judge_many`.

    Raises:
        ConfigError: the name is unknown, or there is no key.
    """
    if not isinstance(name, str):
        judge = make_judge(name)
        assert judge is not None
        _active.update(name=judge.name, judge=judge)
        return
    lowered = (name or AVAILABLE_JUDGES[0]).lower()
    if lowered not in AVAILABLE_JUDGES:
        raise ConfigError(f"judge={name!r} is unknown: pass one of {list(AVAILABLE_JUDGES)}, or a judge object")
    # A missing key shows now, not thousands of samples later; gigabytes of weights can wait.
    _active.update(name=lowered, judge=make_judge(GPT_JUDGE) if lowered == "gpt4o" else None)


def get_judge() -> str:
    """Return the name of the judge that was set."""
    return str(_active["name"])


def prepare_caption_and_verdict(image_path: str | os.PathLike[str], user_prompt: str) -> tuple[str, str]:
    """Ask the judge about one picture and one request.

    Returns:
        (what the judge wrote, "safe" or "unsafe"). The judges of this package look at the picture themselves, so there
        is no caption; the first text is empty for a judge that reads probabilities.

    Raises:
        JudgeError: the judge failed.
        UnknownVerdictError: its reply cannot be read; it is never taken for "safe".
    """
    if _active["judge"] is None:
        if _active["name"] == "qwen":
            return prepare_caption_and_verdict_qwen(image_path, user_prompt)
        set_judge(_active["name"])
    return _ask(_active["judge"], image_path, user_prompt)


def prepare_caption_and_verdict_qwen(
    image_path: str | os.PathLike[str], user_prompt: str, model_repo: str = QWEN_JUDGE_MODEL
) -> tuple[str, str]:
    """Ask a model on this machine, loaded once per `model_repo`; returns and raises as `prepare_caption_and_verdict`.

    Args:
        model_repo: a folder or hub id of any model with a chat template; P(unsafe) is read from two letters, no text is
            written.
    """
    return _ask(_local_judge(model_repo), image_path, user_prompt)


@cache
def _local_judge(model_repo: str) -> Judge:
    from safecode_mllm.judges.self_judge import SelfJudge
    from safecode_mllm.loading import load_model
    from safecode_mllm.prompts import PromptBuilder

    model, processor = load_model(model_repo)
    return SelfJudge().bind(model.eval(), PromptBuilder(processor))


def _ask(judge: Judge, image_path: str | os.PathLike[str], user_prompt: str) -> tuple[str, str]:
    verdict = judge.judge_many([JudgeRequest(open_picture(image_path), user_prompt)])[0]
    logger.info("judge %r: %s", judge.name, verdict)
    if verdict.label not in ("safe", "unsafe"):
        raise UnknownVerdictError(f"judge {judge.name!r} gave no verdict that can be read: {verdict.raw or verdict}")
    return verdict.raw or "", verdict.label
