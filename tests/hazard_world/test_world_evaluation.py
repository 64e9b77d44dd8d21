"""The evaluation end to end, on few scenes: every arm and control runs through the pipeline."""

from __future__ import annotations

import json

import pytest
import torch

from safecode_kernels.bitmask import unpack_mask
from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.hazard_world import demo_scenes, load_tuned, load_world, run_evaluation, save_tuned
from safecode_mllm.hazard_world.arms import Arm, controlled_verdicts, make_arms, make_controls, opposite, random_tokens
from safecode_mllm.hazard_world.bench import Bench, make_bench, other_rows
from safecode_mllm.hazard_world.comparisons import compare
from safecode_mllm.hazard_world.render import render
from safecode_mllm.hazard_world.splits import draw_items
from safecode_mllm.hazard_world.tuning import Sweep, SweepPoint
from safecode_mllm.judges.protocol import Verdict
from safecode_mllm.pipeline import SafeCoDe
from safecode_mllm.refusal import refusal_tokens

ARMS = ["plain", "contrast_only", "verdict_only", "no_plausibility", "vcd", "paper", "safecode", "safecode_tuned"]
CONTROLS = {"n_is_z", "other_scene", "random_verdict", "inverted_verdict", "random_tokens", "judge_alone"}
RATES = {"unsafe_refused", "safe_answered", "balanced_accuracy", "garbled"}


@pytest.fixture(scope="module")
def world():
    torch.set_num_threads(1)
    return load_world()


@pytest.fixture(scope="module")
def evaluation(world):
    calls: list[tuple[int, int, str]] = []
    found = run_evaluation(
        *world, n=36, seed=5, controls=True, resamples=200, batch_size=36, progress=lambda *call: calls.append(call)
    )
    assert calls[-1][0] == calls[-1][1], "progress reaches its end"
    return found


def test_every_arm_and_control_ran(evaluation) -> None:
    assert list(evaluation.methods) == ARMS
    assert set(evaluation.controls) == CONTROLS


def test_json_has_the_agreed_form(evaluation) -> None:
    short = json.loads(json.dumps(evaluation.as_dict()))
    for name in ARMS:
        assert set(short["methods"][name]) >= RATES | {"strata"}
        assert set(short["methods"][name]["strata"]) == {"prior", "reasoning", "judge_wrong"}
        assert "intervals" not in short["methods"][name]
    full = json.loads(json.dumps(evaluation.as_dict(with_intervals=True)))
    for name in ARMS:
        for metric, (low, high) in full["methods"][name]["intervals"].items():
            assert 0 <= low <= full["methods"][name][metric] <= high <= 1
    assert full["comparisons"]


def test_the_same_image_as_noised_one_is_no_contrast(evaluation) -> None:
    assert evaluation.controls["n_is_z"].outcomes == evaluation.methods["verdict_only"].outcomes


def test_arms_differ(evaluation) -> None:
    outcomes = {name: tuple(evaluation.methods[name].outcomes) for name in ("plain", "verdict_only", "safecode")}
    assert len(set(outcomes.values())) == 3


def test_the_strata_tell_the_arms_apart_as_designed(world) -> None:
    """Only pairs that a stratum was built to tell apart are asserted; the rest is reported by the benchmark."""
    arms = ["safecode", "verdict_only", "contrast_only"]
    found = run_evaluation(*world, n=240, seed=1, only=arms)
    by_stratum = {c.stratum: c for c in found.comparisons if c.kind == "design"}
    assert by_stratum["prior"].holds, by_stratum["prior"]
    assert by_stratum["reasoning"].holds, by_stratum["reasoning"]


def test_contrast_resists_wrong_verdicts(world) -> None:
    # Dusk scenes alone, enough of them: an eighth of a mixed draw leaves the interval too wide.
    items = [item for item in draw_items("test", 1920, 1) if item.scene.stratum == "judge_wrong"]
    images = [render(item.scene) for item in items]
    requests = [{"image": image, "prompt": item.request} for image, item in zip(images, items, strict=True)]
    verdicts = SafeCoDe(*world).judge_batch(requests, batch_size=64)
    dusk = Bench(*world, items, images, verdicts, seed=1, batch_size=64)
    outcomes = {name: dusk.outcomes(Arm(name, SafeCoDeConfig(name))) for name in ("safecode", "verdict_only")}
    (comparison,) = [c for c in compare(outcomes, dusk.unsafe, dusk.strata, seed=1) if c.stratum == "judge_wrong"]
    assert comparison.holds, comparison


