"""Questions about one prompt in one row: the same answers as a row for each, in fewer positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from counting import Counts, counted
from judge_models import short_captions
from judging import requests
from pipelines import chat_model
from safecode_mllm.decoding import kv, packed, question_layout
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.question_layout import as_trees
from safecode_mllm.judges.self_judge import SelfJudge
from safecode_mllm.prompts import PromptBuilder
from tiny_models import CHAT_NAMES, FAMILY_NAMES, TinyModel, noised_copy, tiny_model

# Sums of other lengths in other orders: the float32 noise floor of these models is 4e-6.
TOLERANCE = 2e-5
P_TOLERANCE = 1e-6
BEGINNING = [33, 44, 55]
ORDERS = [[*BEGINNING, 66], [*BEGINNING, 71, 72]]
ROWS = 3

# (suffixes, hidden columns, rows, the one pass that asks them)
CASES: dict[str, tuple[list[list[int]], list[int], list[int], tuple[int, int]]] = {
    "two orders about each": ([order for order in ORDERS for _ in range(ROWS)], [1] * 6, [0, 1, 2] * 2, (3, 6)),
    "nothing in common": ([[66, 67], [71, 72, 73]], [0, 0], [1, 1], (1, 5)),
    "one begins the other": ([BEGINNING, [*BEGINNING, 66]], [0, 0], [2, 2], (1, 5)),
    "twice the same": ([BEGINNING, BEGINNING], [0, 0], [0, 0], (1, 4)),
    "of one token": ([[66], [66]], [2, 2], [2, 2], (1, 2)),
    "one about each": ([[66, 67, 68], [71]], [0, 1], [2, 0], (2, 3)),
    "other hidden columns": ([[*BEGINNING, 66], [*BEGINNING, 71]], [0, 2], [1, 1], (2, 4)),
    "more about one": ([*ORDERS, [*BEGINNING, 68], [71]], [1, 1, 1, 0], [0, 0, 0, 2], (2, 7)),
}  # fmt: skip


@cache
def model_of(name: str) -> TinyModel:
    return tiny_model(name)


@torch.no_grad()
def prefilled(tiny: TinyModel) -> Branches:
    clean = tiny.prompts(ROWS, extra=(0, 3, 1))
    branches = Branches(tiny.model, clean, noised_copy(clean), DynamicCache())
    branches.prefill()
    return branches


@torch.no_grad()
def asked(tiny: TinyModel, *arguments: Any) -> tuple[torch.Tensor, Counts]:
    branches = prefilled(tiny)
    with counted(tiny.model) as counts:
        return branches.ask(*arguments), counts


def keep_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question_layout, "tree_obstacle", lambda model: "not wanted here")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_answers_equal_those_of_a_row_for_each_question(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    *arguments, one_pass = CASES[case]
    found, counts = asked(model_of(name), *arguments)
    assert counts.passes == [one_pass]
    keep_apart(monkeypatch)
    wanted, counts = asked(model_of(name), *arguments)
    assert counts.passes == [(len(arguments[0]), max(map(len, arguments[0])))]
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("settings", ["plain", "rules", "captioned"])
@pytest.mark.parametrize("name", CHAT_NAMES)
def test_verdicts_are_those_of_a_row_for_each_question(
    name: str, settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of different lengths in one batch; rules and a description of the image lengthen what is shared."""
    monkeypatch.setattr("safecode_mllm.judges.letters.MIN_LETTER_MASS", 0.0)
    short_captions(monkeypatch)
    model, processor = chat_model(name)
    judge = SelfJudge(captioned=settings == "captioned").bind(model, PromptBuilder(processor))
    batch = [_with(request, n, settings) for n, request in enumerate(requests(3))]

    def verdicts() -> tuple[list[float], Counts]:
        with counted(model) as counts:
            found = judge.judge_many(batch)
        return [verdict.p_unsafe for verdict in found if verdict.p_unsafe is not None], counts

    found, counts = verdicts()
    keep_apart(monkeypatch)
    wanted, apart = verdicts()
    assert len(found) == 3
    assert found == pytest.approx(wanted, abs=P_TOLERANCE)
    assert counts.positions < apart.positions


def _with(request: Any, number: int, settings: str) -> Any:
    rules = f"Running is unsafe near number {number}." if settings == "rules" else ""
    longer = f"{request.prompt} Really?" * (1 + number)
    return type(request)(request.image, longer, policy_text=rules)


def seen_from(layout: Any, row: int, column: int) -> list[int]:
    """The tokens that one column sees, itself among them."""
    return [int(token) for token, sees in zip(layout.ids[row], layout.sees[row, column], strict=True) if sees]


@pytest.mark.parametrize("case", CASES)
def test_the_last_token_of_each_question_sees_it_and_nothing_else(case: str) -> None:
    suffixes, hidden, rows, _ = CASES[case]
    layout = as_trees(suffixes, hidden, rows, torch.device("cpu"))
    for suffix, drop, row, place in zip(suffixes, hidden, rows, layout.places, strict=True):
        end, own = divmod(place, len(layout.prompts))
        assert (layout.prompts[own], layout.hidden[own]) == (row, drop)
        assert seen_from(layout, own, layout.ends[end]) == suffix
        assert layout.depth[own, layout.ends[end]] == len(suffix) - 1
    assert len(set(layout.places)) == len(suffixes)


REASONS = {
    "flash attention": "takes no mask of its own",
    "sliding window": "layers with a sliding window",
    "untested class": "it has not been shown",
}


@pytest.mark.parametrize("fault", REASONS)
def test_where_no_mask_of_its_own_is_taken_each_question_has_a_row(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_model("llava")
    *arguments, _ = CASES["two orders about each"]
    wanted, _ = asked(tiny, *arguments)
    if fault == "flash attention":
        monkeypatch.setattr(packed, "_TAKES_ANY_MASK", ())
    elif fault == "sliding window":
        monkeypatch.setattr(kv, "has_sliding_window", lambda decoder: True)
    else:
        tiny.model.config.model_type = "never_heard_of"
    assert REASONS[fault] in (question_layout.tree_obstacle(tiny.model) or "")
    found, counts = asked(tiny, *arguments)
    # With a sliding window nothing may be padded: each length has a pass of its own.
    assert counts.passes == ([(3, 4), (3, 5)] if fault == "sliding window" else [(6, 5)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


def test_eager_attention_takes_the_mask_too() -> None:
    tiny = tiny_model("llava")
    *arguments, one_pass = CASES["two orders about each"]
    wanted, _ = asked(tiny, *arguments)
    tiny.model.set_attn_implementation("eager")
    found, counts = asked(tiny, *arguments)
    assert counts.passes == [one_pass]
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("rows", "copies"), [([0, 1], False), ([1, 2], False), ([2, 2, 2], False), ([0, 2], True), ([1, 0], True)]
)
def test_a_fork_of_neighbouring_rows_copies_nothing(rows: Sequence[int], copies: bool) -> None:
    branches = prefilled(model_of("llava"))
    whole = branches.cache.layers[0].keys
    forked = kv.fork(branches.cache, rows).layers[0].keys
    assert torch.equal(forked, whole[list(rows)])
    shared = forked.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert shared is not copies
