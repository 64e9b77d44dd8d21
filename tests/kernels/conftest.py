"""Settings of the kernel tests: one thread, and hypothesis examples that are the same in every run."""

from __future__ import annotations

import hypothesis
import pytest
import torch

# No shrinking: it takes minutes on a wrong kernel, and the smallest failing tensor says little more than the first.
hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    """The environment of whoever runs the tests must not choose the back end."""
    monkeypatch.delenv("SAFECODE_KERNELS_BACKEND", raising=False)
    monkeypatch.delenv("SAFECODE_REQUIRE", raising=False)
