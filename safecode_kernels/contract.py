"""What every back end receives and returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_INT32 = 2**31 - 1


class Status(IntEnum):
    """Why a row could not be decoded.

    If several apply: a NaN clean logit goes before a +inf one, these before what is found at the candidates (a NaN
    noised logit, then a +inf one, then a score that is +inf or NaN by overflow), and NOTHING_FINITE comes last. A score
    that overflows to -inf only excludes its token, so models that mask with the least finite number can be decoded.

    Candidates are the tokens that pass the plausibility cut when every token of the mask is biased; the noised row
    matters at these only. With a `bias_scope`, which is about scores, it isn't known before who is biased: candidates
    are then all that could pass, z + max(bias, 0) >= max z + min(bias, 0) + log(beta).
    """

    OK = 0
    NAN_CLEAN = 1
    NAN_NOISED = 2
    NOTHING_FINITE = 3
    INFINITE = 4

    @property
    def text(self) -> str:
        """A sentence fragment for error messages."""
        return _STATUS_TEXT[self]


_STATUS_TEXT = {
    Status.OK: "ok",
    Status.NAN_CLEAN: "a clean logit is NaN",
    Status.NAN_NOISED: "a noised logit of a candidate token is NaN",
    Status.NOTHING_FINITE: "no token has a finite score",
    Status.INFINITE: "a logit or a score is +inf",
}


class StepResult(NamedTuple):
    """One token per row.

    Attributes:
        token: int64 [B], always a legal id; 0 where status is not 0.
        logprob: float32 [B], natural log of the token's probability under the distribution it was drawn from; for a
            greedy row the log-softmax of the kept scores at temperature 1; -inf where status is not 0.
        n_kept: int32 [B], number of tokens in that distribution; 0 where status is not 0.
        status: int32 [B], a `Status`.
    """

    token: Tensor
    logprob: Tensor
    n_kept: Tensor
    status: Tensor


class StepScores(NamedTuple):
    """Scores of every token, for callers that run a processor list before they draw.

    Attributes:
        scores: float32 [B, V], after contrast and bias, unfiltered, at temperature 1; -inf = excluded.
        biased_clean: float32 [B, V], clean logit plus effective bias: what the plausibility cut compares.
        keep: bool [B, V], tokens that pass the plausibility cut.
        status: int32 [B], a `Status`; where it is not 0 the row's scores are -inf and nothing is kept.
    """

    scores: Tensor
    biased_clean: Tensor
    keep: Tensor
    status: Tensor


# The rows of `Rows.packed`, in order; csrc/decode_step.h and the GPU kernels read them by the same numbers.
PACKED_FIELDS = (
    "weight",
    "one_plus_weight",
    "bias",
    "scope",
    "log_beta",
    "temperature",
    "top_k",
    "top_p",
    "log_min_p",
    "greedy",
)


class _Column:
    """A row of `Rows.packed` as a column [B, 1], made when it is first asked for: most back ends read `packed`."""

    def __init__(self, dtype: torch.dtype | None = None):
        self.dtype = dtype

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self.index = PACKED_FIELDS.index(name)

    def __get__(self, rows: Rows, owner: type) -> Tensor:
        column = rows.packed[self.index].unsqueeze(1).to(self.dtype or rows.dtype)
        rows.__dict__[self.name] = column  # found there from now on
        return column


class Rows:
    """The step's parameters with one value per row, on the device of the logits.

    Rows that are greedy hold the neutral temperature and filters. The plain bool and int attributes are facts that let
    a back end skip work; where the values are on an accelerator only, looking at them would stop the device, and the
    facts allow for everything.

    Args:
        packed: float64 [10, B], row i is PACKED_FIELDS[i], every value already rounded to `dtype`. One tensor holds
            all, since float64 holds every float32 and every int32.
        dtype: the compute dtype, float32, or float64 for the oracle.
        host: the same values on the CPU, if they are known there.

    Attributes:
        weight, ..., greedy: the rows of `packed` as columns [B, 1]: the compute dtype, but `scope` and `top_k` int64,
            `greedy` bool, and `top_p` float64 as the mass it is compared with.
    """

    weight = _Column()
    one_plus_weight = _Column()
    bias = _Column()
    scope = _Column(torch.int64)
    log_beta = _Column()
    temperature = _Column()
    top_k = _Column(torch.int64)
    top_p = _Column(torch.float64)
    log_min_p = _Column()
    greedy = _Column(torch.bool)

    def __init__(self, packed: Tensor, dtype: torch.dtype, host: Tensor | None = None):
        self.packed = packed
        self.dtype = dtype
        self._host = host

    @cached_property
    def any_contrast(self) -> bool:
        """Whether a row's contrast weight is not 0."""
        return self._any("weight", lambda a: a > 0)

    @cached_property
    def any_bias(self) -> bool:
        """Whether a row's refusal bias is not 0."""
        return self._any("bias", lambda bias: bias != 0)

    @cached_property
    def any_dense(self) -> bool:
        """Whether a row's plausibility cut keeps every token."""
        return self._any("log_beta", lambda log_beta: log_beta == -math.inf)

    @cached_property
    def any_candidates(self) -> bool:
        """Whether a row's plausibility cut can drop a token."""
        return self._any("log_beta", lambda log_beta: log_beta > -math.inf)

    @cached_property
    def any_sampling(self) -> bool:
        """Whether a row is not greedy."""
        return self._any("greedy", lambda greedy: greedy == 0)

    @cached_property
    def any_temperature(self) -> bool:
        """Whether a row's temperature is not 1."""
        return self._any("temperature", lambda t: t != 1)

    @cached_property
    def any_top_p(self) -> bool:
        """Whether a row's top_p is on."""
        return self._any("top_p", lambda p: p < 1)

    @cached_property
    def any_min_p(self) -> bool:
        """Whether a row's min_p is on."""
        return self._any("log_min_p", lambda log_min_p: log_min_p > -math.inf)

    @cached_property
    def max_scope(self) -> int:
        """The largest bias scope."""
        return self._largest("scope")

    @cached_property
    def max_top_k(self) -> int:
        """The largest top_k."""
        return self._largest("top_k")

    @cached_property
    def _values(self) -> dict[str, list[float]] | None:
        host = self.packed if self._host is None and self.packed.device.type == "cpu" else self._host
        return None if host is None else dict(zip(PACKED_FIELDS, host.tolist(), strict=True))

    def _any(self, name: str, matters: Callable[[float], bool]) -> bool:
        return self._values is None or any(map(matters, self._values[name]))

    def _largest(self, name: str) -> int:
        return MAX_INT32 if self._values is None else int(max(self._values[name], default=0))


