"""Steered decoding equals the method written out by hand, for every family, in both ways of picking a token."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from naive import NaiveSteering, last_logits, naive_generate
from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.families import placeholder_ids
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.loop import SteeredGeneration
from safecode_mllm.judges.protocol import Verdict
from tiny_models import FAMILY_NAMES, TinyModel, noised_copy, tiny_model
from tiny_parts import EOS, IMAGE
from tiny_refusal import TinyTrie

NEW_TOKENS = 9
# The float32 noise floor of one branch is 4e-6 (other batch sizes, other matrix kernels), and contrast adds up two.
LOGIT_TOLERANCE = 2e-5
VERDICTS = [Verdict("unsafe", 0.9), Verdict("safe", 0.2)]


@cache
def model_of(name: str) -> TinyModel:
    return tiny_model(name)


def steered(tiny: TinyModel, clean: Any, config: SafeCoDeConfig, **options: Any) -> SteeredGeneration:
    rows = clean["input_ids"].shape[0]
    guidance = Guidance(config, [True] * rows, TinyTrie())
    return SteeredGeneration(
        clean, noised_copy(clean), guidance, verdict_source=lambda branches: VERDICTS[:rows], **options
    )


@pytest.mark.parametrize("beta", [0.0, 0.1], ids=["dense", "plausible"])
@pytest.mark.parametrize("rng", ["torch", "philox"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_equals_the_naive_two_branch_loop(name: str, rng: Any, beta: float) -> None:
    tiny = model_of(name)
    clean = tiny.prompts(2, extra=(0, 3))
    config = SafeCoDeConfig(contrast_weight=0.8, plausibility_beta=beta, lambda_boost=2.0, lambda_supp=1.5)
    loop = steered(tiny, clean, config, rng=rng)
    output = loop.generate(
        tiny.model, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, eos_token_id=-1,
        return_dict_in_generate=True, output_scores=rng == "torch",
    )  # fmt: skip
    assert loop.guidance.bias == pytest.approx([2.0 * 0.8, -1.5 * 0.6])
    naive = NaiveSteering(0.8, beta, 5, loop.guidance.bias, TinyTrie(), tuple(placeholder_ids(tiny.model)))
    ids, scores = naive_generate(tiny.model, clean, noised_copy(clean), naive, NEW_TOKENS)
    assert torch.equal(output.sequences, ids)
    if rng == "torch":
        for ours, wanted in zip(output.scores, scores, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_asking_on_the_cache_equals_asking_from_scratch_and_leaves_no_trace(name: str) -> None:
    tiny = model_of(name)
    clean = tiny.prompts(2, extra=(0, 3))
    suffixes, hidden = [[33, 44, 55, 66], [71, 72]], [2, 0]

    def prefilled() -> tuple[Branches, torch.Tensor]:
        branches = Branches(tiny.model, clean, noised_copy(clean), DynamicCache())
        return branches, branches.prefill()[0]

    with torch.no_grad():
        branches, _ = prefilled()
        asked = branches.ask(suffixes, hidden, [0, 1])
        untouched = branches.step(torch.tensor([20, 21]))[0]
        alone, _ = prefilled()
        expected = alone.step(torch.tensor([20, 21]))[0]
    assert torch.equal(untouched, expected)
    for row, (suffix, drop) in enumerate(zip(suffixes, hidden, strict=True)):
        alone_inputs = tiny.prompts(2, extra=(0, 3))
        ids = torch.cat([clean["input_ids"][:, : clean["input_ids"].shape[1] - drop], torch.tensor([suffix] * 2)], 1)
        shorter = _cut_columns(alone_inputs, drop)
        torch.testing.assert_close(
            asked[row].float(), last_logits(tiny.model, shorter, ids)[row], rtol=0, atol=LOGIT_TOLERANCE
        )


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_other_words_after_a_rewind_equal_those_words_from_scratch(name: str) -> None:
    tiny = model_of(name)
    clean = tiny.prompts(2, extra=(0, 3))
    noised = noised_copy(clean)
    with torch.no_grad():
        branches = Branches(tiny.model, clean, noised, DynamicCache())
        branches.prefill()
        branches.step(torch.tensor([[20, 21, 22], [30, 31, 32]]))
        branches.rewind(4)  # one column of the prompt too
        words = torch.tensor([[40, 41], [50, 51]])
        got = branches.step(words)
        more = branches.step(torch.tensor([60, 61]))
    ids = torch.cat([clean["input_ids"][:, :-1], words], 1)
    for ids_, logits in ((ids, got), (torch.cat([ids, torch.tensor([[60], [61]])], 1), more)):
        for inputs, ours in zip((clean, noised), logits, strict=True):
            wanted = last_logits(tiny.model, _cut_columns(inputs, 1), ids_)
            torch.testing.assert_close(ours, wanted, rtol=0, atol=LOGIT_TOLERANCE)


def _cut_columns(inputs: dict[str, torch.Tensor], drop: int) -> dict[str, torch.Tensor]:
    keys = ("input_ids", "attention_mask", "mm_token_type_ids", "image_attention_mask")
    return {key: value[:, : value.shape[1] - drop] if key in keys else value for key, value in inputs.items()}


@pytest.mark.parametrize("rng", ["torch", "philox"])
def test_steered_rows_never_write_an_image_token(rng: Any) -> None:
    tiny = model_of("llava")
    clean = tiny.prompts(1)
    head = tiny.model.get_output_embeddings().weight
    with torch.no_grad():
        head[IMAGE] = 10 * head[EOS]
        plain = SafeCoDeConfig(contrast_weight=0.0, plausibility_beta=0.0, bias_form="none")
        unsteered = Branches(tiny.model, clean, None, DynamicCache()).prefill()[0]
        head[IMAGE] *= 100 * torch.sign(unsteered[0, IMAGE])  # certainly the best token
        boosted = Branches(tiny.model, clean, None, DynamicCache()).prefill()[0]
        assert boosted.argmax(-1).item() == IMAGE
        for config, banned in ((plain, False), (SafeCoDeConfig(contrast_weight=0.5, bias_form="none"), True)):
            loop = SteeredGeneration(clean, noised_copy(clean), Guidance(config, [True]), rng=rng)
            out = loop.generate(tiny.model, max_new_tokens=1)
            assert (out[0, -1].item() == IMAGE) is not banned
        head[IMAGE] = 0.0


def test_paper_scale_is_the_papers_formula() -> None:
    """z - alpha n + lambda on the refusal tokens, in the scores that a user's processors see."""
    tiny = model_of("llava")
    clean = tiny.prompts(2)
    alpha = 0.3
    config = SafeCoDeConfig("paper", noise_space="model", lambda_boost=2.0, refusal_tokens="phrase_trie", bias_scope=0)
    loop = steered(tiny, clean, config)
    output = loop.generate(tiny.model, max_new_tokens=1, return_dict_in_generate=True, output_scores=True)
    z = last_logits(tiny.model, clean, clean["input_ids"])
    n = last_logits(tiny.model, noised_copy(clean), clean["input_ids"])
    wanted = z - alpha * n
    trie = TinyTrie()
    wanted[0, trie.allowed(trie.start)] += 2.0
    wanted[1, trie.allowed(trie.start)] -= 1.0
    wanted[:, placeholder_ids(tiny.model)] = -torch.inf
    torch.testing.assert_close(output.scores[0], wanted, rtol=0, atol=LOGIT_TOLERANCE)


