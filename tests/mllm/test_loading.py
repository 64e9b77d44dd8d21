"""Loading: what is incomplete, broken or of an unknown kind is refused by name; nothing stays random in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from safecode_mllm import cli
from safecode_mllm.errors import ModelError, UnsupportedModelError
from safecode_mllm.loading import load_model
from tiny_models import tiny_chat_model

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    model, processor = tiny_chat_model("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A model folder that a test may spoil."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def projector_bias(weights: dict[str, torch.Tensor]) -> str:
    return next(name for name in weights if name.endswith("multi_modal_projector.linear_1.bias"))


def save(weights: dict[str, torch.Tensor], folder: Path) -> None:
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_saved_model_comes_back_in_the_dtype_asked_for(saved: Path) -> None:
    model, processor = load_model(str(saved), device="cpu", dtype="bfloat16")
    stored = load_file(saved / WEIGHTS)
    loaded = dict(model.named_parameters())["model.multi_modal_projector.linear_1.bias"]
    assert torch.equal(loaded, stored[projector_bias(stored)].bfloat16())
    assert processor.tokenizer is not None


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_are_not_missing(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_chat_model("qwen2_vl")
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = tied
    type(model)(model.config).save_pretrained(tmp_path)
    assert any("lm_head" in name for name in load_file(tmp_path / WEIGHTS)) is not tied
    # Without torchvision a Qwen processor cannot be loaded; it is not what is tested here.
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    loaded, _ = load_model(str(tmp_path), device="cpu")
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied


def test_missing_weights_are_refused_by_name(copy: Path) -> None:
    weights = load_file(copy / WEIGHTS)
    del weights[projector_bias(weights)]
    save(weights, copy)
    with pytest.raises(ModelError, match=r"1 of its weights are missing .*multi_modal_projector\.linear_1\.bias"):
        load_model(str(copy), device="cpu")


def test_weights_of_another_shape_are_refused_by_name(copy: Path) -> None:
    weights = load_file(copy / WEIGHTS)
    weights[projector_bias(weights)] = torch.zeros(3)
    save(weights, copy)
    with pytest.raises(ModelError, match=r"1 of its weights have another shape .*projector\.linear_1\.bias"):
        load_model(str(copy), device="cpu")


def test_a_truncated_file_is_refused(copy: Path) -> None:
    data = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="SafetensorError"):
        load_model(str(copy), device="cpu")


def test_an_unknown_model_type_is_refused_before_its_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", fail)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", fail)
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="'bert'"):
        load_model(str(tmp_path), device="cpu")


def test_the_packaged_model_honours_dtype() -> None:
    assert load_model("hazard-world", device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load_model("hazard-world", device="cpu")[0].dtype == torch.float32


def test_the_home_folder_is_expanded(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert load_model(f"~/{saved.name}", device="cpu")[0].config.model_type == "llava"
    assert cli.main(["info", "--model", f"~/{saved.name}"]) == 0
    assert "memory of" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_model("./nowhere/at/all")
    assert cli.main(["info", "--model", "./nowhere/at/all"]) == 2
    assert "no such folder" in capsys.readouterr().err
