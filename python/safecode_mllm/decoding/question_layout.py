"""How questions behind cached prompts are laid out for one pass.

Side by side every question has a row. In a tree the questions about one prompt share a row: what they begin with once,
then the end of each, which sees the beginning and itself:

    [beginning][end of the first question][end of the second] ..

Both give the same logits up to rounding. A tree has fewer positions, and copies the prompt's cache once instead of once
per question; it needs a model that takes a mask of any shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.decoding import kv
from safecode_mllm.decoding.families import decoder_of, family_of, has_encoder, image_layers
from safecode_mllm.decoding.packed import mask_obstacle, own_mask


@dataclass(frozen=True)
class Layout:
    """One pass over Q questions, in N rows of M columns.

    Attributes:
        ids: int64 [N, M], zeros where a column is padding.
        real: int64 [N, M], 0 where a column is padding.
        depth: int64 [N, M], how many tokens of its question stand before a column.
        sees: bool [N, M, M], which column sees which; None where each sees all real ones before it.
        prompts: for each of the N rows the clean row of the prompt that it continues.
        hidden: for each of the N rows how many columns at the end of that prompt it does not see.
        ends: the E columns whose logits are wanted.
        places: for each question the place of its answer among E * N logits, those of all rows at the first end first.
    """

    ids: Tensor
    real: Tensor
    depth: Tensor
    sees: Tensor | None
    prompts: list[int]
    hidden: list[int]
    ends: list[int]
    places: list[int]

    def mask(self, decoder: Any, visible: Tensor) -> Tensor:
        """Return the mask of the pass; `visible`, int64 [N, C], says which columns of their prompts the rows see."""
        if self.sees is None:
            return torch.cat([visible, self.real], 1)
        prompt = visible.bool()[:, None, :].expand(-1, self.sees.shape[1], -1)
        return own_mask(decoder, torch.cat([prompt, self.sees], -1))


def tree_obstacle(model: Any) -> str | None:
    """Return why questions about one prompt do not share a row, in a sentence; None if they do."""
    family = family_of(model)
    if family.reads_ahead or has_encoder(decoder_of(model)):
        return "the model reads a prompt as a whole, so that each question takes a pass over all of it"
    if not family.verified:
        return f"for {family.title} it has not been shown that a mask of any shape changes nothing"
    if image_layers(decoder_of(model)):
        return "the model has layers that hold images, which take a mask of their own"
    return mask_obstacle(decoder_of(model))


def layouts(
    model: Any, suffixes: Sequence[Sequence[int]], hidden: Sequence[int], rows: Sequence[int], device: torch.device
) -> list[tuple[list[int], Layout]]:
    """Return the passes that ask Q questions: for each, which questions it asks, and how.

    Args:
        model: a Hugging Face model of a supported family.
        suffixes: Q sequences of token ids.
        hidden: for each, how many columns at the end of the prompt it must not see.
        rows: for each, the clean row that it continues.
        device: where the tensors are wanted.
    """
    if tree_obstacle(model) is None:
        return [(list(range(len(suffixes))), as_trees(suffixes, hidden, rows, device))]
    # A sliding window counts hidden columns and padding too: where there is one, only questions that need neither may
    # run together.
    sliding = kv.has_sliding_window(decoder_of(model))
    keys = [(drop, len(suffix)) if sliding else () for suffix, drop in zip(suffixes, hidden, strict=True)]
    found = []
    for key in dict.fromkeys(keys):
        asked = [place for place, own in enumerate(keys) if own == key]
        own_suffixes = [suffixes[place] for place in asked]
        own_hidden, own_rows = [hidden[place] for place in asked], [rows[place] for place in asked]
        found.append((asked, side_by_side(own_suffixes, own_hidden, own_rows, device)))
    return found


def side_by_side(
    suffixes: Sequence[Sequence[int]], hidden: Sequence[int], rows: Sequence[int], device: torch.device
) -> Layout:
    """Return a row per question, padded on the left; arguments as for `layouts`."""
    ids, real = left_pad(suffixes, device)
    depth = (real.cumsum(-1) - 1).clamp_min(0)
    return Layout(ids, real, depth, None, list(rows), list(hidden), [-1], list(range(len(suffixes))))


def as_trees(
    suffixes: Sequence[Sequence[int]], hidden: Sequence[int], rows: Sequence[int], device: torch.device
) -> Layout:
    """Return a row per prompt and number of hidden columns; arguments as for `layouts`.

    Each part of a row is padded on the left to the longest in any row, so that all rows end their questions in the same
    columns.
    """
    asked: dict[tuple[int, int], list[int]] = {}
    for place, key in enumerate(zip(rows, hidden, strict=True)):
        asked.setdefault(key, []).append(place)
    groups = list(asked.values())
    trees = [_tree([suffixes[place] for place in group]) for group in groups]
    most = max(map(len, trees))
    padded = [left_pad([tree[part] if part < len(tree) else [] for tree in trees], device) for part in range(most)]
    ids, real = (torch.cat(tensors, 1) for tensors in zip(*padded, strict=True))
    widths = torch.tensor([part.shape[1] for part, _ in padded])
    owner = torch.arange(most).repeat_interleave(widths).to(device)
    index = torch.arange(len(owner), device=device)
    same_question = (owner[None, :] == owner[:, None]) | (owner[None, :] == 0)
    before = (index[None, :] < index[:, None]) & same_question & real[:, None, :].bool()
    # A padding column sees itself: a row of a softmax must not be empty.
    sees = before | torch.eye(len(index), dtype=torch.bool, device=device)
    places = [0] * len(suffixes)
    for row, group in enumerate(groups):
        for order, place in enumerate(group):
            places[place] = order * len(groups) + row
    return Layout(
        ids=ids,
        real=real,
        depth=before.sum(-1),
        sees=sees,
        prompts=[row for row, _ in asked],
        hidden=[drop for _, drop in asked],
        ends=(widths.cumsum(0)[1:] - 1).tolist(),
        places=places,
    )


def _tree(suffixes: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Cut questions into what they all begin with and the end of each; no end is empty."""
    columns = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*suffixes, strict=False))
    shared = min(sum(1 for _ in columns), min(map(len, suffixes)) - 1)
    return [suffixes[0][:shared], *(suffix[shared:] for suffix in suffixes)]


def left_pad(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids int64 [Q, N], zeros on the left of shorter ones, and their mask."""
    width = max(len(sequence) for sequence in sequences)
    padded = [[0] * (width - len(sequence)) + list(sequence) for sequence in sequences]
    mask = [[0] * (width - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    ids, real = (torch.tensor(rows, dtype=torch.long, device=device) for rows in (padded, mask))
    return ids, real
