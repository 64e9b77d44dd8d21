"""The command line on the packaged model: `demo`, `world` and `info`."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from safecode_mllm import cli
from safecode_mllm.errors import UnsupportedModelError
from safecode_mllm.info import memory_need
from tiny_models import FAMILY_NAMES, tiny_model


def run(*argv: str) -> int:
    return cli.main(list(argv))


# ---- demo and world ----

ARMS = {"plain", "contrast_only", "verdict_only", "no_plausibility", "vcd", "paper", "safecode"}
RATES = {"unsafe_refused", "safe_answered", "balanced_accuracy", "garbled"}


def test_demo_writes_table_sheet_and_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, results = tmp_path / "out", tmp_path / "results.json"
    assert run("demo", "--n", "12", "--out", str(out), "--json", str(results)) == 0
    shown = capsys.readouterr().out
    methods = json.loads(results.read_text())["methods"]
    assert set(methods) >= ARMS
    for arm, found in methods.items():
        assert re.search(rf"^{arm} +[-\d]", shown, re.MULTILINE), arm
        assert set(found) >= RATES | {"strata"}
        assert all(set(stratum) >= RATES for stratum in found["strata"].values())
    assert Image.open(out / "contact_sheet.png").width > 1000
    assert (out / "contact_sheet.html").read_text().count("<img ") == 24


def test_demo_keeps_the_numbers_when_drawing_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safecode_mllm.cli.demo.draw_sheet", fail)
    results = tmp_path / "results.json"
    assert run("demo", "--n", "2", "--out", str(tmp_path), "--json", str(results)) == 1
    assert set(json.loads(results.read_text())["methods"]) >= ARMS


def test_world_eval_keeps_the_numbers_when_the_report_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise OSError("broken")

    monkeypatch.setattr("safecode_mllm.cli.world._report", fail)
    results = tmp_path / "results.json"
    assert run("world", "eval", "--n", "2", "--json", str(results)) == 1
    assert set(json.loads(results.read_text())["methods"]) >= ARMS


def test_world_eval_adds_intervals_controls_and_comparisons(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    assert run("world", "eval", "--n", "4", "--split-seed", "5", "--controls", "--json", str(results)) == 0
    shown = capsys.readouterr().out
    found = json.loads(results.read_text())
    assert found["split_seed"] == 5
    assert set(found["methods"]["plain"]["intervals"]) == RATES - {"garbled"}
    assert set(found["controls"]) >= {"n_is_z", "judge_alone"}
    assert found["comparisons"][0]["claim"] in shown
    assert run("world", "eval", "--n", "2", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["methods"]) >= ARMS


def test_world_eval_of_a_folder_without_a_model_is_bad_input(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("world", "eval", "--model", str(tmp_path)) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_world_train_saves_a_model_and_tunes_it_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    calls: list[Any] = []

    def fake_train(seed: int, out: str, progress: Any) -> SimpleNamespace:
        progress(1, 2, 0.5)
        calls.append((seed, out))
        return SimpleNamespace(seconds=1.0)

    monkeypatch.setattr(importlib.import_module("safecode_mllm.hazard_world.training"), "train", fake_train)
    tuning = importlib.import_module("safecode_mllm.hazard_world.tuning")
    monkeypatch.setattr(tuning, "tune", lambda model, processor, progress: "sweep")
    monkeypatch.setattr(tuning, "save_tuned", lambda sweep, out: calls.append((sweep, out)))
    monkeypatch.setattr("safecode_mllm.hazard_world.model.load_world", lambda path: ("model", "processor"))
    assert run("world", "train", "--seed", "3", "--out", str(tmp_path)) == 0
    assert run("world", "train", "--seed", "4", "--out", str(tmp_path), "--tune") == 0
    assert calls == [(3, str(tmp_path)), (4, str(tmp_path)), ("sweep", str(tmp_path))]
    assert str(tmp_path) in capsys.readouterr().out


# ---- info ----


def test_info_tells_versions_back_ends_and_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["back_ends"]["eager"] == "usable"
    assert report["versions"]["torch"].startswith("2.")
    assert "Qwen3-VL" in report["models"].values()
    assert run("info") == 0
    assert "LLaVA-NeXT" in capsys.readouterr().out


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_memory_is_what_weights_and_cache_really_take(family: str) -> None:
    tiny = tiny_model(family)
    inputs = tiny.prompts(rows=3)
    with torch.no_grad():
        output = tiny.model(**inputs, use_cache=True)
    cache = getattr(output, "language_model_outputs", output).past_key_values
    rows, tokens = inputs["input_ids"].shape
    need = memory_need(tiny.model.config, "float32", batch=rows, tokens=tokens)
    assert need.weights == sum(parameter.nbytes for parameter in tiny.model.parameters())
    assert need.cache_plain == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert need.cache_guided == 2 * need.cache_plain


def test_memory_of_an_unknown_model_type_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="bert"):
        memory_need(SimpleNamespace(model_type="bert"), "float32", 1, 1)
