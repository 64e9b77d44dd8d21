"""What a refusal begins with, as token masks for any tokenizer."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from safecode_kernels.bitmask import pack_masks
from safecode_mllm.config import RefusalKind

# Openings after which an answer is a refusal. None is the beginning of another: the shorter one would end the bias.
REFUSAL_OPENINGS: tuple[str, ...] = (
    "I cannot",
    "I can't",
    "I am sorry",
    "I'm sorry",
    "I am unable",
    "I'm unable",
    "I am not able to",
    "I'm not able to",
    "I won't",
    "I will not",
    "I must decline",
    "I have to decline",
    "I apologize",
    "I'm afraid I",
    "I would rather not",
    "I shouldn't",
    "Sorry",
    "Unfortunately",
    "My apologies",
    "Apologies",
    "As an AI",
    "It is not safe",
    "It's not safe",
    "That is not safe",
    "That's not safe",
    "This is not safe",
    "For safety reasons",
)

# Openings of helpful answers that share a first word with refusals: they outvote a first token such as "I" or "As".
BENIGN_OPENINGS: tuple[str, ...] = (
    "I can see",
    "I can help",
    "I see",
    "I think",
    "I believe",
    "I would suggest",
    "I would recommend",
    "I would start",
    "I recommend",
    "I suggest",
    "I like",
    "I love",
    "I hope",
    "I notice",
    "I understand",
    "I know",
    "I'd be happy",
    "I'd say",
    "I'd start",
    "I'll explain",
    "I'll walk you through",
    "I'm glad",
    "I'm happy to",
    "I've listed",
    "As you can see",
    "As shown",
    "As for",
    "As a first step",
    "It is a",
    "It looks like",
    "It seems",
    "It depends",
    "It's a",
    "That is a",
    "That looks",
    "That's a",
    "This is a",
    "This looks like",
    "This picture",
    "My suggestion",
    "My favourite",
    "For this",
    "For best results",
    "For example",
    "Sure",
    "Yes",
    "You can",
    "To do this",
    "Here are",
    "Here is",
    "The image shows",
    "The picture",
    "First",
    "Start by",
    "There are",
    "There is",
    "Of course",
    "Absolutely",
    "Great question",
)

# The state of a row whose bias has ended.
ENDED = -1
# Marks the end of a phrase in a trie under construction.
_END: dict[int, Any] = {}
# What an answer may stand behind: a fresh line, or text that it follows after a space.
_LINE_ANCHOR = "\n"
_WORD_ANCHOR = ":"
# What may stand before a refusal without making it another one: quotes, emphasis, list marks.
_LEADING_MARKS = " \t\r\n\"'`*_#>-\u201c\u201d\u2018\u2019"


@dataclass(frozen=True, eq=False)
class RefusalTokens:
    """Which tokens begin or continue a refusal, and where in one a row is.

    Attributes:
        kind: "phrase_trie": a state is a place in a phrase, and its mask holds the tokens that continue any phrase from
            there. "first_tokens": one state and one mask, which never end.
        masks: int32 [M, ceil(V / 32)] on the CPU; bit i of word w is token 32 w + i; row = state.
        start: the state before the first generated token.
        transitions: phrase_trie only: for each state the next one by token, -1 at the end of a phrase.
    """

    kind: RefusalKind
    masks: Tensor
    start: int = 0
    transitions: tuple[dict[int, int], ...] = field(default=(), repr=False)

    def next_state(self, state: int, token: int) -> int:
        """Return the state after `token` was generated in `state`; -1 at the end of a phrase or off all of them."""
        if state == ENDED or self.kind == "first_tokens":
            return state
        return self.transitions[state].get(int(token), ENDED)

    def completes(self, state: int, token: int) -> bool:
        """Whether `token` in `state` ends a refusal phrase, as against leaving all of them."""
        if state == ENDED or not self.transitions:
            return False
        return self.transitions[state].get(int(token)) == ENDED

    def starts_with_refusal(self, text: str) -> bool:
        """Return whether `text` opens with a refusal phrase as whole words, whatever its case and apostrophes."""
        return starts_with_refusal(text)


def starts_with_refusal(text: str) -> bool:
    """Return whether `text` opens with a refusal phrase as whole words, whatever its case and apostrophes."""
    # Twice the longest phrase leaves room for repeated spaces.
    plain = " ".join(_straight(text.lstrip(_LEADING_MARKS)[:_HEAD]).casefold().split())
    return any(plain.startswith(phrase) and not plain[len(phrase) : len(phrase) + 1].isalnum() for phrase in _FOLDED)


def _straight(text: str) -> str:
    return text.replace("\u2019", "'").replace("\u2018", "'").replace("\u02bc", "'")


_FOLDED = tuple(phrase.casefold() for phrase in REFUSAL_OPENINGS)
_HEAD = 2 * max(map(len, REFUSAL_OPENINGS)) + 2

_cache: weakref.WeakKeyDictionary[Any, dict[tuple[int, int, str], RefusalTokens]] = weakref.WeakKeyDictionary()
_cache_lock = threading.Lock()


def refusal_tokens(tokenizer: Any, vocab_size: int, kind: RefusalKind = "phrase_trie") -> RefusalTokens:
    """Return the refusal tokens of a tokenizer, built once per tokenizer object.

    Args:
        tokenizer: any tokenizer of transformers: byte-level BPE, SentencePiece, WordPiece.
        vocab_size: V, the width of the model's logits; token ids at or above it are left out.
        kind: "phrase_trie" or "first_tokens". Of the first tokens only those stay with which more than half of
            REFUSAL_OPENINGS and BENIGN_OPENINGS that begin so are refusals.

    Returns:
        Masks that never hold a special token; a tokenizer that can write no phrase gets one empty mask.
    """
    # Tokens may be added to a tokenizer after it was first seen; its length tells.
    key = (int(vocab_size), len(tokenizer), kind)
    with _cache_lock:
        known = _cache.setdefault(tokenizer, {})
        if key not in known:
            known[key] = _phrase_trie(tokenizer, key[0]) if kind == "phrase_trie" else _first_tokens(tokenizer, key[0])
        return known[key]


def _phrase_trie(tokenizer: Any, vocab_size: int) -> RefusalTokens:
    trie: dict[int, Any] = {}
    for ids in sorted(_all_sequences(tokenizer, vocab_size, REFUSAL_OPENINGS), key=len):
        _insert(trie, ids)
    states: dict[tuple[tuple[int, int], ...], int] = {}
    start = _number_states(trie, states)
    masks = pack_masks([[token for token, _ in moves] for moves in states], vocab_size)
    return RefusalTokens("phrase_trie", masks, start, tuple(dict(moves) for moves in states))


def _insert(trie: dict[int, Any], ids: Sequence[int]) -> None:
    """Add one sequence, shorter ones first; where one sequence begins another, only the shorter stays."""
    node = trie
    for token in ids[:-1]:
        node = node.setdefault(token, {})
        if node is _END:
            return
    node.setdefault(ids[-1], _END)


def _number_states(node: dict[int, Any], states: dict[tuple[tuple[int, int], ...], int]) -> int:
    """Number the places of a trie; places that continue alike become one state, hence one mask."""
    if node is _END:
        return ENDED
    moves = tuple(sorted((token, _number_states(child, states)) for token, child in node.items()))
    return states.setdefault(moves, len(states))


def _first_tokens(tokenizer: Any, vocab_size: int) -> RefusalTokens:
    refusing = _openings_by_first_token(tokenizer, vocab_size, REFUSAL_OPENINGS)
    benign = _openings_by_first_token(tokenizer, vocab_size, BENIGN_OPENINGS)
    kept = [token for token, count in refusing.items() if count > benign.get(token, 0)]
    return RefusalTokens("first_tokens", pack_masks([sorted(kept)], vocab_size))


def _openings_by_first_token(tokenizer: Any, vocab_size: int, openings: Iterable[str]) -> dict[int, int]:
    """Count for each token how many openings have a variant that starts with it."""
    counts: dict[int, int] = {}
    for opening in openings:
        for token in {ids[0] for ids in _all_sequences(tokenizer, vocab_size, (opening,))}:
            counts[token] = counts.get(token, 0) + 1
    return counts


def _all_sequences(tokenizer: Any, vocab_size: int, openings: Iterable[str]) -> list[tuple[int, ...]]:
    """Return the id sequences of all openings in all spellings and places, without duplicates, in order."""
    # A byte that the vocabulary lacks comes back as the unknown token, which is special too.
    barred = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    if tokenizer.unk_token_id is not None:
        barred.add(tokenizer.unk_token_id)
    found: dict[tuple[int, ...], None] = {}
    for opening in openings:
        for spelling in _spellings(opening):
            for ids in _placements(tokenizer, spelling):
                if ids and not barred.intersection(ids) and max(ids) < vocab_size:
                    found[tuple(ids)] = None
    return list(found)


def _spellings(opening: str) -> Iterator[str]:
    for text in dict.fromkeys((opening, opening[0].lower() + opening[1:], opening.lower())):
        yield text
        if "'" in text:
            yield text.replace("'", "\u2019")


def _placements(tokenizer: Any, text: str) -> Iterator[list[int]]:
    """Yield the ids of `text` at the start of a text, after a line break, and after a word and a space."""

    def encode(piece: str) -> list[int]:
        return list(tokenizer(piece, add_special_tokens=False)["input_ids"])

    yield encode(text)
    # A leading space is encoded behind a word: alone, SentencePiece would write two of them.
    for anchor, piece in ((_LINE_ANCHOR, text), (_WORD_ANCHOR, " " + text)):
        before, whole = encode(anchor), encode(anchor + piece)
        if whole[: len(before)] == before:
            yield whole[len(before) :]
