"""Models of transformers as writers: batched greedy replies, with the probability of a label inside one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.judges.logprobs import SAFE_UNSAFE_WEIGHTS, Weights, label_of_token, weighted
from safecode_mllm.prompts import collate


@dataclass(frozen=True)
class Written:
    """One reply.

    Attributes:
        text: the reply without special tokens at its end.
        ended: whether the model ended it itself; one that was cut off may have gone on to say the contrary.
        token_ids: the reply's tokens.
        logits: per token what the model gave, fp32 [V]; empty where they were not asked for.
    """

    text: str
    ended: bool
    token_ids: list[int]
    logits: list[Tensor]


@torch.no_grad()
def write(
    model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Tensor]], max_new_tokens: int, *, keep_logits: bool = False
) -> list[Written]:
    """Return a greedy reply to each prompt.

    Args:
        model: a generating model of transformers.
        tokenizer: its tokenizer.
        rows: processor outputs, batches of one.
        max_new_tokens: longest reply.
        keep_logits: keep the logits of every token; V x 4 bytes each.
    """
    written: list[Written] = []
    for batch in _batches(rows):
        written += _write_batch(model, tokenizer, batch, max_new_tokens, keep_logits)
    return written


@torch.no_grad()
def next_logits(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Return what a model would say next after each prompt: logits fp32 [B, V]."""
    logits = []
    for batch in _batches(rows):
        pad = _pad_id(tokenizer)
        output = model.generate(**on_device(collate(batch, pad), model), **_greedy(pad, 1), output_logits=True)
        logits.append(output.logits[0].float())
    return torch.cat(logits)


def _pad_id(tokenizer: Any) -> int:
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def _greedy(pad: int, max_new_tokens: int) -> dict[str, Any]:
    """Arguments of a greedy generation, whatever a model's own generation_config says."""
    return {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": max_new_tokens,
        "pad_token_id": pad,
        "return_dict_in_generate": True,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }


def _batches(rows: Sequence[Mapping[str, Tensor]]) -> list[Sequence[Mapping[str, Tensor]]]:
    """Return the rows as one batch, or singly where a tensor runs along the tokens in a way that cannot be padded."""
    if not rows:
        return []
    length = rows[0]["input_ids"].shape[1]
    entangled = any(value.ndim > 2 and value.shape[1] == length for value in rows[0].values())
    return [[row] for row in rows] if entangled else [rows]


def _write_batch(
    model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Tensor]], max_new_tokens: int, keep_logits: bool
) -> list[Written]:
    pad = _pad_id(tokenizer)
    inputs = on_device(collate(rows, pad), model)
    output = model.generate(**inputs, **_greedy(pad, max_new_tokens), output_logits=keep_logits)
    new_ids = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    ends, logits = _end_ids(model, tokenizer), output.logits if keep_logits else ()
    return [_written(tokenizer, ids, ends, logits, row) for row, ids in enumerate(new_ids)]


def _written(tokenizer: Any, ids: list[int], ends: set[int], logits: Sequence[Tensor], row: int) -> Written:
    length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    kept = ids[:length]
    text = tokenizer.decode(kept, skip_special_tokens=False)
    return Written(text, length < len(ids), kept, [step[row].float() for step in logits[:length]])


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    found: set[int] = set()
    for value in (model.generation_config.eos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return found


def on_device(inputs: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return inputs on the model's device, pictures in its dtype."""
    dtype = model.dtype
    return {key: value.to(model.device, dtype if value.is_floating_point() else None) for key, value in inputs.items()}


def p_unsafe_at(written: Written, tokenizer: Any, place: int, weights: Weights = SAFE_UNSAFE_WEIGHTS) -> float | None:
    """Return P(unsafe) at the token of a reply that holds the character at `place`; None if it holds no label."""
    if not written.logits:
        return None
    step = _token_at(written, tokenizer, place)
    vocabulary = tokenizer.convert_ids_to_tokens(written.token_ids[step])
    if label_of_token(vocabulary, weights) is None:
        return None
    return weighted(label_mass(written.logits[step], tokenizer, weights), weights)


def _token_at(written: Written, tokenizer: Any, place: int) -> int:
    """Return the index of the first token whose text reaches beyond a character."""
    low, high = 0, len(written.token_ids) - 1
    while low < high:
        middle = (low + high) // 2
        if len(tokenizer.decode(written.token_ids[: middle + 1], skip_special_tokens=False)) > place:
            high = middle
        else:
            low = middle + 1
    return low


def label_mass(logits: Tensor, tokenizer: Any, weights: Weights = SAFE_UNSAFE_WEIGHTS) -> dict[str, float]:
    """Return the probability mass of each label in logits [V]."""
    probabilities = torch.softmax(logits.double(), -1)
    ids = _label_ids(tokenizer, tuple(weights))
    return {label: float(probabilities[ids[label]].sum()) for label in weights}


@lru_cache(maxsize=16)
def _label_ids(tokenizer: Any, labels: tuple[str, ...]) -> dict[str, list[int]]:
    """Return for each label the ids of all tokens that begin it and no other."""
    found: dict[str, list[int]] = {label: [] for label in labels}
    for token, index in tokenizer.get_vocab().items():
        label = label_of_token(token, labels)
        if label is not None:
            found[label].append(index)
    return found
