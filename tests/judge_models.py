"""Tiny models for judges that run models: one that sees, one that only reads, and a script in place of either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
import transformers

from pipelines import chat_model
from safecode_mllm.judges import guards, local, self_judge, writing
from safecode_mllm.judges.captions import describe
from safecode_mllm.judges.hf_models import JudgeModel
from safecode_mllm.judges.writing import Written
from tiny_processors import byte_level_tokenizer

TEXT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@cache
def seeing(name: str = "llava") -> JudgeModel:
    """The tiny random model of a family that sees."""
    return JudgeModel(*chat_model(name), sees=True)


@cache
def reading() -> JudgeModel:
    """A tiny random text model."""
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = TEXT_TEMPLATE
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(8)  # with the library's own initialisation every prompt has the same answer
    return JudgeModel(model, tokenizer, sees=False)


def short_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let random models, which never come to an end, describe in a few tokens."""
    for module in (self_judge, local, guards):
        monkeypatch.setattr(module, "describe", partial(describe, max_new_tokens=4))


def scripted(monkeypatch: pytest.MonkeyPatch, module: Any, reply: Callable[[str], str | tuple[str, bool]]) -> list[str]:
    """Let replies come from a script instead of the model; returns the list of prompts it will have been given."""
    prompts: list[str] = []

    def write(model: Any, tokenizer: Any, rows: Sequence[Any], *_: Any, **__: Any) -> list[Written]:
        said = []
        for row in rows:
            prompts.append(tokenizer.decode(row["input_ids"][0]))
            text = reply(prompts[-1])
            text, ended = text if isinstance(text, tuple) else (text, True)
            said.append(Written(text, ended, [], []))
        return said

    monkeypatch.setattr(module, "write", write)
    assert writing.write is not write
    return prompts