def test_fresh_scenes_follow_the_split_seed(world) -> None:
    def scores(seed: int):
        return run_evaluation(*world, n=24, seed=seed, only=["plain"], resamples=50).methods["plain"].outcomes

    assert scores(1) == scores(1)
    items = [make_bench(*world, n=4, seed=seed).items for seed in (1, 2)]
    assert items[0] != items[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"n": 1}, "n=1"), ({"seed": -1}, "seed=-1"), ({"only": ["safecod"]}, "safecod")],
)
def test_bad_arguments_are_named(world, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        run_evaluation(*world, **arguments)


def test_demo_scenes_show_both_answers(world) -> None:
    rows = demo_scenes(*world, n=6)
    assert len(rows) == 6
    assert {row.unsafe for row in rows} == {True, False}
    for row in rows:
        assert row.plain
        assert row.safecode
        assert row.verdict.label in ("safe", "unsafe")
        assert row.image.size == (48, 48)


def test_inverted_and_random_verdicts() -> None:
    verdicts = [Verdict("unsafe", 0.9), Verdict("safe", 0.2)] * 50
    inverted = controlled_verdicts(verdicts, "inverted", 0)
    assert [v.label for v in inverted[:2]] == ["safe", "unsafe"]
    assert inverted[0].p_unsafe == pytest.approx(0.1)
    random_ones = controlled_verdicts(verdicts, "random", 0)
    kept = sum(a.label == b.label for a, b in zip(verdicts, random_ones, strict=True))
    assert 30 <= kept <= 70
    assert opposite(opposite(verdicts[0])) == verdicts[0]
    assert opposite(Verdict("safe")).label == "unsafe"
    assert opposite(Verdict("unknown")).label == "unknown"


def test_random_tokens_are_as_many_and_follow_the_same_paths(world) -> None:
    tokenizer = world[1].tokenizer
    vocab_size = len(tokenizer)
    ordinary = [t for t in range(vocab_size) if t not in tokenizer.all_special_ids]
    original = refusal_tokens(tokenizer, vocab_size, "phrase_trie")
    renamed = random_tokens(original, ordinary, vocab_size, seed=0)
    before, after = unpack_mask(original.masks, vocab_size), unpack_mask(renamed.masks, vocab_size)
    assert before.sum(1).tolist() == after.sum(1).tolist()
    assert not after[:, tokenizer.all_special_ids].any()
    overlap = (before & after)[original.start].sum() / before[original.start].sum()
    assert overlap < 0.5
    for token in before[original.start].nonzero().flatten().tolist():
        new = next(t for t in ordinary if renamed.former_name[t] == token)
        assert renamed.next_state(original.start, new) == original.next_state(original.start, token)


def test_controls_break_one_part_of_safecode() -> None:
    default = SafeCoDeConfig()
    for control in make_controls():
        assert control.config is not None
        assert control.config.replace(on_unknown="raise") == default
        assert (control.verdicts, control.noised, control.tokens) != ("judge", "config", "refusal")
    assert [arm.name for arm in make_arms(default)] == ARMS
    assert [arm.name for arm in make_arms(None)] == ARMS[:-1]


def test_tuned_settings_are_kept_beside_the_weights(tmp_path) -> None:
    best = SweepPoint(0.7, 1.0, 1.5, 0.9)
    save_tuned(Sweep([best], [best], 0.7, best), tmp_path)
    assert load_tuned(tmp_path) == best.config()
    assert load_tuned(tmp_path / "elsewhere") is None


def test_the_other_scene_is_another_and_not_always_of_the_same_kind() -> None:
    items = draw_items("test", 480, 0)
    others = other_rows(480, 0)
    assert sorted(others) == list(range(480))
    assert all(row != other for row, other in enumerate(others))
    same = sum(items[row].scene.activity == items[other].scene.activity for row, other in enumerate(others))
    assert same < 480 / 6, "with twelve activities a random other scene shares one in twelve times"
