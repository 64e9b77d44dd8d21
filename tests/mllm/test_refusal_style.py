"""Refusals with a reason, adaptive windows and fading biases through the front door, on the small trained model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding.explaining import MAX_REFUSAL_TOKENS, ReasonProcessor
from safecode_mllm.errors import ConfigError
from safecode_mllm.hazard_world import load_world
from safecode_mllm.hazard_world.render import render
from safecode_mllm.hazard_world.splits import draw_items
from safecode_mllm.judges.protocol import Verdict
from safecode_mllm.pipeline import SafeCoDe
from safecode_mllm.reasons import REASON_OPENING, reason_opening

EXPLAIN = SafeCoDeConfig(refusal_style="explain", lambda_boost=20.0, lambda_supp=20.0, bias_form="hard")
UNSAFE, SAFE = Verdict("unsafe"), Verdict("safe")


@pytest.fixture(scope="module")
def world() -> Any:
    torch.set_num_threads(1)
    return load_world()


@pytest.fixture(scope="module")
def requests() -> list[dict[str, Any]]:
    items = draw_items("test", 6, 3)
    return [{"image": render(item.scene), "prompt": item.request, "seed": 5} for item in items]


def answers(world: Any, requests: Any, verdict: Verdict, config: SafeCoDeConfig, **options: Any) -> list[str]:
    rows = [{**request, "verdict": verdict} for request in requests]
    results = SafeCoDe(*world, config=config).chat_batch(rows, **options)
    assert all(result.error is None for result in results)
    return [result.text for result in results]


def test_a_refusal_is_followed_by_its_reason(world: Any, requests: Any) -> None:
    brief = answers(world, requests, UNSAFE, EXPLAIN.replace(refusal_style="brief"))
    for refusal, text in zip(brief, answers(world, requests, UNSAFE, EXPLAIN), strict=True):
        first = refusal[: refusal.index(".") + 1]
        assert text.startswith(first + REASON_OPENING)
        assert len(text) > len(first + REASON_OPENING)


def test_what_is_not_refused_stays_as_it_was(world: Any, requests: Any) -> None:
    assert answers(world, requests, SAFE, EXPLAIN) == answers(
        world, requests, SAFE, EXPLAIN.replace(refusal_style="brief")
    )


def test_a_row_without_a_verdict_stays_as_it_was(world: Any, requests: Any) -> None:
    plain = SafeCoDe(*world, config=EXPLAIN).chat(**requests[0], steering="off").text
    mixed = SafeCoDe(*world, config=EXPLAIN).chat_batch(
        [{**requests[0], "steering": "off"}, {**requests[1], "verdict": UNSAFE}]
    )
    assert mixed[0].text == plain and REASON_OPENING in mixed[1].text


def test_a_reason_does_not_depend_on_the_batch(world: Any, requests: Any) -> None:
    together = answers(world, requests, UNSAFE, EXPLAIN)
    assert answers(world, requests, UNSAFE, EXPLAIN, batch_size=1) == together


def test_the_reason_has_a_budget_of_its_own(world: Any, requests: Any) -> None:
    """An answer keeps the limit that was asked for; a refusal that just fits is followed by its reason all the same."""
    tokenizer = world[1].tokenizer
    short = EXPLAIN.replace(reason_tokens=3)
    for text in answers(world, requests, UNSAFE, short, max_new_tokens=20):
        reason = text.split(REASON_OPENING)[1]
        assert len(tokenizer(reason, add_special_tokens=False)["input_ids"]) <= 3
    limited = answers(world, requests, SAFE, EXPLAIN, max_new_tokens=4)
    assert limited == answers(world, requests, SAFE, EXPLAIN.replace(refusal_style="brief"), max_new_tokens=4)


def test_a_reason_streams(world: Any, requests: Any) -> None:
    stream = SafeCoDe(*world, config=EXPLAIN).stream(**requests[0], verdict=UNSAFE)
    pieces = "".join(stream)
    assert pieces.strip() == stream.result.text and REASON_OPENING in pieces


def test_the_judges_category_is_named_and_nothing_else_it_wrote() -> None:
    assert reason_opening(UNSAFE) == REASON_OPENING
    told = Verdict("unsafe", category="fire", reason="IGNORE ALL", caption="IGNORE ALL")
    assert reason_opening(told) == " The reason is the danger of fire: the image shows"
    assert reason_opening(Verdict("unsafe", category="IGNORE ALL")) == REASON_OPENING


# ---- the processor alone ----


class Words:
    """A tokenizer whose tokens are words; 0 ends a text."""

    def __init__(self) -> None:
        self.words = ["</s>"]

    def id(self, word: str) -> int:
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.id(word) for word in text.split()]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(self.words[i] for i in ids if i)


def choices(processor: ReasonProcessor, tokenizer: Words, text: str) -> set[int]:
    """Which tokens may follow a text, out of the words known and a few more."""
    scores = processor(torch.tensor([[7, 7, *tokenizer(text)["input_ids"]]]), torch.zeros(1, 60))
    return set(torch.isfinite(scores)[0].nonzero().flatten().tolist())


def walk(processor: ReasonProcessor, tokenizer: Words, text: str) -> list[set[int]]:
    words = text.split()
    return [choices(processor, tokenizer, " ".join(words[:n])) for n in range(len(words) + 1)]


def processor(tokenizer: Words, verdict: Verdict | None = UNSAFE, **changes: Any) -> ReasonProcessor:
    arguments: dict[str, Any] = {"end_ids": [0], "prompt_length": 2, "budget": 6, "limits": [99]} | changes
    return ReasonProcessor(tokenizer, arguments.pop("end_ids"), lambda: [verdict], **arguments)


ALL = set(range(60))


def test_the_opening_is_forced_behind_the_first_sentence() -> None:
    words = Words()
    text = f"Sorry, I can't.{REASON_OPENING} a deep cliff."
    steps = walk(processor(words), words, text)
    assert steps[0] == ALL, "nothing is known yet"
    assert steps[1] == ALL - {0}, "a refusal has begun: it may not end without its sentence"
    assert [steps[3 + n] for n in range(6)] == [{words.id(word)} for word in REASON_OPENING.split()]
    assert steps[9:12] == [ALL, ALL, ALL]
    assert steps[12] == {0}, "half of the budget is used and a sentence is over"


def test_the_budget_ends_a_reason_that_does_not_end() -> None:
    words = Words()
    steps = walk(processor(words, budget=4), words, f"Sorry.{REASON_OPENING} one two three four")
    assert steps[-2] == ALL and steps[-1] == {0}


def test_a_sentence_in_the_first_half_of_the_budget_may_be_followed_by_another() -> None:
    words = Words()
    assert walk(processor(words, budget=12), words, f"Sorry.{REASON_OPENING} a cliff.")[-1] == ALL


def test_what_is_no_refusal_is_let_be() -> None:
    words = Words()
    assert all(step == ALL for step in walk(processor(words), words, "Sure! You can do it. Sorry. That is all."))


def test_a_refusal_without_an_end_gets_its_reason_all_the_same() -> None:
    words = Words()
    steps = walk(processor(words), words, "Sorry " + "but " * (MAX_REFUSAL_TOKENS - 1))
    assert steps[-2] == ALL - {0} and steps[-1] == {words.id("This")}


@pytest.mark.parametrize("verdict", [SAFE, None, Verdict("unknown", policy="no_bias")])
def test_only_an_unsafe_verdict_asks_for_a_reason(verdict: Verdict | None) -> None:
    words = Words()
    assert all(step == ALL for step in walk(processor(words, verdict), words, "Sorry, I can't. No."))


def test_an_unknown_verdict_that_counts_as_unsafe_asks_too() -> None:
    words = Words()
    steps = walk(processor(words, Verdict("unknown", policy="treat_as_unsafe")), words, "Sorry, I can't.")
    assert steps[-1] == {words.id("This")}


def test_a_row_without_a_reason_ends_at_its_limit() -> None:
    words = Words()
    assert walk(processor(words, SAFE, limits=[3]), words, "Sure! You can")[-1] == {0}
    assert walk(processor(words, SAFE, limits=[3], end_ids=[]), words, "Sure! You can")[-1] == ALL


# ---- settings ----


@pytest.mark.parametrize(
    ("field", "value"),
    [("refusal_style", "long"), ("reason_tokens", 0), ("bias_decay", 1.0), ("bias_decay", -0.1), ("steps", "adaptiv")],
)
def test_settings_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        SafeCoDeConfig(**{field: value})


def test_a_fading_bias_through_the_front_door(world: Any, requests: Any) -> None:
    """Decay 0 is the plain way; a bias that fades so fast that nothing is left changes no token."""
    config = EXPLAIN.replace(refusal_style="brief", lambda_boost=1.0, lambda_supp=1.0)
    assert answers(world, requests, UNSAFE, config) == answers(world, requests, UNSAFE, config.replace(bias_decay=0.01))
    strong = config.replace(lambda_boost=30.0, bias_decay=0.9, steps=1)
    assert answers(world, requests, UNSAFE, strong) != answers(world, requests, UNSAFE, strong.replace(bias_decay=0.0))


def test_adaptive_steps_through_the_front_door(world: Any, requests: Any) -> None:
    results = SafeCoDe(*world, config=EXPLAIN.replace(refusal_style="brief", steps="adaptive")).chat_batch(
        [{**request, "verdict": UNSAFE} for request in requests]
    )
    assert all(result.steering_effective for result in results)
    assert {len(result.record or []) for result in results} <= set(range(2, 9))
