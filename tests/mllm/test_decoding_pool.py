"""Buffers, steps and graphs are used again for later generations, and never for other weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipelines import CONFIG, PROMPT, front_door, picture
from recorded_graphs import RecordedGraph
from safecode_mllm.decoding import step_pool
from safecode_mllm.decoding.graphs import GraphRunner
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.loop import SteeredGeneration
from safecode_mllm.decoding.static import LENGTH_STEPS
from safecode_mllm.decoding.step_pool import StepPool
from safecode_mllm.judges.protocol import Verdict
from tiny_models import FAMILY_NAMES, TinyModel, noised_copy, tiny_model
from tiny_refusal import TinyTrie

TRIE = TinyTrie()
NEW_TOKENS = 10
SAMPLED: dict[str, Any] = dict(do_sample=True, temperature=0.9, top_k=40)
# Two prompts, verdicts and seeds for the same shape.
CALLS: list[dict[str, Any]] = [
    {"verdicts": [Verdict("unsafe", 0.9), Verdict("safe", 0.2)], "seeds": [3, 4], "extra": (0, 3)},
    {"verdicts": [Verdict("safe", 0.1), Verdict("unsafe", 0.8)], "seeds": [7, 1], "extra": (3, 1)},
]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[GraphRunner]:
    """Steps are recorded and replayed, as on a GPU; the runners that did it."""
    runners: list[GraphRunner] = []

    def make(steps: Any) -> GraphRunner:
        runners.append(GraphRunner(steps, RecordedGraph))
        return runners[-1]

    monkeypatch.setattr(step_pool, "make_runner", make)
    monkeypatch.setitem(LENGTH_STEPS, "cpu", LENGTH_STEPS["cuda"])
    return runners


def generate(tiny: TinyModel, call: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    clean = tiny.prompts(2, extra=call["extra"])
    generation = SteeredGeneration(
        clean,
        noised_copy(clean),
        Guidance(CONFIG, [True, True], TRIE),  # type: ignore[arg-type]
        verdict_source=lambda branches: call["verdicts"],
        rng="philox",
        seeds=call["seeds"],
        record=True,
        pool=options.pop("pool", None),
    )
    output = generation.generate(tiny.model, max_new_tokens=NEW_TOKENS, **SAMPLED, **options)
    return output, generation.report


@pytest.mark.parametrize("name", [name for name in FAMILY_NAMES if name != "idefics"])
def test_replayed_steps_equal_the_growing_cache(name: str, captured: list[GraphRunner]) -> None:
    tiny, pool = tiny_model(name), StepPool()
    for call in (*CALLS, CALLS[0]):
        wanted, dynamic = generate(tiny, call)
        found, static = generate(tiny, call, pool=pool, cache_implementation="static")
        assert torch.equal(wanted, found)
        assert static.lengths == dynamic.lengths
        assert [[token.token_id for token in row] for row in static.guided] == [
            [token.token_id for token in row] for row in dynamic.guided
        ]
    (runner,) = captured
    assert runner.captured == 2 and len(pool) == 1
    # The first generation warms up once per kind of step; no later one runs a step as it is.
    assert runner.replayed == 3 * (NEW_TOKENS - 1) - 2
    assert static.notes["steps"].startswith("on the device: 2 graphs")


def test_what_was_made_in_inference_mode_stays_there(captured: list[GraphRunner]) -> None:
    tiny, pool = tiny_model("llava"), StepPool()
    wanted, _ = generate(tiny, CALLS[0])
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            found, _ = generate(tiny, CALLS[0], pool=pool, cache_implementation="static")
        assert torch.equal(wanted, found)


@pytest.mark.parametrize("change", ["in place", "moved", "hook", "attention", "inference"])
def test_no_graph_outlives_what_it_was_captured_with(change: str, captured: list[GraphRunner]) -> None:
    tiny, pool = tiny_model("llava"), StepPool()
    generate(tiny, CALLS[0], pool=pool, cache_implementation="static")
    weight = tiny.model.get_output_embeddings().weight
    with torch.no_grad():
        if change == "in place":
            weight.mul_(-1)
        elif change == "moved":
            weight.data = -weight.data
        elif change == "hook":
            tiny.model.get_output_embeddings().register_forward_hook(lambda module, args, output: -output)
        elif change == "attention":
            tiny.model.set_attn_implementation("eager")
        else:
            with torch.inference_mode():
                weight.data = -weight.data
    wanted, _ = generate(tiny, CALLS[0])
    found, _ = generate(tiny, CALLS[0], pool=pool, cache_implementation="static")
    assert torch.equal(wanted, found)
    assert len(captured) == 2 and len(pool) == 1


def test_a_step_that_cannot_be_captured_is_run(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def refuse(run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA error details")

    monkeypatch.setattr(step_pool, "make_runner", lambda steps: GraphRunner(steps, refuse))
    tiny = tiny_model("llava")
    wanted, _ = generate(tiny, CALLS[0])
    found, report = generate(tiny, CALLS[0], cache_implementation="static")
    assert torch.equal(wanted, found)
    assert report.notes["steps"].endswith("capturing failed (operation not permitted when stream is capturing)")
    assert caplog.text.count("could not be captured") == 1


def test_the_pool_is_bounded() -> None:
    tiny, pool = tiny_model("llava"), StepPool(capacity=2)
    for rows in range(1, 5):
        clean = tiny.prompts(rows)
        guidance = Guidance(CONFIG, [True] * rows, None)
        loop = SteeredGeneration(clean, noised_copy(clean), guidance, pool=pool)
        loop.generate(tiny.model, max_new_tokens=2, cache_implementation="static")
        assert len(pool) <= 2
    assert len({key[:1] for key in pool._idle}) == 1  # type: ignore[index]
    pool.clear()
    assert len(pool) == 0


def test_a_cache_that_is_handed_out_is_not_used_again(captured: list[GraphRunner]) -> None:
    tiny, pool = tiny_model("llava"), StepPool()
    options: dict[str, Any] = dict(pool=pool, cache_implementation="static")
    first, _ = generate(tiny, CALLS[0], return_dict_in_generate=True, **options)
    assert len(pool) == 0
    kept = first.past_key_values.layers[0].keys.clone()
    generate(tiny, CALLS[1], **options)
    assert torch.equal(first.past_key_values.layers[0].keys, kept)


def test_an_object_keeps_its_pool_and_streams_use_it(captured: list[GraphRunner]) -> None:
    sc = front_door(judge="unsafe")
    mode: dict[str, Any] = dict(max_new_tokens=6, seed=1, cache_implementation="static")
    results = [sc.chat(picture(n), PROMPT, **mode).token_ids for n in (1, 2)]
    assert results == [sc.chat(picture(n), PROMPT, max_new_tokens=6, seed=1).token_ids for n in (1, 2)]
    result = sc.chat(picture(1), PROMPT, **mode)
    assert result.notes["cache"] == "of fixed size" and "replayed" in result.notes["steps"]
    assert "cache_implementation" in sc.explain()["static_cache"]
    stream = sc.stream(picture(1), PROMPT, **mode)
    list(stream)
    assert stream.result.token_ids == results[0]
    assert len(captured) == 1 and len(sc._answerer.pool) == 1
    sc._answerer.pool.clear()
