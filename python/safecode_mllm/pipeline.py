"""The front door: an image and a question in, a context-aware answer out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from typing import Any

import torch

from safecode_kernels import explain
from safecode_mllm.answering import Answerer
from safecode_mllm.batching import DEFAULT_BATCH_SIZE, BatchRunner, Progress, in_order, watched
from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.conversations import Dialogue
from safecode_mllm.decoding import kv
from safecode_mllm.decoding.families import decoder_of, family_of
from safecode_mllm.decoding.prefill import explain_prefill
from safecode_mllm.decoding.prefix_store import PrefixStore
from safecode_mllm.decoding.wrappers import unwrapped
from safecode_mllm.errors import ConfigError
from safecode_mllm.generate_arguments import check_arguments, config_in
from safecode_mllm.judges import bind, make_judge
from safecode_mllm.judges.protocol import Judge, Verdict
from safecode_mllm.lengths import check_fits
from safecode_mllm.loading import load_model
from safecode_mllm.processor_check import check_processor
from safecode_mllm.prompts import PromptBuilder
from safecode_mllm.refusal import RefusalTokens
from safecode_mllm.requests import ChatRequest, PreparedRequest, judge_request, prepare_request
from safecode_mllm.results import ChatResult, Steering
from safecode_mllm.streaming import ChatStream


class SafeCoDe:
    """A vision-language model with context-aware safety decoding.

    Args:
        model: a Hugging Face image-text-to-text model of a supported family.
        processor: its processor, with a chat template.
        judge: "self" (the model judges), "safe", "unsafe", a Judge, or None for no verdict.
        config: what to do with the logits; None takes the field `safecode` of the model's generation_config.json, or
            else preset `safecode`.
        refusal: refusal tokens to use instead of the configuration's; for experiments.
        prefix_store: keeps the text before the image from one request to the next; None keeps nothing.

    Raises:
        UnsupportedModelError: the model's class is not supported.
        PromptError: the processor has no chat template, or is that of another model.
        ConfigError: a judge is given that the configuration would never ask, or prefix_store is something else.

    Source: SafeCoDe (arXiv 2509.19212).
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        judge: str | Judge | None = "self",
        config: SafeCoDeConfig | None = None,
        refusal: RefusalTokens | None = None,
        prefix_store: PrefixStore | None = None,
    ):
        family_of(model)
        if prefix_store is not None and not isinstance(prefix_store, PrefixStore):
            kind = type(prefix_store).__name__
            raise ConfigError(f"prefix_store must be a PrefixStore, got {kind}: PrefixStore(max_bytes=2**28), say")
        self.model = unwrapped(model).eval()
        self.processor = processor
        self.config = config or config_in(getattr(model, "generation_config", None)) or SafeCoDeConfig()
        self.builder = PromptBuilder(processor)
        check_processor(self.model, self.builder)
        self.judge = self._make_judge(judge)
        self._answerer = Answerer(self.model, self.builder, refusal, prefix_store)
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
        prefix_store: PrefixStore | None = None,
    ) -> SafeCoDe:
        """Load model and processor from the hub or a folder.

        Args:
            id_or_path: a hub id, a folder, or "hazard-world" for the small trained model that ships with the package.
            device: where to run; the GPU if there is one.
            dtype: the weights' dtype; as stored on a GPU, float32 on a CPU.
            judge: see the class.
            config: see the class.
            prefix_store: see the class.

        Raises:
            ModelError: the model cannot be loaded; the message says what to check.
        """
        model, processor = load_model(id_or_path, device=device, dtype=dtype)
        return cls(model, processor, judge=judge, config=config, prefix_store=prefix_store)

    def explain(self) -> dict[str, str]:
        """Return which ways this object takes and why; what one generation did is in its result's `notes`."""
        judge, contrast = self.judge, self.config.uses_contrast
        explain_judge = getattr(judge, "explain", None)
        obstacle = kv.static_obstacle(decoder_of(self.model))
        space = "what the image processor made of it" if self.config.noise_space == "model" else "the picture itself"
        return {
            "family": family_of(self.model).title,
            "prefill": explain_prefill(self._answerer.prefix_store),
            "static_cache": f"not possible: {obstacle}" if obstacle else "with cache_implementation='static'",
            "decode_step": str(explain(device=self.model.device, dtype=self.model.dtype)),
            "noised_view": f"{self.config.noise} noise on {space}" if contrast else "none: contrast_weight is 0",
            "judge": "none" if judge is None else judge.name if explain_judge is None else explain_judge(),
        }

    def chat(
        self,
        image: Any,
        prompt: Any,
        *,
        steering: Steering = "on",
        judge: str | Judge | None = None,
        verdict: Verdict | None = None,
        config: SafeCoDeConfig | None = None,
        seed: int | None = None,
        record: bool = True,
        **generate_kwargs: Any,
    ) -> ChatResult:
        """Answer one request.

        Args:
            image: path, bytes, PIL image or array: PNG, JPEG, WEBP, GIF, BMP or TIFF, at most 50 megapixels and 64 MB.
                A list for several, each noised; None for a request of text alone, where only the verdict steers.
            prompt: the user's text; or a conversation, see ChatRequest.
            steering: "off" decodes as the plain model would.
            judge: a judge for this request instead of the object's.
            verdict: a verdict to use instead of asking a judge.
            config: a configuration for this request instead of the object's.
            seed: integer in [0, 2^63); None draws one. It is in the result either way.
            record: keep the guided tokens with their probabilities.
            generate_kwargs: as for `model.generate`: max_new_tokens, do_sample, temperature, top_p, stop_strings, ...

        Raises:
            ImageError, PromptError: the request cannot be used; raised before the model runs.
            JudgeError: the judge failed, or its verdict is unknown, under policy "raise".
            DecodeError: the model's logits cannot be decoded.
        """
        prepared = self._prepare(ChatRequest(image, prompt, steering, seed, verdict, config=config), judge)
        answer = partial(self._answerer.answer, record=record, arguments=generate_kwargs)
        return _raise_error(answer([prepared], self._judge(judge))[0])

    def chat_batch(
        self,
        requests: Sequence[ChatRequest | Mapping[str, Any]],
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        judge: str | Judge | None = None,
        record: bool = True,
        progress: bool | Progress | None = None,
        **generate_kwargs: Any,
    ) -> list[ChatResult]:
        """Answer many requests, in order; what fails in one request is that result's `error`.

        Args:
            requests: mappings with the fields of ChatRequest: image, prompt, and optionally steering, seed, verdict,
                config, max_new_tokens.
            batch_size: most requests per forward pass, at least 1; halved when memory runs out.
            judge: a judge for all of them instead of the object's.
            record: keep the guided tokens with their probabilities.
            progress: show a bar with rate and remaining time, or call with (done, total) after each request.
            generate_kwargs: as for `model.generate`, the same for all.

        Raises:
            ConfigError: a request has an unknown or missing key; raised before any work.
        """
        todo = [ChatRequest.of(request) for request in requests]
        options: dict[str, Any] = dict(batch_size=batch_size, judge=judge, record=record, progress=progress)
        return list(self.generate_many(todo, **options, **generate_kwargs))

    def generate_many(
        self,
        requests: Iterable[ChatRequest | Mapping[str, Any]],
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        as_completed: bool = False,
        judge: str | Judge | None = None,
        record: bool = True,
        progress: bool | Progress | None = None,
        **generate_kwargs: Any,
    ) -> Iterator[ChatResult]:
        """Yield the answers to a stream of requests; see `chat_batch` for the arguments that both take.

        Requests are taken as they are needed, a few batches at a time, and sorted into batches of one kind and similar
        length. The place of a result's request is in `index`.

        Args:
            requests: any iterable; whatever is wrong with a request, an unknown key too, is that result's `error`.
            batch_size: see `chat_batch`.
            as_completed: yield each result when it is there, instead of in the order of the requests.
            judge: see `chat_batch`.
            record: see `chat_batch`.
            progress: see `chat_batch`; the total is None if the iterable has no length.
            generate_kwargs: as for `model.generate`, the same for all.

        Raises:
            ConfigError: an argument cannot be used; raised before any work.
        """
        _check_batch_size(batch_size)
        check_arguments(generate_kwargs)
        answer = partial(self._answerer.answer, judge=self._judge(judge), record=record, arguments=generate_kwargs)
        prepare = partial(self._prepare, judge=judge)
        results = BatchRunner(prepare, answer, batch_size, self._answerer.pool.clear).run(requests)
        total = len(requests) if isinstance(requests, Sized) else None
        results = watched(results, total, progress)
        return results if as_completed else in_order(results)

    def stream(self, image: Any, prompt: Any, **chat_kwargs: Any) -> ChatStream:
        """Answer one request piece by piece: iterate over the text; the ChatResult is then in `.result`.

        Takes what `chat` takes. Image and prompt are checked here; errors of the model surface while iterating.
        """
        judge, record = chat_kwargs.pop("judge", None), chat_kwargs.pop("record", True)
        names = ("steering", "seed", "verdict", "config")
        request = ChatRequest(image, prompt, **{name: chat_kwargs.pop(name) for name in names if name in chat_kwargs})
        prepared = self._prepare(request, judge)
        check_arguments(chat_kwargs)

        def run(streamer: Any, stop: Any) -> ChatResult:
            criteria = [*(chat_kwargs.get("stopping_criteria") or []), stop]
            arguments = dict(chat_kwargs, stopping_criteria=criteria)
            answer = partial(self._answerer.answer, record=record, arguments=arguments, streamer=streamer)
            return _raise_error(answer([prepared], self._judge(judge))[0])

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
            verdicts += chosen.judge_many([judge_request(Dialogue.of(r.image, r.prompt)) for r in chunk])
        return verdicts

    def _prepare(self, request: ChatRequest, judge: str | Judge | None) -> PreparedRequest:
        config = request.config or self.config
        given = "judge" if judge is not None else "verdict" if request.verdict is not None else None
        if given and request.steering == "on" and not config.uses_verdict:
            raise ConfigError(_unused(given, config))
        wants_verdict = request.steering == "on" and config.uses_verdict and request.verdict is None
        if wants_verdict and self._judge(judge) is None:
            raise ConfigError(
                f"preset {config.preset!r} needs a verdict, but judge is None: "
                "pass judge='self', 'safe' or 'unsafe', a verdict, or a configuration with bias_form='none'"
            )
        prepared = prepare_request(request, self.builder, config)
        check_fits(prepared, self.model)
        return prepared

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


def _unused(name: str, config: SafeCoDeConfig) -> str:
    return (
        f"{name} is given, but preset {config.preset!r} with these settings uses no verdict: leave {name} out, "
        "or choose a configuration with bias_form 'soft' or 'hard'"
    )
