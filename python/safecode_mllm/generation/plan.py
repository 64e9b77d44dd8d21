"""What a generation in somebody else's call of `generate` is steered with: checked once, applied to each batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.families import image_token_ids, logit_width
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.errors import ConfigError
from safecode_mllm.generate_arguments import config_in
from safecode_mllm.generation.noising import PIXELS, noised_batch
from safecode_mllm.generation.reading import prompts_of
from safecode_mllm.judges import FixedJudge, bind, make_judge
from safecode_mllm.judges.protocol import Judge, JudgeRequest, Verdict
from safecode_mllm.judges.self_judge import SelfJudge
from safecode_mllm.prompts import PromptBuilder
from safecode_mllm.refusal import RefusalTokens, refusal_tokens
from safecode_mllm.requests import SEED_BITS
from safecode_mllm.verdict_source import make_verdict_source

VerdictLike = Verdict | str
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Prepared:
    """One batch, ready to be steered.

    Attributes:
        config: the configuration that holds for it.
        clean: its inputs, on the model's device and in its dtype.
        guidance: steering state of its B rows.
        noised: its inputs with noised images; None when no contrast is needed.
        seeds: one per prompt, in [0, 2^63).
        verdict_source: called with the prefilled branches; None when no verdict is used.
    """

    config: SafeCoDeConfig
    clean: dict[str, Tensor]
    guidance: Guidance
    noised: dict[str, Tensor] | None
    seeds: list[int]
    verdict_source: Callable[[Branches], list[Verdict | Exception | None]] | None


class SteeringPlan:
    """The arguments that `generate_fn` and `SafeCoDeLogitsProcessor` share; see `generate_fn` for their meaning."""

    def __init__(
        self,
        processor: Any,
        *,
        verdict: VerdictLike | Sequence[VerdictLike] | None = None,
        judge: str | Judge | None = "self",
        config: SafeCoDeConfig | None = None,
        seed: int | Sequence[int] | None = None,
        requests: JudgeRequest | Sequence[JudgeRequest] | None = None,
        noised: Inputs | None = None,
        refusal: RefusalTokens | None = None,
    ) -> None:
        if processor is None:
            raise ConfigError("processor is None: pass the model's processor, which knows its tokens and its images")
        if config is not None and not isinstance(config, SafeCoDeConfig):
            raise ConfigError(f"config must be a SafeCoDeConfig, got {type(config).__name__}")
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.config, self.noised, self.refusal = config, noised, refusal
        self._seed = _check_seed(seed)
        self._verdicts = None if verdict is None else _each(verdict, (str, Verdict))
        if self._verdicts is not None:
            self._verdicts = [_as_verdict(each) for each in self._verdicts]
        self._requests = None if requests is None else _each(requests, JudgeRequest)
        self._judge = None if verdict is not None else make_judge(judge)
        # Each model gets a self-judge of its own.
        self._judges_itself = self._judge is not None and judge == "self"
        if config is not None:
            self._check(config)

    @property
    def is_seeded(self) -> bool:
        """Whether a seed was given."""
        return self._seed is not None

    def configuration(self, generation_config: Any = None) -> SafeCoDeConfig:
        """Return the configuration given, or that in the field `safecode` of a GenerationConfig, or the default."""
        config = self.config or config_in(generation_config) or SafeCoDeConfig()
        self._check(config)
        return config

    def prepare(self, model: Any, clean: Inputs, config: SafeCoDeConfig) -> Prepared:
        """Return one batch ready to be steered; everything wrong with it is found here, before the model runs.

        Args:
            model: a model of a supported family.
            clean: processor output of B prompts, left padded.
            config: as `configuration` returns it.
        """
        rows = clean["input_ids"].shape[0]
        if PIXELS not in clean and self.noised is None:
            # Nothing to contrast with; the verdict still applies.
            config = config.replace(contrast_weight=0.0)
        seeds = self._seeds(rows)
        noised = self._noised(model, clean, config, seeds) if config.uses_contrast else None
        clean = _for_model(clean, model)
        return Prepared(
            config=config,
            clean=clean,
            guidance=Guidance(config, [True] * rows, self._refusal(model, config)),
            noised=None if noised is None else _for_model(noised, model),
            seeds=seeds,
            verdict_source=self._verdict_source(model, clean, config) if config.uses_verdict else None,
        )

    def _check(self, config: SafeCoDeConfig) -> None:
        chosen = self._judge is not None and not self._judges_itself
        wanted = "verdict" if self._verdicts is not None else "judge" if chosen else None
        if wanted and not config.uses_verdict:
            raise ConfigError(
                f"{wanted} is given, but preset {config.preset!r} with these settings uses no verdict: leave it out, "
                "or choose a configuration with bias_form 'soft' or 'hard'"
            )
        if config.uses_verdict and self._verdicts is None and self._judge is None:
            raise ConfigError(
                f"preset {config.preset!r} needs a verdict, but judge is None: pass verdict='safe' or 'unsafe', a "
                "judge, or a configuration with bias_form='none'"
            )

    def _seeds(self, rows: int) -> list[int]:
        if isinstance(self._seed, list):
            return _fitting("seed", self._seed, rows)
        # Without a seed the noise follows torch's own, and takes no draw from it: sampling stays as it was.
        first = torch.initial_seed() if self._seed is None else self._seed
        return [(first + row) % 2**SEED_BITS for row in range(rows)]

    def _refusal(self, model: Any, config: SafeCoDeConfig) -> RefusalTokens | None:
        if not config.uses_verdict:
            return None
        return self.refusal or refusal_tokens(self.tokenizer, logit_width(model), config.refusal_tokens)

    def _noised(self, model: Any, clean: Inputs, config: SafeCoDeConfig, seeds: Sequence[int]) -> dict[str, Tensor]:
        if self.noised is not None:
            noised = {key: self.noised[key] for key in clean if key in self.noised}
            wrong = [key for key, value in clean.items() if key not in noised or noised[key].shape != value.shape]
            if not wrong and not torch.equal(noised["input_ids"].to(clean["input_ids"].device), clean["input_ids"]):
                wrong = ["input_ids"]
            if wrong:
                raise ConfigError(
                    f"noised does not fit the inputs in {', '.join(wrong)}: pass the processor's output for the same "
                    "prompts and for pictures of the same sizes"
                )
            return noised
        image_processor = getattr(self.processor, "image_processor", None)
        if image_processor is None:
            raise ConfigError(
                f"processor is a {type(self.processor).__name__} without an image processor, which the noise needs: "
                "pass the model's whole processor, or noised inputs, or a configuration with contrast_weight=0"
            )
        return noised_batch(clean, image_token_ids(model), image_processor, config, seeds)

    def _verdict_source(self, model: Any, clean: Inputs, config: SafeCoDeConfig) -> Any:
        rows = clean["input_ids"].shape[0]
        if self._verdicts is not None:
            given = self._verdicts * rows if len(self._verdicts) == 1 else self._verdicts
            return make_verdict_source(_fitting("verdict", given, rows), [], [], None, config, model)
        judge = SelfJudge() if self._judges_itself else self._judge
        assert judge is not None  # _check
        if isinstance(judge, FixedJudge):
            return make_verdict_source(judge.judge_many([None] * rows), [], [], None, config, model)  # type: ignore[list-item]
        builder = PromptBuilder(self.processor)
        bind(judge, model, builder)
        requests = self._requests_of(judge, builder, model, clean)
        return make_verdict_source([None] * rows, range(rows), requests, judge, config, model)

    def _requests_of(self, judge: Judge, builder: PromptBuilder, model: Any, clean: Inputs) -> list[JudgeRequest]:
        if self._requests is not None:
            return _fitting("requests", self._requests, clean["input_ids"].shape[0])
        reads_cache = isinstance(judge, SelfJudge) and judge.judges_with(model)
        if not reads_cache or judge.captioned or judge.contextual:  # type: ignore[attr-defined]
            raise ConfigError(
                f"judge {judge.name!r} needs pictures and prompts, and generate() has neither: pass "
                "requests=[JudgeRequest(image, prompt), ...], one per prompt"
            )
        texts = prompts_of(builder, clean["input_ids"], clean["attention_mask"], image_token_ids(model))
        # The model reads its own KV cache: it needs no picture.
        return [JudgeRequest(None, text) for text in texts]  # type: ignore[arg-type]


def _for_model(inputs: Inputs, model: Any) -> dict[str, Tensor]:
    device, dtype = model.device, model.dtype
    return {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in inputs.items()}


def _as_verdict(verdict: VerdictLike) -> Verdict:
    if isinstance(verdict, Verdict):
        return verdict
    if verdict not in ("safe", "unsafe"):
        raise ConfigError(f"verdict={verdict!r} is not legal: it must be 'safe', 'unsafe' or a Verdict")
    return Verdict(verdict)  # type: ignore[arg-type]


def _check_seed(seed: int | Sequence[int] | None) -> int | list[int] | None:
    seeds = list(seed) if isinstance(seed, list | tuple) else [] if seed is None else [seed]
    for each in seeds:
        if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < 2**SEED_BITS:
            raise ConfigError(f"seed must be an integer in [0, 2^{SEED_BITS}) or one per prompt, got {seed!r}")
    return seeds if isinstance(seed, list | tuple) else seed  # type: ignore[return-value]


def _each(value: Any, single: type | tuple[type, ...]) -> list[Any]:
    return [value] if isinstance(value, single) else list(value)


def _fitting(name: str, values: list[Any], rows: int) -> list[Any]:
    if len(values) != rows:
        raise ConfigError(f"{name} holds {len(values)} entries for {rows} prompts: pass one per prompt")
    return values
