"""Refusal tokens on the three kinds of tokenizer: walks along phrases, masks, weighing, caching."""

from __future__ import annotations

import gc
import threading
import weakref
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from safecode_kernels.bitmask import unpack_mask
from safecode_mllm import refusal
from safecode_mllm.refusal import BENIGN_OPENINGS, ENDED, REFUSAL_OPENINGS, refusal_tokens, starts_with_refusal
from tiny_processors import byte_level_tokenizer, sentencepiece_like_tokenizer, wordpiece_tokenizer

TOKENIZERS = {
    "byte_level": byte_level_tokenizer,
    "sentencepiece_old": lambda: sentencepiece_like_tokenizer(True),
    "sentencepiece_new": lambda: sentencepiece_like_tokenizer(False),
    "wordpiece": wordpiece_tokenizer,
}
CURLY = "\u2019"


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def behind(tokenizer: Any, context: str, text: str) -> list[int]:
    """The ids that `text` has behind `context`: what a model generates there."""
    before, whole = encode(tokenizer, context), encode(tokenizer, context + text)
    assert whole[: len(before)] == before
    return whole[len(before) :]


@cache
def mask_sets(tokens: refusal.RefusalTokens, width: int) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in unpack_mask(tokens.masks, width)]


def allowed(tokens: refusal.RefusalTokens, state: int, width: int) -> set[int]:
    return mask_sets(tokens, width)[state]


def walk(tokens: refusal.RefusalTokens, ids: list[int], width: int) -> list[int]:
    """Return the ids consumed until the trie ended; every one must have been in the mask of its state."""
    state, path = tokens.start, []
    for token in ids:
        assert token in allowed(tokens, state, width)
        path.append(token)
        state = tokens.next_state(state, token)
        if state == ENDED:
            return path
    raise AssertionError(f"the phrase did not end within {ids}")


@pytest.mark.parametrize("phrase", REFUSAL_OPENINGS)
def test_every_phrase_is_a_walk_that_ends_with_it(tokenizer: Any, phrase: str) -> None:
    width = len(tokenizer) + 7
    tokens = refusal_tokens(tokenizer, width)
    for spelling in {phrase, phrase.lower(), phrase.replace("'", CURLY), phrase.lower().replace("'", CURLY)}:
        if tokenizer.unk_token_id in encode(tokenizer, spelling):
            assert CURLY in spelling, "only the curly apostrophe is unknown to the WordPiece vocabulary"
            continue
        places = [
            encode(tokenizer, spelling),
            behind(tokenizer, "\n", spelling),
            behind(tokenizer, ":", f" {spelling}"),
        ]
        for ids in places:
            # A model goes on behind the phrase; the bias has ended by then.
            consumed = walk(tokens, [*ids, tokenizer.eos_token_id or 0], width)
            assert consumed == ids
            assert tokens.next_state(ENDED, ids[0]) == ENDED


def test_leaving_all_phrases_ends_the_bias(tokenizer: Any) -> None:
    width = len(tokenizer)
    tokens = refusal_tokens(tokenizer, width)
    ids = encode(tokenizer, "I am not able to")
    state = tokens.start
    for token in ids[:-1]:
        for other in set(range(width)) - allowed(tokens, state, width):
            assert tokens.next_state(state, other) == ENDED
        state = tokens.next_state(state, token)
        assert state != ENDED
    assert tokens.next_state(state, ids[-1]) == ENDED


def test_answers_leave_the_trie_and_refusals_do_not(tokenizer: Any) -> None:
    width = len(tokenizer)
    tokens = refusal_tokens(tokenizer, width)

    def steps_inside(text: str) -> int:
        state, count = tokens.start, 0
        for token in encode(tokenizer, text):
            state = tokens.next_state(state, token)
            if state == ENDED:
                break
            count += 1
        return count

    assert steps_inside("You can do it.") == 0
    assert 0 < steps_inside("I see pictures") < len(encode(tokenizer, "I see pictures"))


