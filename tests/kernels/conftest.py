"""Settings of the kernel tests: one thread, each back end in turn, and hypothesis examples that are always the same."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

import safecode_kernels as sk
from kernels.emulated_cuda import emulation, gpu  # noqa: F401, fixtures
from kernels.triton_harness import small_tiles, triton_form, triton_usable  # noqa: F401, fixtures

# No shrinking: it takes minutes on a wrong kernel, and the smallest failing tensor says little more than the first.
hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.load_profile("fixed")

# Where a back end is tested that these tests skip, because it cannot run on the CPU or would take too long.
ELSEWHERE = {
    "native_cuda": "; tested emulated by test_cuda_emulated.py, and on a GPU by test_native_cuda.py",
    "triton": "; tested by test_triton.py, which test_triton_interpreted.py runs in that interpreter",
}
# Read before the tests hide it from the code under test: what it names may not be skipped.
REQUIRED = {name.strip() for name in os.environ.get("SAFECODE_REQUIRE", "").split(",") if name.strip()}


@pytest.fixture(scope="session")
def required():
    """The back ends that SAFECODE_REQUIRE names."""
    return REQUIRED


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _settings(request, monkeypatch):
    """What "auto" stands for is said by the fixture `backend`, if a test has it, and never by the environment."""
    monkeypatch.delenv("SAFECODE_KERNELS_BACKEND", raising=False)
    monkeypatch.delenv("SAFECODE_REQUIRE", raising=False)
    if "backend" in request.fixturenames:
        monkeypatch.setenv("SAFECODE_KERNELS_BACKEND", request.getfixturevalue("backend"))


def usable_or_skip(name: str) -> str:
    """Return the name of a back end; skip the test if it cannot run here, fail if SAFECODE_REQUIRE names it."""
    record = next(record for record in sk.list_backends() if record.name == name)
    reason = record.supports(torch.device("cpu"), torch.float32)
    if reason and name in REQUIRED and "cpu" in (record.devices or ("cpu",)):
        pytest.fail(f"SAFECODE_REQUIRE names {name}, which cannot run: {reason}")
    if reason:
        pytest.skip(f"{name}: {reason}{ELSEWHERE.get(name, '')}")
    return name


@pytest.fixture(scope="session", params=[record.name for record in sk.list_backends()])
def backend(request):
    """The name of each back end in turn."""
    return usable_or_skip(request.param)
