"""Many requests: which share a batch, what a row may have of its own, and what happens when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from pipelines import CONFIG, PROMPT, front_door, picture
from safecode_mllm.answering import Answerer
from safecode_mllm.batching import LOOKAHEAD_BATCHES, batch_kind, into_batches
from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.errors import CapacityError, ConfigError, ImageError, PromptError
from safecode_mllm.judges.protocol import Verdict
from safecode_mllm.lengths import DEFAULT_MAX_NEW_TOKENS, context_length
from safecode_mllm.pipeline import SafeCoDe
from safecode_mllm.requests import ChatRequest, PreparedRequest, prepare_request
from tiny_models import tiny_chat_model

UNSAFE = Verdict("unsafe")
LONG = PROMPT + " Tell me more about it, please."


def requests(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"image": picture(n), "prompt": (PROMPT, LONG)[n % 2], "seed": n, **fields} for n in range(count)]


def prepared(sc: SafeCoDe, fields: dict[str, Any]) -> PreparedRequest:
    request = ChatRequest.of(fields)
    return prepare_request(request, sc.builder, request.config or sc.config)


def count_batches(monkeypatch: pytest.MonkeyPatch, fits: int = 99) -> list[int]:
    """Note the size of each batch; more rows than `fits` run out of memory."""
    sizes: list[int] = []
    answer = Answerer.answer

    def counted(self: Answerer, rows: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(rows))
        if len(rows) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer(self, rows, *args, **options)

    monkeypatch.setattr(Answerer, "answer", counted)
    return sizes


def test_batches_hold_rows_of_one_kind_and_similar_length() -> None:
    sc = front_door()
    wild = CONFIG.replace(steps="all")
    other = CONFIG.replace(steps=2, contrast_weight=0.3, lambda_boost=1.0)
    fields = [*requests(4), *requests(2, steering="off"), *requests(2, config=wild), *requests(2, config=other)]
    rows = [prepared(sc, row) for row in fields]
    batches = into_batches(rows, 3)
    assert [len(batch) for batch in batches] == [3, 3, 2, 2]
    assert all(len({batch_kind(row) for row in batch}) == 1 for batch in batches)
    lengths = [[row.length for row in batch] for batch in batches[:2]]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths[0])) == 1
    assert {row.config for batch in batches[:2] for row in batch} == {CONFIG, other}


def test_results_come_in_order_or_as_completed() -> None:
    sc = front_door(judge="unsafe")
    fields = requests(6)
    fields[2] = fields[2] | {"image": b"no image"}
    wanted = sc.chat_batch(fields, batch_size=2, max_new_tokens=3)
    assert [result.index for result in wanted] == list(range(6))
    assert isinstance(wanted[2].error, ImageError)
    seen: list[tuple[int, int | None]] = []
    stream = sc.generate_many(
        iter(fields), batch_size=2, as_completed=True, max_new_tokens=3, progress=lambda *at: seen.append(at)
    )
    found = list(stream)
    assert [result.index for result in found] == [2, 1, 3, 5, 0, 4]  # what fails first, then the long ones
    assert seen == [(n, None) for n in range(1, 7)]
    assert {r.index: r.token_ids for r in found} == {r.index: r.token_ids for r in wanted}


def test_a_stream_is_read_only_as_far_as_it_is_needed() -> None:
    taken: list[int] = []

    def endless() -> Iterator[dict[str, Any]]:
        for n, row in enumerate(requests(1) * 1000):
            taken.append(n)
            yield row

    results = front_door(judge="safe").generate_many(endless(), batch_size=2, max_new_tokens=1)
    assert [next(results).index for _ in range(3)] == [0, 1, 2]
    assert len(taken) == 2 * LOOKAHEAD_BATCHES


def test_what_is_no_request_is_its_own_error_and_arguments_are_checked_at_once() -> None:
    sc = front_door(judge="safe")
    mixed: list[Any] = [requests(1)[0], {"image": picture(), "promt": PROMPT}, "a string"]
    results = list(sc.generate_many(mixed, max_new_tokens=1))
    assert [type(result.error) for result in results] == [type(None), ConfigError, ConfigError]
    with pytest.raises(ConfigError, match="contrast_weight"):
        sc.generate_many([], contrast_weight=1.0)
    with pytest.raises(ConfigError, match="batch_size"):
        sc.generate_many([], batch_size=0)
    for field in ({"config": {}}, {"max_new_tokens": 0}, {"max_new_tokens": 2.0}):
        with pytest.raises(ConfigError, match=next(iter(field))):
            ChatRequest(picture(), PROMPT, **field)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "repetition_penalty": 1.2}])
def test_each_row_has_its_own_length_and_configuration(sampling: dict[str, Any], cache: str | None) -> None:
    sc = front_door()
    configs = [CONFIG, CONFIG.replace(steps=2), CONFIG.replace(contrast_weight=0.2, plausibility_beta=0.3)]
    own: list[dict[str, Any]] = [{"max_new_tokens": 2}, {}, {"max_new_tokens": 9}]
    rows = [row | mine | {"config": c} for row, mine, c in zip(requests(3, verdict=UNSAFE), own, configs, strict=True)]
    arguments = dict(sampling, max_new_tokens=6, eos_token_id=-1, cache_implementation=cache)
    together = sc.chat_batch(rows, **arguments)
    assert [len(result.token_ids) for result in together] == [2, 6, 9]
    for row, batched in zip(rows, together, strict=True):
        (alone,) = sc.chat_batch([row], **arguments)
        assert batched.token_ids == alone.token_ids
        assert batched.context["config_digest"] == row["config"].digest()
        chat = dict(arguments, max_new_tokens=row.get("max_new_tokens", 6))
        fields = {name: value for name, value in row.items() if name != "max_new_tokens"}
        assert sc.chat(**fields, **chat).token_ids == batched.token_ids


def test_a_verdict_that_a_requests_own_configuration_never_asks_for_is_refused() -> None:
    plain = SafeCoDeConfig("contrast_only")
    (failed,) = front_door().chat_batch(requests(1, config=plain, verdict=UNSAFE), max_new_tokens=1)
    assert isinstance(failed.error, ConfigError) and "contrast_only" in str(failed.error)


class Elsewhere:
    """A judge on another machine that counts."""

    name, remote = "elsewhere", True

    def __init__(self) -> None:
        self.asked: list[str] = []

    def judge_many(self, requests: Any) -> list[Verdict]:
        self.asked += [request.prompt for request in requests]
        return [UNSAFE if request.prompt == PROMPT else Verdict("safe") for request in requests]


def test_out_of_memory_makes_batches_smaller_and_asks_no_judge_twice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fields = [row | {"prompt": f"{PROMPT} {n % 3}"} for n, row in enumerate(requests(10))]
    wanted = front_door(judge="safe").chat_batch(fields, batch_size=1, max_new_tokens=3)
    judge = Elsewhere()
    asking = Answerer._verdict_source

    def asked_and_out_of_memory(self: Answerer, rows: Any, judge: Any) -> Any:
        source = asking(self, rows, judge)
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return source

    monkeypatch.setattr(Answerer, "_verdict_source", asked_and_out_of_memory)
    sizes = count_batches(monkeypatch)
    found = front_door(judge=judge).chat_batch(fields, batch_size=8, max_new_tokens=3)
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert "going on with 4" in caplog.text and "going on with 2" in caplog.text
    assert [r.token_ids for r in found] == [r.token_ids for r in wanted]
    assert sorted(judge.asked) == sorted(row["prompt"] for row in fields)


def test_a_request_that_does_not_fit_alone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_batches(monkeypatch, fits=0) == []
    results = front_door(judge="safe").chat_batch(requests(2), max_new_tokens=3)
    assert all(isinstance(result.error, CapacityError) for result in results)
    assert "max_new_tokens" in str(results[0].error)


def test_other_failures_leave_the_batch_size_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = count_batches(monkeypatch)
    monkeypatch.setattr(Answerer, "_result", lambda *_: 1 / 0)
    results = front_door(judge="safe").chat_batch(requests(2), max_new_tokens=1)
    assert [type(result.error) for result in results] == [ZeroDivisionError] * 2 and sizes == [2]


def test_lengths_come_from_a_generation_config_if_it_has_one() -> None:
    sc = front_door(judge="unsafe")
    special = dict(pad_token_id=sc.builder.pad_token_id, eos_token_id=-1)
    length = prepared(sc, requests(1)[0]).length
    for field, wanted in (({}, DEFAULT_MAX_NEW_TOKENS), ({"max_new_tokens": 3}, 3), ({"max_length": length + 2}, 2)):
        config = GenerationConfig(**special, **field)
        assert len(sc.chat(picture(), PROMPT, generation_config=config).token_ids) == wanted
    with pytest.raises(PromptError, match="max_new_tokens"):
        sc.chat(picture(), PROMPT, max_length=length)


def test_the_end_of_the_context(caplog: pytest.LogCaptureFixture) -> None:
    model, processor = tiny_chat_model("llava")
    sc = SafeCoDe(model, processor, judge="unsafe", config=CONFIG)
    length = prepared(sc, requests(1)[0]).length
    model.config.get_text_config().max_position_embeddings = length + 4
    assert context_length(model) == length + 4
    short, long = sc.chat_batch(requests(2), max_new_tokens=9, eos_token_id=-1)
    assert len(short.token_ids) == 4 and "1 of 1 answers end where" in caplog.text
    assert isinstance(long.error, PromptError) and f"holds {length + 4}" in str(long.error)
    with pytest.raises(PromptError, match="smaller image"):
        sc.chat(picture(), LONG)
