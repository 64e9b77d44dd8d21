"""Illegal arguments are refused before any work, with the argument, the value and what is legal."""

from __future__ import annotations

import pytest
import torch

import safecode_kernels as sk
from safecode_kernels import ArgumentError, ArgumentTypeError, StepParams

pytestmark = pytest.mark.usefixtures("backend")

Z = torch.zeros(2, 40)
GREEDY, SAMPLING = StepParams(), StepParams(greedy=False)
BIASED = StepParams(refusal_bias=1.0)
MASKS = sk.pack_masks([[1], [2], [3]], 40)
META = torch.zeros(2, 40, device="meta")


def call(**overrides):
    arguments = {"clean": Z, "noised": Z, "params": GREEDY, **overrides}
    return sk.decode_step(arguments.pop("clean"), arguments.pop("noised"), arguments.pop("params"), **arguments)


@pytest.mark.parametrize(
    ("overrides", "error", "text"),
    [
        ({"clean": [[0.0]]}, ArgumentTypeError, "clean is a list; legal: a tensor"),
        ({"clean": Z.double()}, ArgumentTypeError, "clean is torch.float64; legal: float32, bfloat16, float16"),
        ({"clean": Z.long()}, ArgumentTypeError, "clean is torch.int64"),
        ({"clean": Z[0]}, ArgumentError, r"clean has shape \[40\]; legal: \[B, V\]"),
        ({"clean": Z[:, :0]}, ArgumentError, r"clean has shape \[2, 0\]"),
        ({"noised": Z[:, :39]}, ArgumentError, r"noised has shape \[2, 39\]; legal: \[2, 40\]"),
        ({"noised": Z.bfloat16()}, ArgumentTypeError, "noised is torch.bfloat16; legal: torch.float32"),
        ({"noised": META}, ArgumentError, "noised is on meta; legal: cpu"),
        ({"noised": 3}, ArgumentTypeError, "noised is a int"),
        ({"params": BIASED}, ArgumentError, "refusal_bias is not 0 but refusal_mask is None"),
        ({"refusal_mask": MASKS.long()}, ArgumentTypeError, "refusal_mask is torch.int64; legal: int32 words"),
        ({"refusal_mask": [1]}, ArgumentTypeError, "refusal_mask is list"),
        ({"refusal_mask": MASKS[:, :1]}, ArgumentError, r"refusal_mask has shape \[3, 1\]; legal: \[M >= 1, 2\]"),
        ({"refusal_mask": MASKS[0]}, ArgumentError, r"refusal_mask has shape \[2\]"),
        ({"refusal_mask": MASKS[:0]}, ArgumentError, r"refusal_mask has shape \[0, 2\]"),
        ({"refusal_mask": MASKS.to("meta")}, ArgumentError, "refusal_mask is on meta; legal: cpu"),
        ({"refusal_mask": MASKS}, ArgumentError, r"mask_id is None but refusal_mask has 3 rows; legal: .* \[-1, 3\)"),
        ({"refusal_mask": MASKS, "mask_id": [0, 3]}, ArgumentError, r"mask_id\[1\]=3 is out of range"),
        ({"refusal_mask": MASKS, "mask_id": [-2, 0]}, ArgumentError, r"mask_id\[0\]=-2 is out of range"),
        ({"refusal_mask": MASKS, "mask_id": [0]}, ArgumentError, "mask_id holds 1 values"),
        ({"refusal_mask": MASKS, "mask_id": torch.zeros(2)}, ArgumentTypeError, "mask_id is torch.float32"),
        ({"mask_id": [0, 0]}, ArgumentError, "mask_id is given but refusal_mask is None"),
        ({"params": SAMPLING}, ArgumentError, "seeds is None but a row has greedy=False"),
        (
            {"params": SAMPLING, "seeds": [1, -1]},
            ArgumentError,
            r"seeds\[1\]=-1 is out of range; legal: integers in \[0",
        ),
        ({"params": SAMPLING, "seeds": [1, 2**63]}, ArgumentError, r"seeds\[1\]=9223372036854775808 is out of range"),
        ({"params": SAMPLING, "seeds": [1, 2.0]}, ArgumentTypeError, r"seeds\[1\]=2.0 is a float"),
        ({"params": SAMPLING, "seeds": torch.tensor([1])}, ArgumentError, "seeds holds 1 values; .* one per row"),
        (
            {"params": SAMPLING, "seeds": 1, "stream": [0, 2**32]},
            ArgumentError,
            r"stream\[1\]=4294967296 is out of range",
        ),
        ({"step": -1}, ArgumentError, "step=-1 is out of range"),
        ({"step": True}, ArgumentTypeError, "step=True is a bool"),
        (
            {"backend": "cuda_magic"},
            ArgumentError,
            "backend='cuda_magic' is no back end of this installation; legal: auto",
        ),
    ],
)
def test_decode_step_refuses(overrides, error, text):
    with pytest.raises(error, match=text):
        call(**overrides)


