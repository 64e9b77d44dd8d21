"""A refusal trie over the words of the tiny models, written out by hand."""

from __future__ import annotations

import torch

from safecode_kernels import pack_masks
from tiny_parts import VOCAB


class TinyTrie:
    """Three phrases of tokens; states are the nodes that still have continuations."""

    kind = "phrase_trie"
    start = 0
    phrases = ((20, 30, 40), (20, 31), (25, 26, 27, 28))

    def __init__(self) -> None:
        prefixes = {phrase[:cut] for phrase in self.phrases for cut in range(len(phrase))}
        self._prefixes = sorted(prefixes, key=lambda prefix: (len(prefix), prefix))
        self._state = {prefix: index for index, prefix in enumerate(self._prefixes)}
        self.masks: torch.Tensor = pack_masks([self.allowed(state) for state in range(len(prefixes))], VOCAB)

    def allowed(self, state: int) -> list[int]:
        prefix = self._prefixes[state]
        return sorted({phrase[len(prefix)] for phrase in self.phrases if phrase[: len(prefix)] == prefix})

    @property
    def transitions(self) -> tuple[dict[int, int], ...]:
        states = range(len(self._prefixes))
        return tuple({token: self.next_state(state, token) for token in self.allowed(state)} for state in states)

    def next_state(self, state: int, token: int) -> int:
        return self._state.get((*self._prefixes[state], token), -1)

    def completes(self, state: int, token: int) -> bool:
        return (*self._prefixes[state], token) in self.phrases

    def starts_with_refusal(self, text: str) -> bool:
        return text.startswith("refusal")
