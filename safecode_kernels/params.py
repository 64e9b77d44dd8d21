"""Parameters of the decode step: the one place that validates them and turns them into one value per row."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contract import MAX_INT32, PACKED_FIELDS, Rows
from .errors import ArgumentError, ArgumentTypeError

# The paper's alpha of 0.3 on the scale of the clean logits: alpha / (1 - alpha).
DEFAULT_CONTRAST_WEIGHT = 0.43
DEFAULT_PLAUSIBILITY_BETA = 0.1
# Below this, ordinary scores divided by the temperature leave the range of float32; the limit itself is greedy=True.
MIN_TEMPERATURE = 1e-6
MAX_FLOAT32 = torch.finfo(torch.float32).max

PerRowFloat = float | Sequence[float] | Tensor
PerRowInt = int | Sequence[int] | Tensor
PerRowBool = bool | Sequence[bool] | Tensor


class _Rule(NamedTuple):
    """What one field accepts: the kind of value, the test, and the words for the error."""

    kind: type
    legal: Callable[[Any], bool]
    range_text: str


_RULES = {
    "contrast_weight": _Rule(float, lambda x: 0 <= x <= MAX_FLOAT32, "a finite number >= 0"),
    "plausibility_beta": _Rule(float, lambda x: 0 <= x <= 1, "a number in [0, 1]"),
    "refusal_bias": _Rule(float, lambda x: abs(x) <= MAX_FLOAT32, "a finite number"),
    "bias_scope": _Rule(int, lambda x: 0 <= x <= MAX_INT32, "an integer in [0, 2**31)"),
    "temperature": _Rule(
        float, lambda x: MIN_TEMPERATURE <= x <= MAX_FLOAT32, f"a finite number >= {MIN_TEMPERATURE:g} (or greedy=True)"
    ),
    "top_k": _Rule(int, lambda x: 0 <= x <= MAX_INT32, "an integer in [0, 2**31)"),
    "top_p": _Rule(float, lambda x: 0 < x <= 1, "a number in (0, 1]"),
    "min_p": _Rule(float, lambda x: 0 <= x <= 1, "a number in [0, 1]"),
    "greedy": _Rule(bool, lambda x: True, "True or False"),
}


# Packed values that are rounded to float32, if that is the compute dtype.
_ROUNDED = ("weight", "one_plus_weight", "bias", "log_beta", "temperature", "log_min_p")


@dataclass(frozen=True)
class StepParams:
    """Parameters of the decode step; each is a scalar or holds one value per row (tensor, list or tuple of length B).

    Values are checked here and kept as Python scalars or tuples, so a StepParams never changes and can be compared.

    Attributes:
        contrast_weight: a >= 0 in s = (1 + a) * clean - a * noised; 0 never reads the noised row.
        plausibility_beta: in [0, 1]; keeps tokens whose biased clean logit is at least max + log(beta); 0 keeps all.
        refusal_bias: added to the score of the tokens of the row's refusal mask (natural log units).
        bias_scope: K >= 0; only tokens whose score is at least the K-th best are biased; 0 = all.
        temperature: > 0, divides the scores.
        top_k: >= 0; keeps the K best and every tie of the K-th; 0 = off.
        top_p: in (0, 1]; keeps, best first, while the mass before the token is below top_p; 1 = off.
        min_p: in [0, 1]; keeps tokens at least min_p times as likely as the best; 0 = off.
        greedy: take the best kept token; temperature, top_k, top_p and min_p are not applied, as in transformers.

    Raises:
        ArgumentError: a value is out of its range; names the field, the value and the range.
        ArgumentTypeError: a value is of the wrong type.

    Source:
        SafeCoDe, arXiv 2509.19212 (contrast, bias); VCD, arXiv 2311.16922 (plausibility).
    """

    contrast_weight: PerRowFloat = DEFAULT_CONTRAST_WEIGHT
    plausibility_beta: PerRowFloat = DEFAULT_PLAUSIBILITY_BETA
    refusal_bias: PerRowFloat = 0.0
    bias_scope: PerRowInt = 0
    temperature: PerRowFloat = 1.0
    top_k: PerRowInt = 0
    top_p: PerRowFloat = 1.0
    min_p: PerRowFloat = 0.0
    greedy: PerRowBool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _checked(field.name, getattr(self, field.name)))

    def per_row(self, name: str, batch: int) -> list[Any]:
        """Return field `name` as a list of `batch` values."""
        value = getattr(self, name)
        if not isinstance(value, tuple):
            return [value] * batch
        if len(value) != batch:
            raise ArgumentError(f"{name} holds {len(value)} values; legal: a scalar or one per row, here {batch}")
        return list(value)


def _checked(name: str, value: Any) -> Any:
    """Return `value` as a legal Python scalar, or as a tuple of them."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return tuple(_checked_scalar(name, item, f"{name}[{row}]") for row, item in enumerate(value))
    return _checked_scalar(name, value, name)


def _checked_scalar(name: str, value: Any, label: str) -> Any:
    rule = _RULES[name]
    is_kind = {
        bool: isinstance(value, bool),
        int: isinstance(value, Integral) and not isinstance(value, bool),
        float: isinstance(value, Real) and not isinstance(value, bool),
    }[rule.kind]
    if not is_kind:
        raise ArgumentTypeError(f"{label}={value!r} is a {type(value).__name__}; legal: {rule.range_text}")
    value = rule.kind(value)
    if not rule.legal(value):
        raise ArgumentError(f"{label}={value!r} is out of range; legal: {rule.range_text}")
    return value


def resolve_rows(params: StepParams, *, batch: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Rows:
    """Return one value per row of every parameter, with 1 + a, log(beta) and log(min_p) rounded once to `dtype`.

    Args:
        params: validated parameters.
        batch: number of rows B.
        device: where the back end computes.
        dtype: compute dtype, float32, or float64 for the oracle.
    """
    greedy = params.per_row("greedy", batch)
    value = {name: params.per_row(name, batch) for name in _RULES}
    for name, neutral in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
        value[name] = [neutral if row_is_greedy else x for x, row_is_greedy in zip(value[name], greedy, strict=True)]
    columns = {
        "weight": value["contrast_weight"],
        "one_plus_weight": [1.0 + a for a in value["contrast_weight"]],
        "bias": value["refusal_bias"],
        "scope": value["bias_scope"],
        "log_beta": [_log(beta) for beta in value["plausibility_beta"]],
        "temperature": value["temperature"],
        "top_k": value["top_k"],
        "top_p": value["top_p"],
        "log_min_p": [_log(min_p) for min_p in value["min_p"]],
        "greedy": greedy,
    }
    if dtype == torch.float32:
        columns.update({name: list(array("f", columns[name])) for name in _ROUNDED})
    packed = torch.tensor([columns[name] for name in PACKED_FIELDS], dtype=torch.float64)
    packed = packed.reshape(len(PACKED_FIELDS), batch)
    return Rows(packed.to(device), dtype, host=packed)


def pack_params(params: StepParams, batch: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the parameters as torch.ops.safecode_kernels takes them: float64 [10, B], one column per request.

    Args:
        params: validated parameters.
        batch: number of rows B.
        device: that of the logits.
    """
    return resolve_rows(params, batch=batch, device=torch.device(device)).packed


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