class RefusalMask(NamedTuple):
    """Token sets as int32 words [M, ceil(V / 32)] and, per row, which of them applies: int64 [B], -1 = none."""

    words: Tensor
    mask_id: Tensor


class DrawKey(NamedTuple):
    """What a draw depends on besides the token: seeds, stream int64 [B]; step one number for all rows or int64 [B]."""

    seeds: Tensor
    stream: Tensor
    step: int | Tensor


class FastStep(Protocol):
    """A decode step with everything resolved that stays the same during a generation."""

    def __call__(self, clean: Tensor, noised: Tensor | None, mask_id: object, step: object) -> StepResult | None:
        """Return the result; None, with nothing computed, for arguments that need the checked way or its error."""
        ...


class Kernels(Protocol):
    """The functions that the module of a back end has. Arguments are already checked; B >= 1 and V >= 1.

    A module may also have `prepare(clean_shape, dtype, rows, refusal_mask, key, reuse_results) -> FastStep`, which
    PreparedStep then tries first: refusal_mask int32 [M, ceil(V / 32)] or None, key None if no row samples.
    """

    def step(
        self, clean: Tensor, noised: Tensor | None, rows: Rows, mask: RefusalMask | None, key: DrawKey | None
    ) -> StepResult:
        """Score, cut, filter and draw one token per row."""
        ...

    def scores(self, clean: Tensor, noised: Tensor | None, rows: Rows, mask: RefusalMask | None) -> StepScores:
        """Return every token's score."""
        ...

    def draw(self, scores: Tensor, key: DrawKey | None) -> StepResult:
        """Draw from processed scores; key None takes the best."""
        ...
