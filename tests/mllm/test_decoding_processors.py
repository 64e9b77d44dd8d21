"""A user's logits processors, in the order of the method, on rows so peaked that the cut leaves one token."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList, WatermarkingConfig

from naive import last_logits
from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding.families import placeholder_ids
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.loop import SteeredGeneration
from safecode_mllm.decoding.processors import split_processors
from safecode_mllm.errors import DecodeError, UnsupportedModelError
from safecode_mllm.judges.protocol import Verdict
from tiny_models import TinyModel, noised_copy, tiny_model
from tiny_parts import EOS, PAD
from tiny_refusal import TinyTrie

SCORE_TOLERANCE = 5e-4  # logits of the peaked model are some 30 times larger than usual
CONFIG = SafeCoDeConfig(contrast_weight=0.5, plausibility_beta=0.1, lambda_boost=2.0)
PEAK = 30.0


@cache
def peaked_model() -> TinyModel:
    """Logits so far apart that beta 0.1 keeps the best token only."""
    tiny = tiny_model("llava")
    with torch.no_grad():
        tiny.model.get_output_embeddings().weight *= PEAK
    return tiny


def steered(clean: Any, **options: Any) -> SteeredGeneration:
    rows = clean["input_ids"].shape[0]
    guidance = Guidance(CONFIG, [True] * rows, TinyTrie())
    verdicts = [Verdict("unsafe")] * rows
    return SteeredGeneration(clean, noised_copy(clean), guidance, verdict_source=lambda branches: verdicts, **options)


def contrasted() -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """The prompt, its scores after contrast and bias, and the biased clean logits, by hand."""
    tiny = peaked_model()
    clean = tiny.prompts(1)
    z = last_logits(tiny.model, clean, clean["input_ids"])
    z[:, placeholder_ids(tiny.model)] = -torch.inf
    n = last_logits(tiny.model, noised_copy(clean), clean["input_ids"])
    scores, biased = 1.5 * z - 0.5 * n, z.clone()
    for tensor in (scores, biased):
        tensor[0, TinyTrie().allowed(TinyTrie.start)] += 2.0
    return clean, scores, biased


@cache
def best_token() -> int:
    _, _, biased = contrasted()
    kept = biased >= biased.max() + math.log(0.1)
    assert int(kept.sum()) == 1
    return int(biased.argmax())


# Every processor that transformers builds from generation arguments for a decoder; BEST is the token they attack.
BEST = "best"
BUILT_IN: dict[str, dict[str, Any]] = {
    "repetition_penalty": dict(repetition_penalty=1.5),
    "no_repeat_ngram": dict(no_repeat_ngram_size=1),
    "bad_words": dict(bad_words_ids=[[BEST]]),
    "min_new_tokens": dict(min_new_tokens=3, eos_token_id=[EOS, BEST]),
    "min_length": dict(min_length=200, eos_token_id=[EOS, BEST], max_length=300, max_new_tokens=None),
    "suppress": dict(suppress_tokens=[BEST]),
    "begin_suppress": dict(begin_suppress_tokens=[BEST]),
    "forced_eos": dict(forced_eos_token_id=7, max_new_tokens=1),
    "sequence_bias": dict(sequence_bias=[[[BEST], -500.0]]),
    "exponential_decay": dict(exponential_decay_length_penalty=(0, 1.5)),
    "prefix_allowed": dict(prefix_allowed_tokens_fn=lambda batch, ids: [11, 12, 13]),
    "remove_invalid": dict(remove_invalid_values=True),
    "renormalize": dict(renormalize_logits=True),
    "temperature": dict(do_sample=True, temperature=0.7),
    "top_k": dict(do_sample=True, top_k=3),
    "top_p": dict(do_sample=True, top_p=0.9),
    "min_p": dict(do_sample=True, min_p=0.05),
    "typical": dict(do_sample=True, typical_p=0.9),
    "epsilon": dict(do_sample=True, epsilon_cutoff=0.01),
    "eta": dict(do_sample=True, eta_cutoff=0.01),
    "top_h": dict(do_sample=True, top_h=0.4),
    "watermark": dict(watermarking_config=WatermarkingConfig(bias=2.5, seeding_scheme="lefthash")),
}


def with_best(value: Any) -> Any:
    if isinstance(value, list):
        return [with_best(item) for item in value]
    return best_token() if isinstance(value, str) and value == BEST else value


@pytest.mark.parametrize("rng", ["torch", "philox"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_processor_in_its_place(name: str, rng: Any) -> None:
    if name == "top_h" and not hasattr(transformers.GenerationConfig(), "top_h"):
        pytest.skip(f"transformers {transformers.__version__} has no top_h")
    clean, scores, biased = contrasted()
    seen: dict[str, Any] = {}

    class Spy(SteeredGeneration):
        def __call__(self, model: Any, input_ids: Any, logits_processor: Any, *rest: Any, **kwargs: Any) -> Any:
            seen["processors"], seen["ids"] = logits_processor, input_ids.clone()
            return super().__call__(model, input_ids, logits_processor, *rest, **kwargs)

    loop = Spy(**vars(steered(clean, rng=rng, seeds=[5])))
    mode = dict(max_new_tokens=2) | {key: with_best(value) for key, value in BUILT_IN[name].items()}
    torch.manual_seed(0)
    output = loop.generate(
        peaked_model().model, return_dict_in_generate=True, output_scores=True, pad_token_id=PAD, **mode
    )
    expected = scores
    split = split_processors(seen["processors"])
    for processor in split.before:
        expected = processor(seen["ids"], expected)
    allowed = expected > -torch.inf
    cut = torch.where(allowed, biased, -torch.inf).max() + math.log(0.1)
    expected = torch.where(allowed & (biased >= cut), expected, -torch.inf)
    for processor in split.after:
        expected = processor(seen["ids"], expected)
    assert seen["processors"], "transformers built no processor from these arguments"
    torch.testing.assert_close(output.scores[0], expected, rtol=0, atol=SCORE_TOLERANCE)
    assert torch.isfinite(output.scores[0][0, output.sequences[0, clean["input_ids"].shape[1]]])


def test_processors_that_leave_nothing_are_named() -> None:
    class Nothing(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return torch.full_like(scores, -torch.inf)

    for max_steps in (5, 1):  # inside the guided window, and in the free run
        clean = peaked_model().prompts(1)
        loop = steered(clean)
        loop.guidance = Guidance(CONFIG.replace(steps=max_steps), [True], TinyTrie())
        processors = LogitsProcessorList([LateProcessor(Nothing(), first_step=max_steps - 1)])
        with pytest.raises(DecodeError, match="LateProcessor"):
            loop.generate(peaked_model().model, max_new_tokens=8, eos_token_id=-1, logits_processor=processors)


class LateProcessor(LogitsProcessor):
    """Passes scores on until its step, then runs another processor on the rows asked for."""

    def __init__(self, inner: Any, first_step: int, rows: list[int] | None = None) -> None:
        self.inner, self.first_step, self.rows, self.step = inner, first_step, rows, -1

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.step += 1
        if self.step < self.first_step:
            return scores
        changed = self.inner(input_ids, scores)
        rows = range(len(scores)) if self.rows is None else self.rows
        return torch.stack([changed[row] if row in rows else scores[row] for row in range(len(scores))])


@pytest.mark.parametrize("rng", ["torch", "philox"])
@pytest.mark.parametrize("step", [2, 6], ids=["guided", "free"])
def test_a_row_that_fails_does_not_disturb_the_others(step: int, rng: Any) -> None:
    class Poison(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return torch.full_like(scores, -torch.inf)

    tiny = tiny_model("llava")
    clean = tiny.prompts(3, extra=(0, 2, 4))

    def generate(rows: list[int]) -> tuple[torch.Tensor, SteeredGeneration]:
        loop = steered(clean, rng=rng, seeds=[1, 2, 3], raise_row_errors=False)
        processors = LogitsProcessorList([LateProcessor(Poison(), step, rows)])
        torch.manual_seed(0)
        out = loop.generate(
            tiny.model, max_new_tokens=9, do_sample=True, eos_token_id=-1, pad_token_id=PAD, logits_processor=processors
        )
        return out, loop

    healthy, _ = generate([])
    hurt, loop = generate([1])
    assert list(loop.report.row_errors) == [1]
    assert f"row 1, step {step}" in str(loop.report.row_errors[1])
    assert torch.equal(hurt[[0, 2]], healthy[[0, 2]])
    length = clean["input_ids"].shape[1]
    assert torch.equal(hurt[1, : length + step], healthy[1, : length + step])


def test_a_processor_that_does_nothing_changes_no_token() -> None:
    """The fused step and scores mode run the same race."""

    class Nop(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores

    tiny = tiny_model("qwen2_5_vl")
    clean = tiny.prompts(2, extra=(0, 3))
    mode = dict(max_new_tokens=12, do_sample=True, temperature=1.3, top_k=40, top_p=0.9, eos_token_id=-1)

    def generate(processors: Any) -> tuple[torch.Tensor, str]:
        loop = steered(clean, rng="philox", seeds=[7, 8])
        return loop.generate(tiny.model, logits_processor=processors, **mode), loop.report.notes["decode_step"]

    fused, fused_note = generate(None)
    scored, scored_note = generate(LogitsProcessorList([Nop()]))
    assert torch.equal(fused, scored)
    assert "fused" in fused_note and "scores" in scored_note


def test_return_sequences_draw_from_streams_of_their_own() -> None:
    tiny = tiny_model("llava")
    clean = tiny.prompts(2)
    mode = dict(max_new_tokens=10, do_sample=True, temperature=1.5, num_return_sequences=3, eos_token_id=-1)
    out = steered(clean, rng="philox", seeds=[1, 1]).generate(tiny.model, **mode)
    first = out[:, clean["input_ids"].shape[1] :]
    assert len({tuple(row.tolist()) for row in first[:3]}) == 3
    single = steered(clean, rng="philox", seeds=[1, 1]).generate(tiny.model, **dict(mode, num_return_sequences=1))
    assert torch.equal(out[[0, 3]], single)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(num_beams=3), "num_beams=3"),
        (dict(prompt_lookup_num_tokens=1), "prompt_lookup_num_tokens=1"),
        (dict(prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens=3"),
        (dict(assistant_model=BEST), "assistant_model"),
    ],
)
def test_modes_that_cannot_be_steered_are_refused(arguments: dict[str, Any], words: str) -> None:
    tiny = peaked_model()
    arguments = {key: tiny.model if value == BEST else value for key, value in arguments.items()}
    with pytest.raises(UnsupportedModelError, match=words):
        steered(tiny.prompts(1)).generate(tiny.model, max_new_tokens=3, **arguments)


def test_philox_without_seeds_and_stop_strings_without_tokenizer_say_what_to_pass() -> None:
    tiny = peaked_model()
    with pytest.raises(ValueError, match="seeds="):
        steered(tiny.prompts(1), rng="philox").generate(tiny.model, max_new_tokens=2, do_sample=True)
    with pytest.raises(ValueError, match="tokenizer="):
        steered(tiny.prompts(1)).generate(tiny.model, max_new_tokens=2, stop_strings=["x"])
    with pytest.raises(ValueError, match="rng must be"):
        steered(tiny.prompts(1), rng="dice").generate(tiny.model, max_new_tokens=2)
    loop = steered(tiny.prompts(1))
    loop.noised = None
    with pytest.raises(ValueError, match="noised"):
        loop.generate(tiny.model, max_new_tokens=2)
