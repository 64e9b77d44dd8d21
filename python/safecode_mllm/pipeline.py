"""The front door: an image and a question in, a context-aware answer out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from safecode_kernels import explain
from safecode_mllm.audit import generation_settings, request_context
from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.families import family_of
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.loop import SteeredGeneration, Verdicts
from safecode_mllm.errors import ConfigError, UnsupportedModelError
from safecode_mllm.generate_arguments import check_arguments, complete_arguments
from safecode_mllm.images import load_image
from safecode_mllm.judges import bind, make_judge
from safecode_mllm.judges.asking import ask_beside, ask_judge, settle
from safecode_mllm.judges.protocol import Judge, JudgeRequest, Verdict, is_remote
from safecode_mllm.judges.self_judge import SelfJudge
from safecode_mllm.loading import load_model
from safecode_mllm.prompts import PromptBuilder, collate
from safecode_mllm.refusal import RefusalTokens, refusal_tokens
from safecode_mllm.requests import ChatRequest, PreparedRequest, prepare_request, stack_noised
from safecode_mllm.results import ChatResult, Steering, log_ineffective
from safecode_mllm.streaming import ChatStream
from safecode_mllm.styling import with_style

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 8
Progress = Callable[[int, int], None]


class SafeCoDe:
    """A vision-language model with context-aware safety decoding.

    Args:
        model: a Hugging Face image-text-to-text model of a supported family.
        processor: its processor, with a chat template.
        judge: "self" (the model judges), "safe", "unsafe", a Judge, or None for no verdict.
        config: what to do with the logits; SafeCoDeConfig() is preset `safecode`.
        refusal: refusal tokens to use instead of the configuration's; for experiments.

    Raises:
        UnsupportedModelError: the model's class is not supported.
        PromptError: the processor has no chat template.
        ConfigError: a judge is given that the configuration would never ask.

    Source: SafeCoDe (arXiv 2509.19212).
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        judge: str | Judge | None = "self",
        config: SafeCoDeConfig | None = None,
        refusal: RefusalTokens | None = None,
    ):
        family_of(model)
        self.model = model.eval()
        self.processor = processor
        self.config = config or SafeCoDeConfig()
        self.builder = PromptBuilder(processor)
        self.judge = self._make_judge(judge)
        self.refusal = refusal
        if judge not in (None, "self") and not self.config.uses_verdict:
            raise ConfigError(_unused("judge", self.config))

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        judge: str | Judge | None = "self",
        config: SafeCoDeConfig | None = None,
    ) -> SafeCoDe:
        """Load model and processor from the hub or a folder.

        Args:
            id_or_path: a hub id, a folder, or "hazard-world" for the small trained model that ships with the package.
            device: where to run; the GPU if there is one.
            dtype: the weights' dtype; as stored on a GPU, float32 on a CPU.
            judge: see the class.
            config: see the class.

        Raises:
            ModelError: the model cannot be loaded; the message says what to check.
        """
        model, processor = load_model(id_or_path, device=device, dtype=dtype)
        return cls(model, processor, judge=judge, config=config)

    def explain(self) -> dict[str, str]:
        """Return which ways this object takes and why: model family, decode step, noised view, judge."""
        judge, contrast = self.judge, self.config.uses_contrast
        space = "what the image processor made of it" if self.config.noise_space == "model" else "the picture itself"
        return {
            "family": family_of(self.model).title,
            "decode_step": str(explain(device=self.model.device, dtype=self.model.dtype)),
            "noised_view": f"{self.config.noise} noise on {space}" if contrast else "none: contrast_weight is 0",
            "judge": judge.explain() if isinstance(judge, SelfJudge) else "none" if judge is None else judge.name,
        }

    def chat(
        self,
        image: Any,
        prompt: str,
        *,
        steering: Steering = "on",
        judge: str | Judge | None = None,
        verdict: Verdict | None = None,
        seed: int | None = None,
        record: bool = True,
        **generate_kwargs: Any,
    ) -> ChatResult:
        """Answer one request.

        Args:
            image: path, bytes, PIL image or array: PNG, JPEG, WEBP, GIF, BMP or TIFF, at most 50 megapixels and 64 MB.
            prompt: the user's text.
            steering: "off" decodes as the plain model would.
            judge: a judge for this request instead of the object's.
            verdict: a verdict to use instead of asking a judge.
            seed: integer in [0, 2^63); None draws one. It is in the result either way.
            record: keep the guided tokens with their probabilities.
            generate_kwargs: as for `model.generate`: max_new_tokens, do_sample, temperature, top_p, stop_strings, ...

        Raises:
            ImageError, PromptError: the request cannot be used; raised before the model runs.
            JudgeError: the judge failed, or its verdict is unknown, under policy "raise".
            DecodeError: the model's logits cannot be decoded.
        """
        request = ChatRequest(image, prompt, steering, seed, verdict)
        prepared = self._prepare(request, judge)
        return _raise_error(self._run([prepared], judge, record, generate_kwargs)[0])

    def chat_batch(
        self,
        requests: Sequence[ChatRequest | Mapping[str, Any]],
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        judge: str | Judge | None = None,
        record: bool = True,
        progress: Progress | None = None,
        **generate_kwargs: Any,
    ) -> list[ChatResult]:
        """Answer many requests, in order; what fails in one request is that result's `error`.

        Args:
            requests: mappings with the fields of ChatRequest: image, prompt, and optionally steering, seed, verdict.
            batch_size: requests per forward pass, at least 1.
            judge: a judge for all of them instead of the object's.
            record: keep the guided tokens with their probabilities.
            progress: called with (done, total) after each batch.
            generate_kwargs: as for `model.generate`, the same for all.

        Raises:
            ConfigError: a request has an unknown or missing key; raised before any work.
        """
        _check_batch_size(batch_size)
        todo = [ChatRequest.of(request) for request in requests]
        results: list[ChatResult] = []
        for start in range(0, len(todo), batch_size):
            results += self._run_chunk(todo[start : start + batch_size], judge, record, generate_kwargs)
            if progress is not None:
                progress(len(results), len(todo))
        return results

    def stream(self, image: Any, prompt: str, **chat_kwargs: Any) -> ChatStream:
        """Answer one request piece by piece: iterate over the text; the ChatResult is then in `.result`.

        Takes what `chat` takes. Image and prompt are checked here; errors of the model surface while iterating.
        """
        judge, record = chat_kwargs.pop("judge", None), chat_kwargs.pop("record", True)
        names = ("steering", "seed", "verdict")
        request = ChatRequest(image, prompt, **{name: chat_kwargs.pop(name) for name in names if name in chat_kwargs})
        prepared = self._prepare(request, judge)
        check_arguments(chat_kwargs)

        def run(streamer: Any, stop: Any) -> ChatResult:
            criteria = [*(chat_kwargs.get("stopping_criteria") or []), stop]
            arguments = dict(chat_kwargs, stopping_criteria=criteria)
            return _raise_error(self._run([prepared], judge, record, arguments, streamer)[0])

        return ChatStream(self.builder.tokenizer, run)

    def judge_batch(
        self,
        requests: Sequence[ChatRequest | Mapping[str, Any]],
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        judge: str | Judge | None = None,
    ) -> list[Verdict]:
        """Return the judge's verdict on each request, in order, without answering any; policies are not applied."""
        _check_batch_size(batch_size)
        chosen = self._judge(judge)
        if chosen is None:
            raise ConfigError("judge is None: pass judge='self' or a Judge")
        verdicts: list[Verdict] = []
        for start in range(0, len(requests), batch_size):
            chunk = [ChatRequest.of(request) for request in requests[start : start + batch_size]]
            verdicts += chosen.judge_many([JudgeRequest(load_image(r.image), r.prompt) for r in chunk])
        return verdicts

    def _run_chunk(
        self, requests: Sequence[ChatRequest], judge: str | Judge | None, record: bool, arguments: Mapping[str, Any]
    ) -> list[ChatResult]:
        """Answer one batch; requests that cannot be prepared become results with an error."""
        prepared: list[PreparedRequest | Exception] = []
        for request in requests:
            try:
                prepared.append(self._prepare(request, judge))
            except Exception as error:
                prepared.append(error)
        usable = [row for row in prepared if isinstance(row, PreparedRequest)]
        answered = iter(self._run_or_fail(usable, judge, record, arguments) if usable else [])
        return [
            next(answered) if isinstance(row, PreparedRequest) else _failed(request, row)
            for request, row in zip(requests, prepared, strict=True)
        ]

    def _run_or_fail(
        self,
        rows: Sequence[PreparedRequest],
        judge: str | Judge | None,
        record: bool,
        arguments: Mapping[str, Any],
    ) -> list[ChatResult]:
        """Generate for prepared rows; what breaks the whole batch is the error of each of its rows.

        The batches that are done already must not be lost to it. Arguments that no batch could work with still raise.
        """
        try:
            return self._run(rows, judge, record, arguments)
        except (ConfigError, UnsupportedModelError):
            raise
        except Exception as error:
            logger.warning("a batch of %d requests failed: %s: %s", len(rows), type(error).__name__, error)
            return [_failed(row.request, error) for row in rows]

    def _prepare(self, request: ChatRequest, judge: str | Judge | None) -> PreparedRequest:
        given = "judge" if judge is not None else "verdict" if request.verdict is not None else None
        if given and request.steering == "on" and not self.config.uses_verdict:
            raise ConfigError(_unused(given, self.config))
        wants_verdict = request.steering == "on" and self.config.uses_verdict and request.verdict is None
        if wants_verdict and self._judge(judge) is None:
            raise ConfigError(
                f"preset {self.config.preset!r} needs a verdict, but judge is None: "
                "pass judge='self', 'safe' or 'unsafe', a verdict, or a configuration with bias_form='none'"
            )
        return prepare_request(request, self.builder, self.config)

    def _run(
        self,
        rows: Sequence[PreparedRequest],
        judge: str | Judge | None,
        record: bool,
        arguments: Mapping[str, Any],
        streamer: Any = None,
    ) -> list[ChatResult]:
        """Generate for prepared rows as one batch."""
        check_arguments(arguments)
        noised = stack_noised(rows)
        refusal = self._refusal() if self.config.uses_verdict else None
        generation = SteeredGeneration(
            clean=self._to_device(collate([row.clean for row in rows], self.builder.pad_token_id)),
            noised=None if noised is None else self._to_device(collate(noised, self.builder.pad_token_id)),
            guidance=Guidance(self.config, [row.steered for row in rows], refusal),
            verdict_source=self._verdict_source(rows, self._judge(judge)) if self.config.uses_verdict else None,
            rng="philox",
            seeds=[row.seed for row in rows],
            streamer=streamer,
            tokenizer=self.builder.tokenizer,
            record=record,
            raise_row_errors=False,
        )
        completed = complete_arguments(arguments, self.model, self.builder.pad_token_id)
        output = generation.generate(self.model, **with_style(generation, completed, self.model))
        new_ids = output[:, generation.clean["input_ids"].shape[1] :].tolist()
        results = [self._result(row, index, new_ids[index], generation, record) for index, row in enumerate(rows)]
        for result in results:
            result.context["generation"] = generation_settings(arguments)
        log_ineffective(results)
        return results

    def _verdict_source(self, rows: Sequence[PreparedRequest], judge: Judge | None) -> Callable[[Branches], Verdicts]:
        """Ask the judge about the steered rows that bring no verdict of their own, with the policies applied."""
        asked = [index for index, row in enumerate(rows) if row.steered and row.request.verdict is None]
        requests = [rows[index].for_judge() for index in asked]
        # A judge elsewhere is asked now, while the prompt is prefilled; the loop waits only before the first token.
        pending = ask_beside(judge, requests, self.config) if judge is not None and is_remote(judge) else None

        def source(branches: Branches) -> Verdicts:
            answers: list[Verdict | Exception | None] = [None] * len(rows)
            for index, row in enumerate(rows):
                if row.steered and row.request.verdict is not None:
                    answers[index] = settle(row.request.verdict, self.config, name=row.request.verdict.judge)
            if judge is None:
                return answers
            if pending is not None:
                verdicts = pending()
            else:
                judge_many = judge.judge_many
                if isinstance(judge, SelfJudge) and judge.judges_with(self.model):
                    judge_many = partial(judge.read, branches, asked)
                verdicts = ask_judge(judge_many, requests, self.config, name=judge.name)
            for index, answer in zip(asked, verdicts, strict=True):
                answers[index] = answer
            return answers

        return source

    def _result(
        self,
        row: PreparedRequest,
        index: int,
        token_ids: list[int],
        generation: SteeredGeneration,
        record: bool,
    ) -> ChatResult:
        report = generation.report
        error = report.row_errors.get(index)
        verdict = report.verdicts[index]
        kept = token_ids[: report.lengths[index]]
        text = "" if error else self.builder.tokenizer.decode(kept, skip_special_tokens=True).strip()
        effective = None
        if row.steered and verdict is not None and verdict.asks_for_refusal and error is None:
            effective = self._refusal().starts_with_refusal(text)
        return ChatResult(
            text=text,
            verdict=verdict,
            steering=row.request.steering,
            steering_effective=effective,
            record=report.guided[index] if record else None,
            seed=row.seed,
            timings=dict(report.seconds),
            error=error,
            token_ids=[] if error else kept,
            context=request_context(row.image, row.request.prompt, self.config, self.model),
        )

    def _to_device(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        device, dtype = self.model.device, self.model.dtype
        return {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in inputs.items()}

    def _refusal(self) -> RefusalTokens:
        if self.refusal is None:
            vocab_size = self.model.get_output_embeddings().weight.shape[0]
            self.refusal = refusal_tokens(self.builder.tokenizer, vocab_size, self.config.refusal_tokens)
        return self.refusal

    def _judge(self, judge: str | Judge | None) -> Judge | None:
        return self.judge if judge is None else self._make_judge(judge)

    def _make_judge(self, judge: str | Judge | None) -> Judge | None:
        made = make_judge(judge)
        if made is not None:
            bind(made, self.model, self.builder)
        return made


def _raise_error(result: ChatResult) -> ChatResult:
    if result.error is not None:
        raise result.error
    return result


def _check_batch_size(batch_size: int) -> None:
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size must be an integer of at least 1, got {batch_size!r}")


def _failed(request: ChatRequest, error: Exception) -> ChatResult:
    return ChatResult("", None, request.steering, None, None, request.seed, {}, error)


def _unused(name: str, config: SafeCoDeConfig) -> str:
    return (
        f"{name} is given, but preset {config.preset!r} with these settings uses no verdict: leave {name} out, "
        "or choose a configuration with bias_form 'soft' or 'hard'"
    )
