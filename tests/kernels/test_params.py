"""StepParams: what it accepts, what it says when it does not."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
import torch

import safecode_kernels as sk
from safecode_kernels import StepParams
from safecode_kernels.params import resolve_rows

OUT_OF_RANGE = {
    "contrast_weight": [-0.1, math.inf, math.nan, 1e39],
    "plausibility_beta": [-0.01, 1.01, math.nan],
    "refusal_bias": [math.inf, -math.inf, math.nan],
    "bias_scope": [-1, 2**31],
    "temperature": [0, -1.0, 1e-7, math.inf, math.nan],
    "top_k": [-1, 2**31],
    "top_p": [0.0, -0.1, 1.1, math.nan],
    "min_p": [-0.1, 1.1, math.nan],
}
WRONG_TYPE = {
    "contrast_weight": ["0.3", None, True],
    "bias_scope": [2.0, True],
    "temperature": [None, 1j],
    "top_k": [5.0, "5"],
    "greedy": [1, 0, "yes", None],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in OUT_OF_RANGE.items() for v in values])
@pytest.mark.parametrize("as_row", [False, True])
def test_step_params_out_of_range_names_field_value_and_range(name, value, as_row):
    legal = getattr(StepParams(), name)
    with pytest.raises(sk.ArgumentError) as error:
        StepParams(**{name: [legal, value] if as_row else value})
    text = str(error.value)
    number = float(value) if isinstance(legal, float) else value
    assert text.startswith(f"{name}[1]={number!r}" if as_row else f"{name}={number!r}")
    assert "legal: " in text
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG_TYPE.items() for v in values])
def test_step_params_wrong_type_names_field_value_and_range(name, value):
    with pytest.raises(sk.ArgumentTypeError, match=rf"^{name}=.* is a {type(value).__name__}; legal: ") as error:
        StepParams(**{name: value})
    assert isinstance(error.value, TypeError)


def test_step_params_accepts_the_ends_of_every_range():
    StepParams(contrast_weight=0, plausibility_beta=0, temperature=1e-6, top_p=1, min_p=0)
    StepParams(contrast_weight=1e38, plausibility_beta=1, refusal_bias=-3e38, top_p=1e-12, min_p=1)
    StepParams(bias_scope=2**31 - 1, top_k=2**31 - 1)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_step_params_one_value_per_row(kind):
    params = StepParams(temperature=kind([0.5, 2.0]), top_k=kind([1, 0]), greedy=kind([True, False]))
    assert params.temperature == (0.5, 2.0)
    assert params.top_k == (1, 0)
    assert params.greedy == (True, False)
    assert params == StepParams(temperature=[0.5, 2.0], top_k=[1, 0], greedy=[True, False])
    assert hash(params) == hash(StepParams(temperature=[0.5, 2.0], top_k=[1, 0], greedy=[True, False]))


def test_step_params_is_frozen_and_keeps_no_reference():
    values = torch.tensor([1.0, 2.0])
    params = StepParams(temperature=values)
    values[0] = 7.0
    assert params.temperature == (1.0, 2.0)
    with pytest.raises(FrozenInstanceError):
        params.temperature = 3.0


def test_step_params_zero_dimensional_tensor_is_a_scalar():
    assert StepParams(temperature=torch.tensor(0.5)).temperature == 0.5


def test_step_params_wrong_number_of_rows():
    with pytest.raises(sk.ArgumentError, match="temperature holds 3 values; legal: a scalar or one per row, here 2"):
        sk.decode_step(torch.zeros(2, 5), None, StepParams(temperature=[1.0, 2.0, 3.0]))


def test_resolve_rows_rounds_derived_values_once():
    rows = resolve_rows(StepParams(contrast_weight=0.1, plausibility_beta=0.1), batch=2, device=torch.device("cpu"))
    assert rows.one_plus_weight.flatten().tolist() == torch.tensor([1.1, 1.1], dtype=torch.float64).float().tolist()
    assert rows.log_beta.flatten().tolist() == [torch.tensor(math.log(0.1), dtype=torch.float64).float().item()] * 2
    assert rows.top_p.dtype == torch.float64


def test_resolve_rows_neutralises_the_filters_of_greedy_rows():
    params = StepParams(temperature=2.0, top_k=5, top_p=0.5, min_p=0.1, greedy=[True, False])
    rows = resolve_rows(params, batch=2, device=torch.device("cpu"))
    assert rows.temperature.flatten().tolist() == [1.0, 2.0]
    assert rows.top_k.flatten().tolist() == [0, 5]
    assert rows.top_p.flatten().tolist() == [1.0, 0.5]
    assert rows.any_sampling
    assert not resolve_rows(StepParams(top_k=5), batch=2, device=torch.device("cpu")).max_top_k
