"""Many requests: into batches of one kind and similar length, and into smaller ones when memory runs out."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from safecode_mllm.errors import CapacityError, ConfigError, UnsupportedModelError
from safecode_mllm.requests import ChatRequest, PreparedRequest
from safecode_mllm.results import ChatResult, Steering

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 8
# So many batches are prepared at a time, to be sorted by length: enough for little padding, and few enough pictures.
LOOKAHEAD_BATCHES = 8
# Fields in which the rows of a batch agree, since they are read once per batch.
_SHARED_FIELDS = ("refusal_tokens", "refusal_style", "reason_tokens", "bias_decay", "on_judge_error", "on_unknown")

# Called with (done, total); the total is None for an iterable without a length.
Progress = Callable[[int, Any], None]


def batch_kind(row: PreparedRequest) -> tuple[Any, ...]:
    """Return what rows of one batch agree in: which branches run, how long they are guided, and what is read once.

    Weights, bias, verdicts, fixed windows, seeds and lengths differ freely between the rows of a batch.
    """
    config, keys = row.config, tuple(sorted(row.clean))  # a request of text alone has fewer
    if not row.steered:
        return ("off", keys)
    window = config.steps if isinstance(config.steps, str) else "fixed"
    shared = (getattr(config, name) for name in _SHARED_FIELDS)
    return ("on", keys, window, config.uses_contrast, config.uses_verdict, *shared)


def into_batches(rows: Sequence[PreparedRequest], batch_size: int) -> list[list[PreparedRequest]]:
    """Return the rows in batches of one kind, the longest first, so that memory runs out early if it does."""
    by_kind: dict[tuple[Any, ...], list[PreparedRequest]] = {}
    for row in rows:
        by_kind.setdefault(batch_kind(row), []).append(row)
    batches = []
    for alike in by_kind.values():
        alike.sort(key=lambda row: row.length, reverse=True)
        batches += [alike[start : start + batch_size] for start in range(0, len(alike), batch_size)]
    return batches


class BatchRunner:
    """Answers requests in batches; what fails in one request is that result's `error`.

    Args:
        prepare: makes a request ready for the model; raises what is wrong with it.
        answer: answers rows of one kind.
        batch_size: rows per batch; halved for good when memory runs out.
        free: lets go of memory that is kept for later; called when it runs out.
    """

    def __init__(
        self,
        prepare: Callable[[ChatRequest], PreparedRequest],
        answer: Callable[[Sequence[PreparedRequest]], list[ChatResult]],
        batch_size: int,
        free: Callable[[], None],
    ) -> None:
        self._prepare, self._answer, self._free, self.batch_size = prepare, answer, free, batch_size

    def run(self, requests: Iterable[ChatRequest | Mapping[str, Any]]) -> Iterator[ChatResult]:
        """Yield the results as they are completed, each with its request's place in `index`."""
        numbered = enumerate(requests)
        while window := list(itertools.islice(numbered, self.batch_size * LOOKAHEAD_BATCHES)):
            places: dict[int, int] = {}
            rows: list[PreparedRequest] = []
            for place, request in window:
                try:
                    row = self._prepare(ChatRequest.of(request))
                except Exception as error:
                    yield _failed(request, error, place)
                else:
                    places[id(row)] = place
                    rows.append(row)
            for batch in into_batches(rows, self.batch_size):
                for part, results in self._in_parts(batch):
                    for row, result in zip(part, results, strict=True):
                        result.index = places[id(row)]
                        yield result

    def _in_parts(self, rows: list[PreparedRequest]) -> Iterator[tuple[list[PreparedRequest], list[ChatResult]]]:
        todo = deque([rows])
        while todo:
            part = todo.popleft()
            if len(part) > self.batch_size:
                todo.appendleft(part[self.batch_size :])
                part = part[: self.batch_size]
            results = self._try(part)
            if results is None:
                self._make_smaller(len(part))
                todo.appendleft(part)
            else:
                yield part, results

    def _try(self, rows: list[PreparedRequest]) -> list[ChatResult] | None:
        """Answer rows; None when memory ran out and fewer might do.

        What breaks a whole batch is the error of each of its rows: the batches that are done must not be lost to it.
        Arguments that no batch could work with still raise.
        """
        try:
            return self._answer(rows)
        except (ConfigError, UnsupportedModelError):
            raise
        except Exception as error:
            if not _is_out_of_memory(error):
                logger.warning("a batch of %d requests failed: %s: %s", len(rows), type(error).__name__, error)
                return [_failed(row.request, error) for row in rows]
            if len(rows) == 1:
                too_large = CapacityError(
                    f"a request of {rows[0].length} tokens does not fit into memory even alone ({error}); "
                    "lower max_new_tokens, shorten the prompt, or use a smaller image"
                )
                return [_failed(rows[0].request, too_large)]
        # Here the frames of the failed attempt are gone, and with them what they held on to.
        self._free()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _make_smaller(self, failed: int) -> None:
        self.batch_size = max(1, failed // 2)
        logger.warning("out of memory with a batch of %d requests: going on with %d", failed, self.batch_size)


def in_order(results: Iterable[ChatResult]) -> Iterator[ChatResult]:
    """Yield results by their `index`, each as soon as all before it are there."""
    waiting: dict[int, ChatResult] = {}
    following = 0
    for result in results:
        waiting[result.index] = result
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def watched(results: Iterable[ChatResult], total: int | None, progress: bool | Progress | None) -> Iterator[ChatResult]:
    """Yield the results while progress is shown: as a bar with rate and remaining time, or by calls (done, total)."""
    if callable(progress):
        for done, result in enumerate(results, 1):
            progress(done, total)
            yield result
    elif progress:
        from tqdm import tqdm

        yield from tqdm(results, total=total, unit="request")
    else:
        yield from results


def _is_out_of_memory(error: Exception) -> bool:
    # The allocator of the CPU has no class of its own for it.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _failed(request: Any, error: Exception, index: int = 0) -> ChatResult:
    # What is no request at all has neither.
    steering: Steering = getattr(request, "steering", "on")
    seed = getattr(request, "seed", None)
    return ChatResult("", None, steering, None, None, seed, {}, error, index=index)