def test_masks_and_states_fit_each_other(tokenizer: Any) -> None:
    width = len(tokenizer)
    tokens = refusal_tokens(tokenizer, width)
    assert tokens.masks.dtype == torch.int32
    assert tokens.masks.shape == (len(tokens.masks), -(-width // 32))
    assert tokens.masks.device.type == "cpu"
    reached = {tokens.start}
    todo = [tokens.start]
    while todo:
        state = todo.pop()
        moves = allowed(tokens, state, width)
        assert moves, "a state without a continuation would bias nothing for ever"
        for token in moves:
            following = tokens.next_state(state, token)
            assert following == ENDED or 0 <= following < len(tokens.masks)
            if following != ENDED and following not in reached:
                reached.add(following)
                todo.append(following)
    assert reached == set(range(len(tokens.masks)))


@pytest.mark.parametrize("kind", ["phrase_trie", "first_tokens"])
def test_special_tokens_are_in_no_mask(tokenizer: Any, kind: Any) -> None:
    width = len(tokenizer)
    tokens = refusal_tokens(tokenizer, width, kind)
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    used = set().union(*(allowed(tokens, state, width) for state in range(len(tokens.masks))))
    assert used
    assert not used & special


def test_a_phrase_that_spells_a_special_token_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal, "REFUSAL_OPENINGS", ("Sorry<|im_end|>", "Apologies"))
    tokenizer = byte_level_tokenizer()
    tokens = refusal._phrase_trie(tokenizer, len(tokenizer))
    assert encode(tokenizer, "Sorry")[0] not in allowed(tokens, tokens.start, len(tokenizer))
    assert encode(tokenizer, "Apologies")[0] in allowed(tokens, tokens.start, len(tokenizer))


@pytest.mark.parametrize("openings", [("I cannot help", "I cannot"), ("I cannot", "I cannot help")])
def test_the_shorter_of_two_nested_phrases_ends_the_bias(
    openings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusal, "REFUSAL_OPENINGS", openings)
    tokenizer = wordpiece_tokenizer()
    tokens = refusal._phrase_trie(tokenizer, len(tokenizer))
    assert walk(tokens, encode(tokenizer, "I cannot help"), len(tokenizer)) == encode(tokenizer, "I cannot")
    assert len(tokens.masks) == 2


def test_ids_beyond_the_models_vocabulary_are_left_out() -> None:
    tokenizer = byte_level_tokenizer()
    width = max(encode(tokenizer, "Sorry"))
    tokens = refusal_tokens(tokenizer, width)
    assert tokens.masks.shape[1] == -(-width // 32)
    assert encode(tokenizer, "Sorry")[0] not in allowed(tokens, tokens.start, width)


def test_a_tokenizer_that_can_write_no_phrase_gets_an_empty_mask() -> None:
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "dog": 1}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    kinds: tuple[Any, ...] = ("phrase_trie", "first_tokens")
    for kind in kinds:
        tokens = refusal_tokens(tokenizer, 2, kind)
        assert tokens.masks.tolist() == [[0]]


def test_first_tokens_drop_what_benign_answers_open_with(tokenizer: Any) -> None:
    width = len(tokenizer)
    kept = allowed(refusal_tokens(tokenizer, width, "first_tokens"), 0, width)
    for text in ("I cannot", "As an AI", "It is not safe", "That is not safe", "This is not safe", "My apologies"):
        assert encode(tokenizer, text)[0] not in kept, text
    for text in (" Unfortunately", " Apologies"):
        assert behind(tokenizer, ":", text)[0] in kept, text


def test_first_tokens_keep_exactly_the_tokens_with_a_majority_of_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["<unk>", "I", "As", "No", "cannot", "can", "an", "see", ":", "never"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    monkeypatch.setattr(refusal, "REFUSAL_OPENINGS", ("I cannot", "I never", "As an", "No"))
    monkeypatch.setattr(refusal, "BENIGN_OPENINGS", ("I see", "As I", "No I can"))
    tokens = refusal._first_tokens(tokenizer, len(words))
    # I: 2 of 3 refuse; As: 1 of 2; No: 1 of 2. Half is not more than half.
    assert allowed(tokens, 0, len(words)) == {1}
    monkeypatch.setattr(refusal, "BENIGN_OPENINGS", ("I see", "I can", "As I"))
    assert allowed(refusal._first_tokens(tokenizer, len(words)), 0, len(words)) == {3}


def test_first_tokens_never_end(tokenizer: Any) -> None:
    tokens = refusal_tokens(tokenizer, len(tokenizer), "first_tokens")
    assert len(tokens.masks) == 1
    assert all(tokens.next_state(tokens.start, token) == tokens.start for token in range(len(tokenizer)))
    assert tokens.next_state(ENDED, 3) == ENDED


def test_the_lists_are_consistent() -> None:
    assert len(set(REFUSAL_OPENINGS)) == len(REFUSAL_OPENINGS) >= 25
    assert len(set(BENIGN_OPENINGS)) == len(BENIGN_OPENINGS)
    for phrase in REFUSAL_OPENINGS:
        longer = [other for other in REFUSAL_OPENINGS if other != phrase and other.startswith(phrase)]
        assert not longer, f"{phrase!r} would hide {longer}"
    assert not any(starts_with_refusal(opening) for opening in BENIGN_OPENINGS)
    assert CURLY not in "".join(REFUSAL_OPENINGS), "curly spellings are made from the straight ones"


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but no.", "i cannot help with that .", "I can\u2019t do that", "  Sorry!", "SORRY", '"Sorry, no."',
        "**I'm sorry**", "I  am   sorry, no", "\n\nUnfortunately, that is unsafe.", "I won't", "As an AI, I cannot",
        "\u201cI can\u2018t", "- I am unable to",
    ],
)  # fmt: skip
def test_texts_that_start_with_a_refusal(text: str) -> None:
    assert starts_with_refusal(text)
    assert refusal_tokens(wordpiece_tokenizer(), len(wordpiece_tokenizer())).starts_with_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "   ", "Sure! First, warm up.", "I can help.", "I cannoto", "Sorryless", "As shown", "It is safe",
        "You can, but I'm sorry to say it is late.", "I am not sure", "I'm", "I would rather",
    ],
)  # fmt: skip
def test_texts_that_do_not(text: str) -> None:
    assert not starts_with_refusal(text)


def test_built_once_per_tokenizer_width_and_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    build = refusal._phrase_trie

    def counting(tokenizer: Any, vocab_size: int) -> refusal.RefusalTokens:
        built.append(vocab_size)
        return build(tokenizer, vocab_size)

    monkeypatch.setattr(refusal, "_phrase_trie", counting)
    tokenizer = _small_tokenizer()
    results = [refusal_tokens(tokenizer, 100)]
    threads = [threading.Thread(target=lambda: results.append(refusal_tokens(tokenizer, 100))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 5
    assert all(result is results[0] for result in results)
    assert built == [100]
    assert refusal_tokens(tokenizer, 101) is not results[0]
    assert refusal_tokens(_small_tokenizer(), 100) is not results[0]
    assert built == [100, 101, 100]
    tokenizer.add_tokens(["Unfortunately"])
    refusal_tokens(tokenizer, 100)
    assert built == [100, 101, 100, 100], "added tokens change how phrases are spelled"


def test_the_cache_does_not_keep_a_tokenizer_alive() -> None:
    tokenizer = _small_tokenizer()
    refusal_tokens(tokenizer, 100)
    alive = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert alive() is None


def _small_tokenizer() -> Any:
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "Sorry": 1, ":": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
