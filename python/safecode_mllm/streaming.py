"""Answers piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.results import ChatResult

_END = object()


class ChatStream:
    """Iterate over the pieces of an answer's text; afterwards `.result` is the whole ChatResult.

    Leaving the loop early stops the generation. Errors of the generation are raised where the loop waits for text.

    Args:
        tokenizer: decodes the tokens.
        run: called in a thread with a streamer and a stopping criterion; returns the result.
    """

    def __init__(self, tokenizer: Any, run: Callable[[Any, Any], ChatResult]):
        from transformers import TextIteratorStreamer

        self._result: ChatResult | None = None
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._thread = threading.Thread(target=self._work, args=(run,), daemon=True)

    @property
    def result(self) -> ChatResult:
        """The whole answer; there is none before the iteration has ended."""
        if self._result is None:
            raise RuntimeError("the stream has no result yet: iterate over it to the end first")
        return self._result

    def __iter__(self) -> Iterator[str]:
        if self._thread.ident is not None:
            raise RuntimeError("a ChatStream can be iterated once; call stream() again for another answer")
        self._thread.start()
        try:
            yield from self._pieces()
        finally:
            self._stop.set()
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _pieces(self) -> Iterator[str]:
        """The text as `ChatResult.text` has it: without the space that many models begin an answer with."""
        begun = False
        for piece in self._streamer:
            piece = piece if begun else piece.lstrip()
            begun = begun or bool(piece)
            if piece:
                yield piece

    def _work(self, run: Callable[[Any, Any], ChatResult]) -> None:
        try:
            self._result = run(self._streamer, _StopWhen(self._stop))
        except BaseException as error:
            self._error = error
            # The loop may be waiting for text that will never come.
            self._streamer.text_queue.put(self._streamer.stop_signal)


class _StopWhen:
    """A stopping criterion that ends all rows once an event is set."""

    def __init__(self, event: threading.Event):
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), dtype=torch.bool, device=input_ids.device)
