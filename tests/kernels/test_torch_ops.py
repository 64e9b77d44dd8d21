"""The operators of torch: the same results as the functions, and what torch asks of an operator."""

from __future__ import annotations

import pytest
import torch

import safecode_kernels as sk
from safecode_kernels import ArgumentError, ArgumentTypeError, StepParams
from safecode_kernels.testing import Case, assert_step_equals, make_case
from safecode_kernels.torch_ops import forget_backends

OPS = torch.ops.safecode_kernels
SAMPLING = StepParams(greedy=False, temperature=0.8, top_k=50, top_p=0.9, refusal_bias=0.7)


@pytest.fixture(autouse=True)
def _chosen(backend):
    """Each back end in turn, by what "auto" stands for."""
    forget_backends()
    yield
    forget_backends()


def arguments(case: Case) -> tuple:
    packed = sk.pack_params(case.params, case.batch)
    step = torch.full((case.batch,), case.step)
    return case.clean, case.noised, packed, case.refusal_mask, case.mask_id, case.seeds, case.stream, step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_operators_equal_the_functions(dtype):
    case = make_case(1, batch=9, vocab_size=1003, dtype=dtype, excluded_share=0.1)
    assert_step_equals(case, sk.StepResult(*OPS.decode_step(*arguments(case))), case.run())
    for ours, expected in zip(OPS.decode_scores(*arguments(case)[:5]), case.run_scores(), strict=True):
        assert ours.equal(expected)
    scores = case.run_scores().scores
    expected = sk.draw(scores, seeds=case.seeds, stream=case.stream, step=case.step)
    ours = OPS.draw(scores, case.seeds, case.stream, torch.full((9,), case.step))
    assert all(a.equal(b) for a, b in zip(ours, expected, strict=True))


def test_defaults_stand_for_no_mask_no_sampling_stream_0_and_step_0():
    case = make_case(2, batch=3, vocab_size=100, params=StepParams())
    packed = sk.pack_params(case.params, 3)
    plain = sk.decode_step(case.clean, case.noised, case.params)
    assert OPS.decode_step(case.clean, case.noised, packed)[0].equal(plain.token)
    sampled = sk.decode_step(case.clean, case.noised, SAMPLING, refusal_mask=case.refusal_mask[:1], seeds=case.seeds)
    packed = sk.pack_params(SAMPLING, 3)
    ours = OPS.decode_step(case.clean, case.noised, packed, case.refusal_mask[:1], None, case.seeds)
    assert ours[0].equal(sampled.token)


def test_empty_batch():
    empty = torch.empty(0, 40)
    packed = sk.pack_params(StepParams(), 0)
    assert [tuple(t.shape) for t in OPS.decode_step(empty, empty, packed)] == [(0,)] * 4
    assert [tuple(t.shape) for t in OPS.decode_scores(empty, None, packed)] == [(0, 40)] * 3 + [(0,)]
    assert OPS.draw(empty, greedy=True)[0].shape == (0,)


@pytest.mark.parametrize("name", ["decode_step", "decode_scores", "draw"])
def test_opcheck(name):
    case = make_case(3, batch=4, vocab_size=70, params=SAMPLING)
    operands = {
        "decode_step": arguments(case),
        "decode_scores": arguments(case)[:5],
        "draw": (case.clean, case.seeds, case.stream, torch.full((4,), 2)),
    }[name]
    torch.library.opcheck(getattr(OPS, name).default, operands)


def test_compiles_whole_and_once():
    cases = [make_case(seed, batch=4, vocab_size=70, params=SAMPLING) for seed in range(3)]
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def step(*operands):
        token, logprob, _, status = OPS.decode_step(*operands)
        return token + 1, logprob, status

    for case in cases:
        operands = list(arguments(case))
        operands[-1] = torch.full((4,), case.step)
        token, _, status = step(*operands)
        assert token.equal(case.run().token + 1)
        assert not status.any()
    assert len(compilations) == 1, "a value recompiled the graph"


def test_meta_tensors_have_shapes_only():
    case = make_case(4, batch=5, vocab_size=64)
    meta = [t.to("meta") for t in arguments(case)]
    token, logprob, n_kept, status = OPS.decode_step(*meta)
    assert [(t.device.type, t.shape[0]) for t in (token, logprob, n_kept, status)] == [("meta", 5)] * 4
    assert [t.dtype for t in (token, logprob, n_kept, status)] == [torch.int64, torch.float32, torch.int32, torch.int32]
    scores, biased, keep, _ = OPS.decode_scores(*meta[:5])
    assert scores.shape == biased.shape == keep.shape == (5, 64)
    assert (scores.dtype, keep.dtype) == (torch.float32, torch.bool)


def test_operators_refuse_what_they_cannot_read():
    case = make_case(5, batch=2, vocab_size=40, params=SAMPLING)
    clean, noised, packed, words, mask_id, seeds, _, _ = arguments(case)
    for operands, error, text in (
        ((clean.double(), noised, packed), ArgumentTypeError, "clean is torch.float64"),
        ((clean, noised[:, :9], packed), ArgumentError, "noised has shape"),
        ((clean, noised, packed.float()), ArgumentTypeError, "params is torch.float32; legal: torch.float64"),
        ((clean, noised, packed[:, :1]), ArgumentError, r"params has shape \[10, 1\].*legal: \[10, 2\]"),
        ((clean, noised, packed, words.long()), ArgumentTypeError, "refusal_mask is torch.int64"),
        ((clean, noised, packed, None, mask_id), ArgumentError, "mask_id is given but refusal_mask is None"),
        ((clean, noised, packed, words), ArgumentError, "mask_id is None but refusal_mask has 3 rows"),
        ((clean, noised, packed, words, mask_id.int()), ArgumentTypeError, "mask_id is torch.int32"),
        ((clean, noised, packed, words, mask_id, seeds[:1]), ArgumentError, r"seeds has shape \[1\]"),
        ((clean, noised, packed, words, mask_id, seeds, None, seeds[:1]), ArgumentError, r"step has shape \[1\]"),
    ):
        with pytest.raises(error, match=text):
            OPS.decode_step(*operands)
    with pytest.raises(ArgumentError, match="seeds is None"):
        OPS.draw(clean)


def test_nothing_is_read_outside_the_masks():
    case = make_case(6, batch=2, vocab_size=40, params=SAMPLING)
    clean, noised, packed, words, _, seeds, _, _ = arguments(case)
    for bad in (3, 2**40):
        with pytest.raises((ArgumentError, IndexError)):
            OPS.decode_step(clean, noised, packed, words, torch.tensor([0, bad]), seeds)
        with pytest.raises((ArgumentError, IndexError)):
            OPS.decode_scores(clean, noised, packed, words, torch.tensor([0, bad]))
