"""The support table, cell by cell: each family and mode equals the method written out without cache or batch.

`scripts/support_table.py` runs these tests on each version of transformers and writes what passed into docs/models.md.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers

from naive import NaiveSteering, first_ids, last_logits, naive_generate
from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding import kv, packed
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.encoder_branches import make_branches
from safecode_mllm.decoding.families import decoder_of, family_of, has_encoder, placeholder_ids
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.loop import SteeredGeneration
from safecode_mllm.errors import UnsupportedModelError
from safecode_mllm.judges.protocol import Verdict
from support_cells import CELLS, NEWEST
from tiny_models import TinyModel, noised_copy, tiny_model
from tiny_refusal import TinyTrie

NEW_TOKENS = 8
CONFIG = SafeCoDeConfig(contrast_weight=0.8, plausibility_beta=0.1, lambda_boost=2.0, lambda_supp=1.5, steps=4)
VERDICTS = [Verdict("unsafe", 0.9), Verdict("safe", 0.2)]
BIAS = [2.0 * 0.8, -1.5 * 0.6]
# The float32 noise floor of one branch is 1e-5 where logits spread over five units, and contrast adds up two.
LOGIT_TOLERANCE = 5e-5

Inputs = dict[str, torch.Tensor]


@cache
def model_of(name: str) -> TinyModel:
    return tiny_model(name, seed=3)  # with seed 0 Mllama repeats one word


@cache
def inputs_of(name: str, rows: int) -> tuple[Inputs, Inputs]:
    clean = model_of(name).prompts(rows, extra=(0, 3)[:rows])
    return clean, noised_copy(clean)


def naive_tokens(name: str, rows: int) -> torch.Tensor:
    model = model_of(name).model
    steering = NaiveSteering(0.8, 0.1, 4, BIAS[:rows], TinyTrie(), tuple(placeholder_ids(model)))
    return naive_generate(model, *inputs_of(name, rows), steering, NEW_TOKENS)[0]


def steered_tokens(name: str, rows: int, **arguments: Any) -> tuple[torch.Tensor, dict[str, str]]:
    generation = SteeredGeneration(
        *inputs_of(name, rows), Guidance(CONFIG, [True] * rows, TinyTrie()), lambda branches: VERDICTS[:rows]
    )
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "eos_token_id": -1}
    ids = generation.generate(model_of(name).model, **length, **arguments)
    return ids, generation.report.notes


def check_dynamic(name: str) -> None:
    assert torch.equal(steered_tokens(name, 1)[0], naive_tokens(name, 1))


def check_batch(name: str) -> None:
    ids, wanted = steered_tokens(name, 2)[0], naive_tokens(name, 2)
    assert torch.equal(ids, wanted)
    length = first_ids(model_of(name).model, inputs_of(name, 2)[0]).shape[1]
    assert not torch.equal(ids[0, length:], ids[1, length:]), "otherwise mixed up rows would not show"


def check_static(name: str) -> None:
    ids, notes = steered_tokens(name, 2, cache_implementation="static")
    assert notes["cache"] == "of fixed size"
    assert torch.equal(ids, naive_tokens(name, 2))


def check_packed(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "PACKED_MIN_PREFIX", 1)
        ids, notes = steered_tokens(name, 2)
    assert notes["prefill"].startswith("both branches in one row")
    assert torch.equal(ids, naive_tokens(name, 2))


@torch.no_grad()
def check_self_judge(name: str) -> None:
    """Questions of different length, two that begin alike, some behind a cut prompt, on the cache of a batch."""
    model, (clean, noised) = model_of(name).model, inputs_of(name, 2)
    suffixes = [[33, 44, 55, 66], [71, 72], [33, 44, 82], [81, 82, 83]]
    hidden, rows = [2, 0, 2, 1], [0, 1, 0, 1]
    branches = make_branches(model, clean, noised, kv.new_cache(model))
    branches.prefill()
    asked = branches.ask(suffixes, hidden, rows)
    for answer, suffix, drop, row in zip(asked, suffixes, hidden, rows, strict=True):
        wanted = logits_of_question(model, clean, suffix, drop)[row]
        torch.testing.assert_close(answer.float(), wanted, rtol=0, atol=LOGIT_TOLERANCE)
    # The question left no trace.
    tokens = torch.tensor([20, 21])
    ids = torch.cat([first_ids(model, clean), tokens[:, None]], 1)
    for logits, inputs in zip(branches.step(tokens), (clean, noised), strict=True):
        torch.testing.assert_close(logits.float(), last_logits(model, inputs, ids), rtol=0, atol=LOGIT_TOLERANCE)


def logits_of_question(model: Any, clean: Inputs, suffix: list[int], drop: int) -> torch.Tensor:
    kept = clean["input_ids"].shape[1] - drop
    along_tokens = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "image_attention_mask")
    along_tokens += ("cross_attention_mask",)
    cut = {key: value[:, :kept] if key in along_tokens else value for key, value in clean.items()}
    ids = torch.cat([cut["input_ids"], torch.tensor([suffix] * len(cut["input_ids"]))], 1)
    if has_encoder(decoder_of(model)) or family_of(model).reads_ahead:
        # Every token of the prompt sees the question, so it is part of it.
        ones = torch.ones(len(ids), len(suffix), dtype=torch.long)
        longer = dict(cut, input_ids=ids, attention_mask=torch.cat([cut["attention_mask"], ones], 1))
        if "token_type_ids" in longer:
            longer["token_type_ids"] = torch.zeros_like(ids)
        return last_logits(model, longer, first_ids(model, longer))
    return last_logits(model, cut, ids)


CHECKS = {
    "dynamic": check_dynamic,
    "batch": check_batch,
    "static": check_static,
    "packed": check_packed,
    "self_judge": check_self_judge,
}


@pytest.mark.parametrize(("family", "mode"), [(cell.family, cell.mode) for cell in CELLS if cell.tier == 1])
def test_tier_1_cell(family: str, mode: str) -> None:
    CHECKS[mode](family)


@pytest.mark.skipif(transformers.__version__ != NEWEST, reason=f"tier 2 is tested on transformers {NEWEST}")
@pytest.mark.parametrize(
    ("family", "mode"),
    [
        pytest.param(cell.family, cell.mode, marks=[pytest.mark.slow] if cell.mode == "batch" else [])
        for cell in CELLS
        if cell.tier == 2
    ],
)
def test_tier_2_cell(family: str, mode: str) -> None:
    CHECKS[mode](family)


@pytest.mark.skipif(transformers.__version__ != NEWEST, reason=f"tier 2 is tested on transformers {NEWEST}")
def test_a_language_model_with_an_encoder_returns_what_its_generate_returns_and_encodes_once() -> None:
    tiny = model_of("instructblip_t5")
    clean, noised = inputs_of("instructblip_t5", 2)
    passes: list[int] = []
    hooks = [
        module.register_forward_hook(lambda *call: passes.append(1))
        for module in (tiny.model.vision_model, tiny.model.language_model.encoder)
    ]
    generation = SteeredGeneration(clean, noised, Guidance(CONFIG, [True, True], TinyTrie()), lambda _: VERDICTS)
    arguments = {"max_new_tokens": 4, "num_return_sequences": 2, "do_sample": True, "return_dict_in_generate": True}
    ours = generation.generate(tiny.model, **arguments)
    for hook in hooks:
        hook.remove()
    assert len(passes) == 2, "one vision pass and one encoder pass, of both branches"
    stock = tiny.model.generate(**clean, **arguments)
    assert type(ours) is type(stock) and ours.sequences.shape[0] == stock.sequences.shape[0] == 4
    with pytest.raises(UnsupportedModelError, match="its language model has an encoder"):
        Branches(tiny.model, clean, noised, kv.new_cache(tiny.model))
