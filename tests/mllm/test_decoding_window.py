"""Windows of a row's own, a bias that fades behind them, and the reason behind a refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from naive import NaiveSteering, guided_scores, last_logits, members
from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding.families import placeholder_ids
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.lingering import SMALLEST_BIAS, LingeringBias
from safecode_mllm.decoding.loop import SteeredGeneration
from safecode_mllm.decoding.window import ADAPTIVE_ANSWER_STEPS, ADAPTIVE_MAX_STEPS, Window
from safecode_mllm.judges.protocol import Verdict
from tiny_models import noised_copy, tiny_model
from tiny_parts import VOCAB
from tiny_refusal import TinyTrie

UNSAFE, SAFE = Verdict("unsafe", 0.9), Verdict("safe", 0.2)
ADAPTIVE = SafeCoDeConfig(contrast_weight=0.8, lambda_boost=30.0, lambda_supp=2.0, steps="adaptive")


# ---- windows ----


def test_a_fixed_window_is_a_number_of_steps() -> None:
    window = Window([3, 3], [True, False])
    window.observe(0, 0, in_phrase=False, complete=True)
    assert [window.guides(step) for step in range(5)] == [True, True, True, False, False]
    assert window.guided_rows(0) == [True, False]
    assert Window(["all"], [True]).guides(10**9)


def test_each_row_may_have_a_window_of_its_own() -> None:
    window = Window([1, 3, "all"], [True, True, False])
    assert [window.guided_rows(step) for step in range(4)] == [
        [True, True, False], [False, True, False], [False, True, False], [False, False, False],
    ]  # fmt: skip
    assert not window.adaptive
    assert Window([1, "adaptive"], [True, True]).adaptive


def test_an_adaptive_window_ends_with_the_phrase() -> None:
    window = Window(["adaptive"] * 3, [True, True, False])
    for step in range(9):
        window.observe(0, step, in_phrase=step < 7, complete=step == 7)
        assert window.guided_rows(step)[0] == (step < 7)
    assert window.guides(9), "the second row is still open"
    assert not Window(["adaptive"], [False]).guides(0)


def test_an_adaptive_window_ends_when_the_answer_is_under_way() -> None:
    window = Window(["adaptive"], [True])
    for step in range(ADAPTIVE_ANSWER_STEPS):
        assert window.guides(step)
        window.observe(0, step, in_phrase=False, complete=False)
    assert not window.guides(ADAPTIVE_ANSWER_STEPS)


def test_an_adaptive_window_ends_at_last() -> None:
    window = Window(["adaptive"], [True])
    window.observe(0, ADAPTIVE_MAX_STEPS - 1, in_phrase=True, complete=False)
    assert window.guides(ADAPTIVE_MAX_STEPS - 1) and not window.guides(ADAPTIVE_MAX_STEPS)


def test_rows_of_a_window_can_be_repeated() -> None:
    window = Window(["adaptive"] * 2, [True, True])
    window.observe(1, 0, in_phrase=False, complete=True)
    window.expand(2)
    assert window.guided_rows(0) == [True, True, False, False]


# ---- the loop ----


def naive_adaptive(tiny: Any, clean: Any, bias: list[float], new_tokens: int) -> tuple[Tensor, list[int]]:
    """Every row by itself with two full passes per guided token; returns ids and how many tokens were guided."""
    rows, guided = [], []
    noised, trie = noised_copy(clean), TinyTrie()
    steering = NaiveSteering(0.8, 0.1, 5, bias, trie, tuple(placeholder_ids(tiny.model)))
    for row, value in enumerate(bias):
        ids, state, is_open, count = clean["input_ids"], trie.start if value else -1, True, 0
        for step in range(new_tokens):
            z = last_logits(tiny.model, clean, ids)
            if is_open:
                n = last_logits(tiny.model, noised, ids)
                per_row = [value if r == row else 0.0 for r in range(len(bias))]
                z = guided_scores(z, n, steering, per_row, [state if r == row else -1 for r in range(len(bias))])
                count += 1
            token = z.argmax(-1)
            if is_open and state >= 0:
                complete = trie.completes(state, int(token[row]))
                state = trie.next_state(state, int(token[row]))
                is_open = not complete and (state >= 0 or step + 1 < 5)
            elif is_open:
                is_open = step + 1 < 5
            # The other rows follow their own way; only this one's tokens matter.
            ids = torch.cat([ids, token[:, None]], 1)
        rows.append(ids[row])
        guided.append(count)
    return torch.stack(rows), guided


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_adaptive_steering_equals_each_row_steered_alone(name: str) -> None:
    tiny = tiny_model(name)
    clean = tiny.prompts(3, extra=(0, 3, 1))
    verdicts = [UNSAFE, SAFE, UNSAFE]
    guidance = Guidance(ADAPTIVE, [True] * 3, TinyTrie())
    loop = SteeredGeneration(
        clean, noised_copy(clean), guidance, verdict_source=lambda _: verdicts, rng="philox", record=True
    )
    output = loop.generate(tiny.model, max_new_tokens=9, min_new_tokens=9, eos_token_id=-1)
    ids, guided = naive_adaptive(tiny, clean, guidance.bias, 9)
    assert torch.equal(output, ids)
    assert [len(tokens) for tokens in loop.report.guided] == guided
    # A boost of 30 writes a phrase of two, three or four tokens; without one the window has five.
    assert guided[0] in (2, 3, 4) and guided[1] == 5


def test_a_row_sampled_adaptively_does_not_depend_on_its_batch() -> None:
    tiny = tiny_model("llava")
    clean = tiny.prompts(3)

    def run(rows: list[int]) -> list[list[int]]:
        part = {key: value[rows] for key, value in clean.items()}
        whole = noised_copy(clean)
        noised = {key: value[rows] for key, value in whole.items()}
        verdicts = [(UNSAFE, SAFE, UNSAFE)[row] for row in rows]
        guidance = Guidance(ADAPTIVE.replace(lambda_boost=6.0), [True] * len(rows), TinyTrie())
        loop = SteeredGeneration(
            part, noised, guidance, verdict_source=lambda _: verdicts, rng="philox", seeds=[7 + row for row in rows]
        )
        output = loop.generate(tiny.model, max_new_tokens=12, do_sample=True, temperature=1.5, eos_token_id=-1)
        return output[:, clean["input_ids"].shape[1] :].tolist()

    together = run([0, 1, 2])
    assert [run([row])[0] for row in range(3)] == together


# ---- the fading bias ----


def lingering(verdict: Verdict, steps: int = 2, decay: float = 0.5) -> tuple[LingeringBias, Guidance]:
    config = SafeCoDeConfig(steps=steps, lambda_boost=8.0, lambda_supp=4.0, bias_form="hard", bias_decay=decay)
    guidance = Guidance(config, [True], TinyTrie())
    guidance.set_verdicts([verdict])
    return LingeringBias(guidance, decay, prompt_length=3), guidance


def added(processor: LingeringBias, tokens: list[int]) -> dict[int, float]:
    """What the processor adds to flat scores behind these generated tokens."""
    ids = torch.tensor([[1, 1, 1, *tokens]])
    scores = torch.zeros(1, VOCAB)
    changed = processor(ids, scores)
    assert not scores.any(), "the scores it was given stay as they are"
    return {token: float(changed[0, token]) for token in changed[0].nonzero().flatten().tolist()}


def test_the_bias_fades_from_where_the_window_ends() -> None:
    processor, guidance = lingering(UNSAFE)
    assert added(processor, []) == {}
    guidance.observe([50], 0)
    assert added(processor, [50]) == {}, "inside the window the decode step does it"
    guidance.observe([51], 1)
    starts = TinyTrie().allowed(0)
    assert added(processor, [50, 51]) == dict.fromkeys(starts, 4.0)
    assert added(processor, [50, 51, 52]) == dict.fromkeys(starts, 2.0)
    # A phrase that has begun goes on, and behind its end another may begin.
    assert added(processor, [50, 51, 52, 20]) == {30: 1.0, 31: 1.0}
    assert added(processor, [50, 51, 52, 20, 31]) == dict.fromkeys(starts, 0.5)
    for _ in range(3):
        added(processor, [50, 51, 52, 20, 31, 60])
    assert added(processor, [50]) == {} and SMALLEST_BIAS > 0.5 * 0.5**3 * 0.5


def test_a_phrase_that_the_window_cut_goes_on() -> None:
    processor, guidance = lingering(UNSAFE, steps=1)
    guidance.observe([20], 0)
    assert added(processor, [20]) == {30: 4.0, 31: 4.0}


def test_the_bias_of_a_safe_verdict_keeps_late_refusals_down() -> None:
    processor, guidance = lingering(SAFE, steps=1)
    guidance.observe([50], 0)
    assert added(processor, [50]) == dict.fromkeys(TinyTrie().allowed(0), -2.0)


def test_without_a_bias_nothing_lingers() -> None:
    processor, _ = lingering(Verdict("unknown", policy="no_bias"))
    assert added(processor, [50, 51, 52]) == {}


def test_members_of_the_first_state() -> None:
    assert members(TinyTrie().masks[0], VOCAB) == TinyTrie().allowed(0)
