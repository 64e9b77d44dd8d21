"""Each rule of the decode step, one row at a time, by the CUDA kernels on the emulated GPU."""

from __future__ import annotations

import pytest

from kernels.emulated_cuda import emulated_gpu
from kernels.test_rules import *  # noqa: F403


@pytest.fixture(scope="module")
def backend():
    """Takes the place of the fixture that names each back end in turn."""
    with emulated_gpu():
        yield "native_cuda"
