"""What the tests of the Triton back end share: where they run, small tiles, and an interpreter that is less slow.

conftest.py makes the fixtures known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FunctionType, SimpleNamespace

import pytest
import torch

import safecode_kernels as sk
from safecode_kernels import StepParams
from safecode_kernels.testing import Case, assert_step_equals

RECORD = next(record for record in sk.list_backends() if record.name == "triton")
INTERPRETED = RECORD.supports(torch.device("cpu"), torch.float32) is None
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
# A short row then needs all that a long one does, and the interpreter is quicker.
SMALL = {} if ON_GPU else {"block": 256, "memory_block": 256, "tile": 128, "log_room": 5}


def use_sizes(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Let the back end cut rows by these sizes; without any by its own."""
    from safecode_kernels.backends import triton
    from safecode_kernels.backends.triton_kernels.shapes import Sizes

    monkeypatch.setattr(triton, "SIZES", Sizes(**sizes))


@pytest.fixture(scope="module")
def triton_usable(required):
    """Skip the tests of a module where Triton cannot run; fail if SAFECODE_REQUIRE names it."""
    reason = RECORD.supports(torch.device(DEVICE), torch.float32)
    if reason and "triton" in required:
        pytest.fail(f"SAFECODE_REQUIRE names triton, which cannot run: {reason}")
    if reason:
        pytest.skip(f"triton: {reason}; test_triton_interpreted.py runs these tests")
    with nullcontext() if ON_GPU else patched_once_per_launch():
        yield


@pytest.fixture
def small_tiles(triton_usable, monkeypatch):
    """Small tiles where the kernels are interpreted."""
    use_sizes(monkeypatch, **SMALL)


@pytest.fixture(params=["slices", "rows"])
def triton_form(request, small_tiles, monkeypatch):
    """Both ways to cut a batch: several programs per row, or one."""
    if request.param == "rows":
        use_sizes(monkeypatch, **SMALL, max_split_rows=0)
    return request.param


def run(case: Case) -> sk.StepResult:
    return sk.StepResult(*(tensor.cpu() for tensor in case.to(DEVICE).run("triton")))


def run_scores(case: Case) -> sk.StepScores:
    return sk.StepScores(*(tensor.cpu() for tensor in case.to(DEVICE).run_scores("triton")))


def assert_equals_eager(case: Case) -> sk.StepResult:
    ours = run(case)
    assert_step_equals(case, ours, case.run("eager"))
    return ours


def sampling(**fields) -> StepParams:
    return StepParams(**{"contrast_weight": 0, "plausibility_beta": 0, "greedy": False, **fields})


@contextmanager
def patched_once_per_launch() -> Iterator[None]:
    """Inside, each module of the language is patched once per launch: twice as fast, and the same results."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done = set()

    def patch_once(function: FunctionType):
        modules = frozenset(id(value) for value in function.__globals__.values() if value in LANGUAGES)
        if modules in done:
            return SimpleNamespace(restore=lambda: None)
        done.add(modules)
        return patch(function)

    def launch_afresh(*arguments, **options):
        done.clear()
        return launch(*arguments, **options)

    LANGUAGES = (interpreter.tl, interpreter.tl.core)
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh
    yield
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, launch