def test_prepare_step_refuses():
    options = {"batch": 2, "vocab_size": 40, "device": "cpu", "dtype": torch.float32}
    with pytest.raises(ArgumentError, match="batch=-1"):
        sk.prepare_step(GREEDY, **{**options, "batch": -1})
    with pytest.raises(ArgumentError, match="vocab_size=0"):
        sk.prepare_step(GREEDY, **{**options, "vocab_size": 0})
    with pytest.raises(ArgumentTypeError, match=r"dtype=torch\.float64"):
        sk.prepare_step(GREEDY, **{**options, "dtype": torch.float64})


def test_prepared_step_refuses_logits_it_was_not_prepared_for():
    prepared = sk.prepare_step(GREEDY, batch=2, vocab_size=40, device="cpu", dtype=torch.float32)
    for clean, error, text in (
        (torch.zeros(3, 40), ArgumentError, r"clean has shape \[3, 40\]; legal: \[2, 40\]"),
        (Z.half(), ArgumentTypeError, "for which the step was prepared"),
        (META, ArgumentError, "clean is on meta"),
    ):
        with pytest.raises(error, match=text):
            prepared(clean)
        with pytest.raises(error, match=text):
            prepared.scores(clean)


def test_draw_and_plausible_refuse():
    with pytest.raises(ArgumentError, match="seeds is None; legal: "):
        sk.draw(Z)
    with pytest.raises(ArgumentTypeError, match=r"scores is torch.float64"):
        sk.draw(Z.double(), seeds=1)
    with pytest.raises(ArgumentTypeError, match=r"allowed is torch.float32; legal: torch.bool"):
        sk.plausible(Z, Z, 0.1)
    with pytest.raises(ArgumentError, match=r"plausibility_beta=1.5 is out of range; legal: a number in \[0, 1\]"):
        sk.plausible(Z, Z.bool(), 1.5)


def test_scores_need_no_seeds_even_if_rows_will_sample():
    assert sk.decode_scores(Z, None, SAMPLING).status.tolist() == [0, 0]


def test_mask_id_accepts_one_for_all_and_int32():
    biased = {"clean": Z, "noised": None, "params": BIASED, "refusal_mask": MASKS}
    assert call(**biased, mask_id=1).token.tolist() == [2, 2]
    assert call(**biased, mask_id=torch.tensor([0, -1], dtype=torch.int32)).token.tolist() == [1, 0]
    assert call(**{**biased, "refusal_mask": MASKS[2:]}).token.tolist() == [3, 3]


def test_seeds_one_for_all_equals_one_per_row():
    clean = torch.zeros(3, 500)
    one = sk.decode_step(clean, None, SAMPLING, seeds=7, stream=[0, 1, 0]).token
    assert one.equal(sk.decode_step(clean, None, SAMPLING, seeds=[7, 7, 7], stream=torch.tensor([0, 1, 0])).token)
    assert one[0] == one[2] != one[1]
