"""The published judge functions, over the judges of this package."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

from safecode_mllm.compat.noise import open_picture
from safecode_mllm.errors import ConfigError, JudgeError, UnknownVerdictError
from safecode_mllm.judges import JUDGE_NAMES, Judge, JudgeRequest, make_judge
from safecode_mllm.judges.fixed import FIXED_LABELS

logger = logging.getLogger(__name__)

# The published names; every judge of this package may be set too.
AVAILABLE_JUDGES = ("gpt4o", "qwen")
GPT_JUDGE = "openai:gpt-4o"
QWEN_JUDGE_MODEL = "Qwen/Qwen3-VL-8B-Instruct"

_NAMES = (*AVAILABLE_JUDGES, *FIXED_LABELS)
_FORMS = tuple(name for name in JUDGE_NAMES if ":" in name)

_active: dict[str, Any] = {"name": AVAILABLE_JUDGES[0], "judge": None}


def set_judge(name: str | Judge) -> None:
    """Choose who judges from now on.

    Args:
        name: "gpt4o" (OpenAI's endpoint, OPENAI_API_KEY is needed), "qwen" (a Qwen-VL on this machine, loaded at the
            first question), "safe", "unsafe", "openai:MODEL", "local:PATH", "guard:NAME", or any object with `name` and
            `judge_many`.

    Raises:
        ConfigError: the name is unknown, or there is no key.
        ModelError: the model of a "local:" or "guard:" judge cannot be loaded.
    """
    if not isinstance(name, str):
        judge = make_judge(name)
        _active.update(name=name.name, judge=judge)
        return
    name = name or AVAILABLE_JUDGES[0]
    if name.lower() not in _NAMES and ":" not in name:
        raise ConfigError(f"judge={name!r} is unknown: pass one of {[*_NAMES, *_FORMS]}, or a judge")
    name = name.lower() if name.lower() in _NAMES else name
    # A missing key shows now, not thousands of samples later; weights that may not be needed can wait.
    judge = None if name == "qwen" else make_judge(GPT_JUDGE if name == "gpt4o" else name)
    _active.update(name=name, judge=judge)


def get_judge() -> str:
    """Return the name of the judge that was set."""
    return str(_active["name"])


def prepare_caption_and_verdict(image_path: str | os.PathLike[str], user_prompt: str) -> tuple[str, str]:
    """Ask the judge about one picture and one request.

    Returns:
        (what the judge described, or else the reason it gave, or else "", and "safe" or "unsafe").

    Raises:
        JudgeError: the judge failed.
        UnknownVerdictError: its reply cannot be read; it is never taken for "safe".
    """
    if _active["name"] == "qwen":
        return prepare_caption_and_verdict_qwen(image_path, user_prompt)
    if _active["judge"] is None:
        set_judge(_active["name"])
    return _ask(_active["judge"], image_path, user_prompt)


def prepare_caption_and_verdict_qwen(
    image_path: str | os.PathLike[str], user_prompt: str, model_repo: str = QWEN_JUDGE_MODEL
) -> tuple[str, str]:
    """Have a model on this machine describe the picture and judge the request by the description.

    Args:
        model_repo: a folder or hub id of any model with a chat template, loaded once.

    Returns and raises as `prepare_caption_and_verdict` does.
    """
    return _ask(_local_judge(model_repo), image_path, user_prompt)


@cache
def _local_judge(model_repo: str) -> Judge:
    from safecode_mllm.judges.local import LocalJudge

    return LocalJudge(model_repo, protocol="two_step")


def _ask(judge: Judge, image_path: str | os.PathLike[str], user_prompt: str) -> tuple[str, str]:
    verdict = judge.judge_many([JudgeRequest(open_picture(image_path), user_prompt)])[0]
    logger.info("judge %r: %s", judge.name, verdict)
    if verdict.error is not None:
        raise JudgeError(f"judge {judge.name!r} failed: {verdict.error}")
    if verdict.label == "unknown":
        raise UnknownVerdictError(f"judge {judge.name!r} gave no verdict that can be read: {verdict.raw!r}")
    return verdict.caption or verdict.reason or verdict.raw or "", verdict.label
