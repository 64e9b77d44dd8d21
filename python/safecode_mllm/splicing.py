"""Other texts around the expanded pictures of a prompt: where each picture's tokens are, and what takes their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from safecode_mllm.errors import PromptError


def segments(ids: Sequence[int], placeholder: int) -> list[list[int]]:
    """Return what stands before, between and behind the placeholders."""
    found: list[list[int]] = [[]]
    for token in ids:
        if token == placeholder:
            found.append([])
        else:
            found[-1].append(token)
    return found


def blocks(parts: Sequence[Sequence[int]], expanded: Sequence[int]) -> list[tuple[int, int]] | None:
    """Return the columns [start, end) of each picture in `expanded`, or None if anything else differs from `parts`.

    Args:
        parts: what stands before, between and behind the pictures.
        expanded: the whole, each picture at least one column.
    """
    head, *rest = [list(part) for part in parts]
    expanded = list(expanded)
    if expanded[: len(head)] != head:
        return None
    if not rest:
        return [] if len(expanded) == len(head) else None
    found, start = [], len(head)
    for part in rest[:-1]:
        end = next((at for at in range(start + 1, len(expanded)) if expanded[at : at + len(part)] == part), None)
        if end is None:
            return None
        found.append((start, end))
        start = end + len(part)
    end = len(expanded) - len(rest[-1])
    if end <= start or expanded[end:] != rest[-1]:
        return None
    return [*found, (start, end)]


def splice(
    output: Mapping[str, Tensor], harmless: Sequence[int], ids: Sequence[int], placeholder: int
) -> dict[str, Tensor]:
    """Return a processor's output for a harmless conversation with the ids of another one around its pictures.

    Args:
        output: a batch of 1; every key that runs along the tokens follows.
        harmless: the harmless conversation's ids, pictures not expanded.
        ids: the other's, with as many pictures in the same order.
        placeholder: what stands for a picture in both.

    Raises:
        PromptError: the processor changed more than the placeholders.
    """
    old, new = segments(harmless, placeholder), segments(ids, placeholder)
    # Pictures with the same text between them stay together: only a user's text tells for sure where one ends.
    if len(old) == 1:  # no picture: every column is text, and any one serves as the model of the others
        first = torch.zeros(len(ids), dtype=torch.long)
        alone = {k: v[:, first] if runs_along_tokens(v, output["input_ids"][0]) else v for k, v in output.items()}
        return alone | {"input_ids": torch.tensor([list(ids)])}
    kept = [place for place in range(len(old)) if place in (0, len(old) - 1) or old[place] != new[place]]
    old, new = [old[place] for place in kept], [new[place] for place in kept]
    expanded = output["input_ids"][0]
    found = blocks(old, expanded.tolist())
    if found is None:
        raise PromptError("processor: it changes more of a conversation than the placeholders of its pictures")
    columns: list[int] = []
    written: list[int] = []
    previous_end = 0
    for (start, end), part in zip([*found, (len(expanded), len(expanded))], new, strict=True):
        # The last column of the harmless text serves as the model of the others.
        text_column = start - 1 if start > previous_end else max(previous_end - 1, 0)
        columns += [text_column] * len(part) + list(range(start, end))
        written += [*part, *expanded[start:end].tolist()]
        previous_end = end
    index = torch.tensor(columns)
    spliced = {key: value[:, index] if runs_along_tokens(value, expanded) else value for key, value in output.items()}
    return spliced | {"input_ids": torch.tensor([written], dtype=expanded.dtype)}


def runs_along_tokens(value: Tensor, ids: Tensor) -> bool:
    """Whether a processor's value has one entry per token of `ids`, int64 [T], and is no picture."""
    return not value.is_floating_point() and value.ndim >= 2 and value.shape[1] == len(ids)
