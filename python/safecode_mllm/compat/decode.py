"""The two published decoding functions, by name and signature."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from safecode_mllm.compat.arguments import checked_steering
from safecode_mllm.compat.guided import (
    Column,
    Written,
    answering_tokens,
    best_phrase,
    columns_of,
    continue_freely,
    refusing_tokens,
)
from safecode_mllm.compat.model_types import ANSWER_MARKS, DEFAULT_MODEL_TYPE, Inputs, ModelType
from safecode_mllm.compat.model_types import model_type as published_type
from safecode_mllm.compat.noise import open_picture
from safecode_mllm.errors import ConfigError, ImageError, UnknownVerdictError
from safecode_mllm.judges.parsing import read_label

logger = logging.getLogger(__name__)

# What a verdict that cannot be read means. The published code takes it for "safe".
OnUnknown = Literal["raise", "treat_as_unsafe"]

# Guided text with one of these is taken for rubbish and decoding starts again; this one spoils even its first token.
_CORRUPTION_MARKS = ("|", "$", "MS")
_WORST_MARK = "|"
# Temperature and top-p of the free tokens.
_NATURAL = (0.8, 0.9)
_CONSERVATIVE = (0.7, 0.85)
# Fewer steps than this, and the published code takes the path for a safe verdict whatever the verdict says.
_PUBLISHED_MIN_STEPS = 2


@torch.no_grad()
def contrastive_decode_multistep_with_modulation(
    model: Any,
    processor: Any,
    tokenizer: Any,
    real_img_path: str | os.PathLike[str],
    neutral_img: Image.Image,
    conversation: str,
    verdict: str,
    refusal_prefixes: Sequence[str],
    model_type: str = DEFAULT_MODEL_TYPE,
    alpha: float = 0.8,
    max_steps: int = 2,
    top_k: int = 10,
    lambda_supp: float = 2.0,
    lambda_boost: float = 2.0,
    generate_rest: bool = True,
    total_max_new_tokens: int = 256,
    *,
    strict_published: bool = False,
    on_unknown: OnUnknown = "raise",
) -> tuple[Any, list[int]]:
    """Answer one question about one picture as the published code does, token for token, with one vision call.

    Args:
        model: a Hugging Face model of a supported family.
        processor: its processor.
        tokenizer: encodes the refusal prefixes; None for the processor's own.
        real_img_path: the picture.
        neutral_img: its noised view, of the same size, from `apply_gaussian_noise`.
        conversation: the user's text; special tokens in it are special, as in the published code.
        verdict: what the judge said: "safe", "unsafe", or a reply that says so.
        refusal_prefixes: openings of refusals: candidates of the forced phrase, and the tokens made less likely.
        model_type: "llava", "qwen", "instructionblip" or "idefics": the prompt and the lengths.
        alpha: weight of the noised view's logits; halved for a safe verdict.
        max_steps: guided tokens, at most; >= 0.
        top_k: how many phrases are ranked; it restricts no token.
        lambda_supp: a safe verdict multiplies the probability of refusal tokens by 1 - lambda_supp / 2, at least 0.
        lambda_boost: has no effect as long as one prefix gives a token.
        generate_rest: go on to the end of the answer.
        total_max_new_tokens: has no effect: the lengths follow from verdict and model type.
        strict_published: also decide as the published code does where that fails open (docs/compat.md).
        on_unknown: what a verdict that says neither or both means.

    Returns:
        (answer, ids int [L + N] of prompt and answer); without `generate_rest` (guided text, guided ids).

    Raises:
        ConfigError: an argument out of its range; the message names it.
        ImageError: the picture cannot be read, or the two views differ in size.
        UnknownVerdictError: the verdict cannot be read.
        UnsupportedModelError: the model's family is not supported.

    Source: behaviour of the published code of SafeCoDe (arXiv 2509.19212).
    """
    kind = published_type(model_type)
    plan = _plan(kind, verdict, max_steps, strict_published, on_unknown)
    steering = checked_steering(
        model, processor, tokenizer, refusal_prefixes, alpha, max_steps, top_k, lambda_supp, lambda_boost,
        strict=strict_published,
    )  # fmt: skip
    scene = _Scene(kind, model, processor, conversation, open_picture(real_img_path), neutral_img)
    guided = scene.guided_tokens(plan.forces_phrase, steering)
    shown = _shown(kind, processor, guided)
    logger.info("guided text for verdict %r: %r", verdict, shown)
    if not generate_rest:
        return shown, guided
    scene.written.columns = scene.columns_to_continue(guided, shown, plan.forces_phrase)
    arguments = kind.sampling(processor, *plan.sampling) | {kind.length_name: plan.length}
    output = continue_freely(scene.written, model, arguments)
    answer = _answer(processor, output, len(scene.prompt), strict=strict_published)
    logger.info("answer: %r", answer)
    return answer, output.tolist()


@torch.no_grad()
def contrastive_decode_multistep_no_verdict(
    model: Any,
    processor: Any,
    tokenizer: Any,
    real_img_path: str | os.PathLike[str],
    neutral_img: Image.Image,
    conversation: str,
    verdict: str,
    refusal_prefixes: Sequence[str],
    model_type: str = DEFAULT_MODEL_TYPE,
    total_max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_p: float = 0.9,
    *,
    strict_published: bool = False,
) -> tuple[str, list[int]]:
    """Answer one question by plain sampling: the published ablation without a verdict, which has no contrast either.

    Args:
        total_max_new_tokens: length of the answer; for "idefics" that of prompt and answer; for that and
            "instructionblip" a number below 1 means 1024.
        temperature: > 0.
        top_p: in (0, 1].
        strict_published: cut the answer out by word instead of by place, as the published code does.

    The other arguments are those of `contrastive_decode_multistep_with_modulation`; tokenizer, neutral_img, verdict and
    refusal_prefixes have no effect.

    Returns:
        (answer, ids of prompt and answer).

    Source: behaviour of the published code of SafeCoDe.
    """
    kind = published_type(model_type)
    inputs = _on_device(kind.prompt(processor, open_picture(real_img_path), conversation), model)
    length = total_max_new_tokens
    if not length or length < 1:
        length = kind.safe_length
    arguments = kind.sampling(processor, temperature, top_p) | {kind.length_name: length}
    output = model.generate(**inputs, **arguments)[0]
    return _answer(processor, output, inputs["input_ids"].shape[1], strict=strict_published), output.tolist()


@dataclass(frozen=True)
class _Plan:
    forces_phrase: bool
    length: int
    sampling: tuple[float, float]


def _plan(kind: ModelType, verdict: str, max_steps: int, strict: bool, on_unknown: OnUnknown) -> _Plan:
    """What follows from a verdict; the published code reads it in three ways for these three questions."""
    if not isinstance(verdict, str):
        raise ConfigError(f"verdict={verdict!r} is no text: pass what the judge said, 'safe' or 'unsafe'")
    if strict:
        forces = verdict.strip().lower() == "unsafe" and max_steps >= _PUBLISHED_MIN_STEPS
        short, natural = verdict.lower() == "unsafe", verdict == "safe"
    else:
        forces = short = _is_unsafe(verdict, on_unknown)
        natural = not forces
    return _Plan(forces, kind.unsafe_length if short else kind.safe_length, _NATURAL if natural else _CONSERVATIVE)


def _is_unsafe(verdict: str, on_unknown: OnUnknown) -> bool:
    label = read_label(verdict)
    if label != "unknown":
        return label == "unsafe"
    if on_unknown == "treat_as_unsafe":
        logger.warning("verdict=%r says neither safe nor unsafe: taken for unsafe", verdict)
        return True
    if on_unknown == "raise":
        raise UnknownVerdictError(
            f"verdict={verdict!r} says neither safe nor unsafe: ask the judge again, pass "
            "on_unknown='treat_as_unsafe', or strict_published=True to take it for safe as the published code does"
        )
    raise ConfigError(f"on_unknown={on_unknown!r} is unknown: pass 'raise' or 'treat_as_unsafe'")


class _Scene:
    """One question about one picture: its prompt in both branches, and how guided tokens are written behind it."""

    def __init__(
        self,
        kind: ModelType,
        model: Any,
        processor: Any,
        conversation: str,
        picture: Image.Image,
        noised_picture: Image.Image,
    ):
        if not isinstance(noised_picture, Image.Image):
            raise ImageError(f"neutral_img is a {type(noised_picture).__name__}: pass apply_gaussian_noise(picture)")
        self.kind, self.model, self.processor, self.conversation = kind, model, processor, conversation
        clean = _on_device(kind.prompt(processor, picture, conversation), model)
        self._noised = _on_device(kind.prompt(processor, noised_picture, conversation), model)
        if not torch.equal(clean["input_ids"], self._noised["input_ids"]):
            raise ImageError(
                f"neutral_img of size {noised_picture.size} gives other image tokens than real_img_path of size "
                f"{picture.size}: pass apply_gaussian_noise of the same picture"
            )
        self.prompt = columns_of(clean)
        self.written = Written(model, clean, self._noised)

    def guided_tokens(self, forces_phrase: bool, steering: Any) -> list[int]:
        """Return the guided ids."""
        tokenizer = self.processor.tokenizer
        if not forces_phrase:
            return answering_tokens(self._logits, steering, tokenizer)
        phrase = best_phrase(self._logits, steering, tokenizer)
        logger.info("refusal phrase: %r", phrase)
        if phrase is not None:
            ids = tokenizer.encode(phrase, add_special_tokens=False)
            return [token for token in ids if token not in steering.banned_ids][: steering.max_steps]
        return refusing_tokens(self._logits if self.kind.continued is None else self._logits_apart(), steering)

    def columns_to_continue(self, guided: list[int], shown: Any, forces_phrase: bool) -> list[Column]:
        """Return the columns to go on from: prompt and guided text, or less of it if that looks like rubbish."""
        columns = self.columns(guided)
        if not any(mark in shown for mark in _CORRUPTION_MARKS):
            return columns
        logger.warning("the guided text looks corrupt and is cut: %r", shown)
        if _WORST_MARK not in self.processor.tokenizer.decode(guided[0]):
            return self.columns(guided[:1])
        if self.kind.continued is None:
            return list(self.prompt)
        # Text that was tokenised again: an unsafe verdict writes it once more, a safe one cuts as many ids as tokens
        # were chosen, and leaves the mask of the images as long as it was, so that it moves.
        cut = len(columns) - len(guided)
        return columns if forces_phrase else [(columns[i][0], *columns[i + len(guided)][1:]) for i in range(cut)]

    def columns(self, guided: list[int]) -> list[Column]:
        """Return the columns of the prompt with the guided tokens behind it."""
        if not guided:
            return list(self.prompt)
        if self.kind.continued is None:
            return [*self.prompt, *((token,) for token in guided)]
        text = self.processor.tokenizer.decode(guided)
        return columns_of(self.kind.continued(self.processor, self.conversation, text))

    def _logits(self, guided: list[int]) -> tuple[Tensor, Tensor]:
        self.written.columns = self.columns(guided)
        clean, noised = self.written.logits()
        assert noised is not None
        return clean, noised

    def _logits_apart(self) -> Any:
        """Without a phrase the published code writes the guided text in two places: behind the prompt, and in it."""
        apart = Written(self.model, self._noised, None)

        def logits(guided: list[int]) -> tuple[Tensor, Tensor]:
            clean, _ = self._logits(guided)
            if guided and self.kind.continued is not None:
                conversation = f"{self.conversation} {self.processor.tokenizer.decode(guided)}"
                apart.columns = columns_of(self.kind.continued(self.processor, conversation, ""))
            return clean, apart.logits()[0]

        return logits


def _on_device(inputs: Any, model: Any) -> Inputs:
    return {key: value.to(model.device) for key, value in inputs.items()}


def _shown(kind: ModelType, processor: Any, guided: list[int]) -> Any:
    """The guided text as the published code decodes it; one call gives one text or many, by transformers' version."""
    if kind.shows_list:
        return processor.batch_decode(guided)
    texts = processor.batch_decode(guided, skip_special_tokens=True) if guided else [""]
    return texts[0].strip()


def _answer(processor: Any, output: Tensor, prompt_length: int, *, strict: bool) -> str:
    """Return the text behind the prompt; the published code cuts at the first of some words, wherever it stands."""
    whole = processor.tokenizer.decode(output, skip_special_tokens=True)
    prompt = processor.tokenizer.decode(output[:prompt_length], skip_special_tokens=True)
    if not strict and whole.startswith(prompt):
        return whole[len(prompt) :].strip()
    for mark in ANSWER_MARKS:
        if mark in whole:
            return whole.split(mark, 1)[1].strip()
    return whole
