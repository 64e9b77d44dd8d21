"""Models as people load them: half precision, quantised, spread by accelerate, with PEFT adapters."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from habits import by_chat, new_ids, two_prompts
from pipelines import CONFIG, chat_model
from safecode_mllm import SafeCoDe, SafeCoDeLogitsProcessor, generate_fn
from safecode_mllm.errors import UnsupportedModelError
from tiny_models import noised_copy

GREEDY = dict(max_new_tokens=7, min_new_tokens=7)
NAMES = ("llava", "qwen2_5_vl")


def answers(model: Any, name: str, *, rows_are_independent: bool = True) -> list[list[int]]:
    """The ids of the front door, after asserting that the other ways write the same."""
    inputs, processor = two_prompts(name), chat_model(name)[1]
    wanted = by_chat(SafeCoDe(model, processor, judge="unsafe", config=CONFIG), **GREEDY)
    steering = dict(verdict="unsafe", config=CONFIG, seed=5)
    function = generate_fn(processor, **steering)
    assert new_ids(model.generate(**inputs, custom_generate=function, **GREEDY), inputs, wanted) == wanted
    assert new_ids(function.generate(model, **inputs, **GREEDY), inputs, wanted) == wanted
    processors = [SafeCoDeLogitsProcessor(model, processor, inputs, **steering)]
    stock_inputs = {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    # A branch of its own has other neighbours than the loop's rows, which must not matter to it.
    if rows_are_independent:
        output = model.generate(**stock_inputs, logits_processor=processors, **GREEDY)
        assert new_ids(output, inputs, wanted) == wanted
    return wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(chat_model(name)[0]).to(dtype)
    # Matrices of B and of 2B rows round differently in half precision.
    assert all(len(ids) == 7 for ids in answers(model, name, rows_are_independent=False))
    # Contrast and bias are computed in float32 from the half-precision logits: near the float32 model's scores.
    inputs, scores = two_prompts(name), []
    for each in (model, chat_model(name)[0]):
        function = generate_fn(chat_model(name)[1], verdict="unsafe", config=CONFIG, noised=noised_copy(inputs))
        output = each.generate(
            **inputs, custom_generate=function, max_new_tokens=1, return_dict_in_generate=True, output_scores=True
        )
        scores.append(output.scores[0])
    half, full = scores
    assert half.dtype == torch.float32
    both = half.isfinite() & full.isfinite()
    assert both.any()
    # 8 bits of mantissa through three layers, then doubled by the contrast.
    torch.testing.assert_close(half[both], full[both], rtol=0, atol=0.6 if dtype == torch.bfloat16 else 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_spread_by_accelerate(name: str) -> None:
    accelerate = pytest.importorskip("accelerate", exc_type=ImportError)
    plain = chat_model(name)[0]
    wanted = answers(plain, name)
    model = copy.deepcopy(plain)
    # What device_map="auto" does on a machine without a GPU: a map, and hooks on every part.
    parts = {part: "cpu" for part, _ in model.named_children()}
    dispatched = accelerate.dispatch_model(model, device_map=parts, force_hooks=True)
    assert dispatched.hf_device_map == parts
    assert answers(dispatched, name) == wanted


def test_device_map_auto(tmp_path: Any) -> None:
    pytest.importorskip("accelerate", exc_type=ImportError)
    plain = chat_model("llava")[0]
    plain.save_pretrained(tmp_path)
    model = type(plain).from_pretrained(tmp_path, device_map="auto")
    assert answers(model, "llava") == answers(plain.to(model.device), "llava")
    plain.to("cpu")


@pytest.mark.parametrize("name", NAMES)
def test_quantised_linear_layers(name: str) -> None:
    plain = copy.deepcopy(chat_model(name)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has moved quantisation to torchao; this part of it still works
        quantised = torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear}, dtype=torch.qint8)
    assert not isinstance(quantised.get_output_embeddings().weight, torch.Tensor)
    # This kind of quantisation has one scale for the activations of a whole batch.
    got = answers(quantised, name, rows_are_independent=False)
    assert all(len(ids) == 7 for ids in got)


@pytest.mark.parametrize("name", NAMES)
def test_peft_adapters_take_part(name: str) -> None:
    peft = pytest.importorskip("peft", exc_type=ImportError)
    plain = chat_model(name)[0]
    wanted = answers(plain, name)
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_alpha=64)
    wrapped = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    adapted = answers(wrapped, name)
    assert adapted != wanted
    with wrapped.disable_adapter():
        assert answers(wrapped, name) == wanted
    assert answers(wrapped.merge_and_unload(), name) == adapted


def test_learned_prompts_are_refused() -> None:
    peft = pytest.importorskip("peft", exc_type=ImportError)
    model, processor = chat_model("llava")
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=3, token_dim=64, num_attention_heads=4,
        num_transformer_submodules=1,
    )  # fmt: skip
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    with pytest.raises(UnsupportedModelError, match="use an adapter of weights, such as LoRA"):
        SafeCoDe(wrapped, processor)
