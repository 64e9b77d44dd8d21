"""Training: packed batches compute what separate ones would, and a seed gives its losses again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safecode_mllm.hazard_world.data import TASKS, Batcher
from safecode_mllm.hazard_world.model import build_model, build_processor
from safecode_mllm.hazard_world.paths import TUNED_FILE
from safecode_mllm.hazard_world.saving import save_world
from safecode_mllm.hazard_world.training import task_losses, train
from safecode_mllm.reasons import REASON_OPENING


@pytest.fixture
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safecode_mllm.hazard_world.training.PICTURES_PER_STEP", 4)
    monkeypatch.setattr("safecode_mllm.hazard_world.seeing.PICTURES_PER_STEP", 16)


@pytest.fixture(scope="module")
def untrained():
    torch.set_num_threads(1)
    processor = build_processor()
    return build_model(processor.tokenizer, seed=0).eval(), processor


def test_a_packed_row_gives_the_logits_of_its_tasks_alone(untrained) -> None:
    model, processor = untrained
    batch = Batcher(processor, seed=0).draw(3)
    image = model.config.image_token_index
    with torch.no_grad():
        hidden = model.model(
            pixel_values=batch.pixel_values,
            input_ids=batch.input_ids,
            attention_mask=batch.mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        packed = model.lm_head(hidden)
    for row, column in zip(batch.first.rows.tolist(), batch.first.columns.tolist(), strict=True):
        visible = batch.mask[row, 0, column].nonzero().flatten()
        ids = batch.input_ids[row, visible][None]
        assert batch.position_ids[row, visible].tolist() == list(range(len(visible)))
        seen = {"pixel_values": batch.pixel_values[row : row + 1]} if (ids == image).any() else {}
        with torch.no_grad():
            alone = model(input_ids=ids, **seen).logits[0, -1]
        torch.testing.assert_close(packed[row, column], alone, atol=1e-5, rtol=1e-5)


def test_the_visible_tokens_of_a_task_are_its_own_prompt(untrained) -> None:
    _, processor = untrained
    batch = Batcher(processor, seed=1).draw(2)
    texts = {}
    for row, column, task in zip(
        *(t.tolist() for t in (batch.first.rows, batch.first.columns, batch.first.tasks)), strict=True
    ):
        ids = batch.input_ids[row, batch.mask[row, 0, column]]
        texts[row, TASKS[task]] = processor.tokenizer.decode(ids).replace("<image>", "")
    for row in range(2):
        assert all(texts[row, task].endswith("ASSISTANT:") for task in TASKS if task != "reason")
        assert texts[row, "reason"].endswith(REASON_OPENING)
        assert "A description of " in texts[row, "described"]
        request = texts[row, "answer"].removesuffix(" ASSISTANT:")
        assert texts[row, "judge"].startswith(request + "\n\nLook at the image.")
        assert texts[row, "caption"].endswith("\nDescribe the image. ASSISTANT:")


def test_first_targets_are_distributions(untrained) -> None:
    _, processor = untrained
    labels = Batcher(processor, seed=2).draw(8).first.labels
    torch.testing.assert_close(labels.sum(-1), torch.ones(len(labels)))


@pytest.mark.usefixtures("_small_steps")
def test_a_few_steps_reduce_the_loss_and_a_seed_repeats_itself() -> None:
    first = train(3, None, steps=3, vision_steps=12)
    again = train(3, None, steps=3, vision_steps=12)
    other = train(4, None, steps=1, vision_steps=1)
    assert first.losses == again.losses
    assert first.vision_losses == again.vision_losses
    assert first.losses[0] != other.losses[0]
    assert first.losses[-1] < first.losses[0]
    assert sum(first.vision_losses[-3:]) < sum(first.vision_losses[:3])


@pytest.mark.usefixtures("_small_steps")
def test_training_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    train(0, None, steps=1, vision_steps=1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.usefixtures("_small_steps")
def test_progress_counts_both_stages() -> None:
    seen: list[tuple[int, int]] = []
    train(0, None, lambda done, total, loss: seen.append((done, total)), steps=1, vision_steps=1)
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(("arguments", "name"), [({"seed": -1}, "seed"), ({"seed": 0, "steps": 0}, "steps")])
def test_bad_arguments_are_named(arguments: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        train(out=None, **arguments)


def test_a_folder_that_cannot_be_made_ends_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr("safecode_mllm.hazard_world.training.train_vision", fail)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        train(0, tmp_path / "file" / "out")


def test_a_new_model_removes_the_settings_of_the_old_one(untrained, tmp_path: Path) -> None:
    (tmp_path / TUNED_FILE).write_text("{}")
    save_world(*untrained, tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / TUNED_FILE).exists()


def test_task_losses_name_every_task(untrained) -> None:
    model, processor = untrained
    losses = task_losses(model, Batcher(processor, seed=5).draw(2))
    assert list(losses) == list(TASKS)
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_train_is_the_function_even_after_its_module_was_imported() -> None:
    import safecode_mllm.hazard_world as world

    assert world.train is train
    assert all(callable(getattr(world, name)) or name == "WEIGHTS" for name in world.__all__)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = world.nothing_like_it
