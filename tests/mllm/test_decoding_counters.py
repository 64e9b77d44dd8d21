"""No wasted token: what every family's vision tower, language model and output head process, to the position.

P prompt columns, C of them before the first image, T guided tokens, N tokens after them, R requests. The ideal is
R * (C + 2(P - C) + 2(T - 1) + 1 + (N - 1)) positions, plus the verdict's questions, what they begin with once: the last
token is never fed. Side by side the two branches share nothing, so that C is 0; packed they share what stands before
the image.
"""

from __future__ import annotations

from functools import cache
from itertools import takewhile
from typing import Any

import pytest
import torch

from counting import Counts, counted
from pipelines import PROMPT, chat_model, front_door, picture
from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding import kv, packed
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.families import FAMILIES
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.loop import SteeredGeneration
from safecode_mllm.judges.question import questions
from tiny_models import CHAT_NAMES, FAMILY_NAMES, IMAGE, TinyModel, noised_copy, tiny_model
from tiny_refusal import TinyTrie

T, N = 5, 4
CONFIG = SafeCoDeConfig(contrast_weight=0.8)
# Two questions that begin alike, and what one pass over both of them has: the beginning once, and each end.
SUFFIXES = [[33, 44, 55, 66], [33, 72]]
SUFFIX_COLUMNS = 1 + 3 + 1


@cache
def model_of(name: str) -> TinyModel:
    return tiny_model(name)


def ask(branches: Branches) -> list[None]:
    """A verdict source that asks two questions about every request, and gives no verdict."""
    rows = list(range(branches.rows))
    branches.ask([suffix for suffix in SUFFIXES for _ in rows], [0] * 2 * len(rows), rows * 2)
    return [None] * len(rows)


def generate(tiny: TinyModel, clean: dict[str, torch.Tensor], **arguments: Any) -> tuple[Counts, SteeredGeneration]:
    guidance = Guidance(CONFIG, [True] * len(clean["input_ids"]), TinyTrie())
    generation = SteeredGeneration(clean, noised_copy(clean), guidance, verdict_source=ask)
    with counted(tiny.model) as counts:
        generation.generate(tiny.model, max_new_tokens=T + N, min_new_tokens=T + N, **arguments)
    return counts, generation


@pytest.mark.parametrize("sharing", [False, True], ids=["side by side", "packed"])
@pytest.mark.parametrize(("rows", "kind"), [(1, None), (2, None), (2, "static")], ids=["one", "two", "fixed cache"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_position_is_needed(
    name: str, rows: int, kind: str | None, sharing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "PACKED_MIN_PREFIX", 1 if sharing else 10**9)
    tiny = model_of(name)
    clean = tiny.prompts(rows, extra=(0, 3)[:rows])
    counts, generation = generate(tiny, clean, cache_implementation=kind)
    columns, suffixes = clean["input_ids"].shape[1], (rows, SUFFIX_COLUMNS)
    sharing = sharing and FAMILIES[name].pixels is not None
    shared = int((clean["input_ids"] == IMAGE).any(0).nonzero()[0]) if sharing else 0
    assert (shared > 5) is sharing
    prompt = (rows, shared + 2 * (columns - shared)) if shared else (2 * rows, columns)
    assert counts.vision == 1
    assert counts.passes == [prompt, suffixes, *[(2 * rows, 1)] * (T - 1), *[(rows, 1)] * N]
    ideal = rows * (shared + 2 * (columns - shared) + 2 * (T - 1) + 1 + (N - 1))
    assert counts.positions == ideal + suffixes[0] * suffixes[1]
    # One position of each branch's prompt, of each question, and of every row after that.
    prompt_ends = (rows, 2) if shared else (2 * rows, 1)
    assert counts.heads == [prompt_ends, (rows, len(SUFFIXES)), *((n, 1) for n, _ in counts.passes[2:])]
    assert generation.report.notes["prefill"].startswith("both branches in one row" if shared else "branches side by")


@pytest.mark.parametrize("kind", [None, "static"], ids=["growing", "fixed"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_noised_rows_are_dropped_without_a_copy(name: str, kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    drop = kv.keep_first_rows

    def watched(cache_: Any, rows: int) -> None:
        def places() -> list[int]:
            return [states.data_ptr() for layer in cache_.layers for states in (layer.keys, layer.values)]

        before = places()
        drop(cache_, rows)
        seen.append((before == places(), {layer.keys.shape[0] for layer in cache_.layers}))

    monkeypatch.setattr(kv, "keep_first_rows", watched)
    tiny = model_of(name)
    generate(tiny, tiny.prompts(2), cache_implementation=kind)
    assert seen == [(True, {2})]


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_a_judged_answer_looks_once_and_reads_its_prompt_once(name: str) -> None:
    safecode = front_door(name, CONFIG.replace(on_unknown="treat_as_unsafe"), judge="self")
    model, _ = chat_model(name)
    with counted(model) as counts:
        safecode.chat(picture(), PROMPT, max_new_tokens=T + N, min_new_tokens=T + N, seed=1)
    columns = safecode.builder.build(picture(), PROMPT)["input_ids"].shape[1]
    suffixes = [safecode.builder.judge_suffix(PROMPT, question).ids for question in questions()]
    beginning = sum(1 for _ in takewhile(lambda tokens: tokens[0] == tokens[1], zip(*suffixes, strict=False)))
    assert beginning > len(suffixes[0]) // 2  # the orders differ in their last lines only
    asked = beginning + sum(len(suffix) - beginning for suffix in suffixes)
    assert counts.vision == 1
    assert counts.passes == [(2, columns), (1, asked), *[(2, 1)] * (T - 1), *[(1, 1)] * N]
    assert counts.heads == [(2, 1), (1, 2), *[(2, 1)] * (T - 1), *[(1, 1)] * N]


def test_without_anything_to_steer_there_is_no_second_branch() -> None:
    tiny = model_of("llava")
    clean = tiny.prompts(1)
    guidance = Guidance(CONFIG.replace(contrast_weight=0.0), [True], TinyTrie())
    with counted(tiny.model) as counts:
        SteeredGeneration(clean, None, guidance).generate(tiny.model, max_new_tokens=3, min_new_tokens=3)
    assert counts.passes == [(1, clean["input_ids"].shape[1]), (1, 1), (1, 1)]