def test_all_steps_keeps_the_noised_rows_to_the_end() -> None:
    tiny = model_of("qwen2_5_vl")
    clean = tiny.prompts(2, extra=(0, 2))
    config = SafeCoDeConfig(contrast_weight=1.0, plausibility_beta=0.1, bias_form="none", steps="all")
    out = SteeredGeneration(clean, noised_copy(clean), Guidance(config, [True, True])).generate(
        tiny.model, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, eos_token_id=-1
    )
    naive = NaiveSteering(1.0, 0.1, NEW_TOKENS, banned=tuple(placeholder_ids(tiny.model)))
    assert torch.equal(out, naive_generate(tiny.model, clean, noised_copy(clean), naive, NEW_TOKENS)[0])


def test_a_row_that_is_not_steered_decodes_as_stock_beside_one_that_is() -> None:
    tiny = model_of("llava_next")
    clean = tiny.prompts(2, extra=(0, 3))
    config = SafeCoDeConfig(contrast_weight=1.0, plausibility_beta=0.1, lambda_boost=3.0)
    guidance = Guidance(config, [True, False], TinyTrie())
    loop = SteeredGeneration(clean, noised_copy(clean), guidance, verdict_source=lambda b: [VERDICTS[0], None])
    arguments = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, eos_token_id=-1)
    out = loop.generate(tiny.model, **arguments)
    stock = tiny.model.generate(**clean, **arguments)
    assert torch.equal(out[1], stock[1])
    assert not torch.equal(out[0], stock[0])


def test_record_holds_both_probabilities() -> None:
    tiny = model_of("llava")
    clean = tiny.prompts(1)
    loop = steered(tiny, clean, SafeCoDeConfig(contrast_weight=0.8, lambda_boost=2.0), rng="philox", record=True)
    loop.generate(tiny.model, max_new_tokens=8, min_new_tokens=8, eos_token_id=-1)
    (tokens,) = loop.report.guided
    assert len(tokens) == 5
    z = last_logits(tiny.model, clean, clean["input_ids"])
    assert tokens[0].p_plain == pytest.approx(float(z.softmax(-1)[0, tokens[0].token_id]), abs=1e-6)
    assert all(0 < token.p_steered <= 1 and token.n_kept >= 1 for token in tokens)
    assert set(loop.report.seconds) == {"prefill", "judge", "guided", "free"}


@pytest.mark.parametrize("rng", ["torch", "philox"])
def test_each_row_may_have_a_configuration_of_its_own(rng: Any) -> None:
    tiny = model_of("llava")
    clean = tiny.prompts(4, extra=(0, 3, 1, 0))
    noised = noised_copy(clean)
    configs = [
        SafeCoDeConfig(contrast_weight=0.8, steps=2, lambda_boost=2.0),
        SafeCoDeConfig(contrast_weight=0.2, plausibility_beta=0.0, steps=6, lambda_supp=1.5),
        SafeCoDeConfig("paper", steps=3, refusal_tokens="phrase_trie"),
        SafeCoDeConfig("verdict_only", steps="all", lambda_boost=3.0),
    ]
    verdicts = [Verdict("unsafe", 0.9), Verdict("safe", 0.2), Verdict("safe", 0.1), Verdict("unsafe", 0.8)]
    arguments = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "eos_token_id": -1}

    def run(rows: list[int]) -> torch.Tensor:
        guidance = Guidance([configs[row] for row in rows], [True] * len(rows), TinyTrie())
        generation = SteeredGeneration(
            {key: value[rows] for key, value in clean.items()},
            {key: value[rows] for key, value in noised.items()},
            guidance,
            verdict_source=lambda branches: [verdicts[row] for row in rows],
            rng=rng,
        )
        return generation.generate(tiny.model, **arguments)

    together = run([0, 1, 2, 3])
    for row in range(4):
        assert torch.equal(together[row : row + 1], run([row])), f"row {row}"
    assert len({tuple(row) for row in together[:, -NEW_TOKENS:].tolist()}) > 1
