"""The choice of the back end: by name, automatic, refused, required."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

import safecode_kernels as sk
from safecode_kernels import Backend, BackendUnavailable, registry


def fake(name: str, *, priority: int, reason: str | None = None, **fields) -> Backend:
    """A record whose module is the eager one: the registry is under test, not the kernels."""
    defaults = {"devices": ("cpu",), "dtypes": (torch.float32,), "module": "safecode_kernels.backends.eager"}
    return Backend(name=name, priority=priority, probe=lambda: reason, **{**defaults, **fields})


@pytest.fixture
def three(monkeypatch):
    fast, broken = fake("fast", priority=10), fake("broken", priority=20, reason="its library is missing")
    eager = next(backend for backend in sk.list_backends() if backend.name == "eager")
    monkeypatch.setattr(registry, "_BACKENDS", (eager, fast, broken))
    monkeypatch.setattr(registry, "_logged", set())


def test_only_what_exists_is_listed():
    assert [backend.name for backend in sk.list_backends()] == ["native_cuda", "native_cpu", "triton", "eager"]
    for backend in sk.list_backends():
        if backend.probe() is not None:
            continue
        functions = backend.load()
        assert callable(functions.step)
        assert callable(functions.scores)
        assert callable(functions.draw)


def test_every_listed_backend_decodes_what_it_says_it_reads():
    for backend in sk.list_backends():
        for dtype in backend.dtypes:
            if backend.supports(torch.device("cpu"), dtype) is None:
                clean = torch.tensor([[0.0, 2.0, 1.0]], dtype=dtype)
                assert int(sk.decode_step(clean, clean, sk.StepParams(), backend=backend.name).token) == 1


@pytest.mark.usefixtures("three")
def test_auto_takes_the_best_usable_and_explain_says_why_not_the_others():
    assert sk.resolve().name == "fast"
    explanation = sk.explain()
    assert explanation.chosen == "fast"
    assert explanation.reasons == {"broken": "its library is missing", "eager": "fast goes first"}
    assert str(explanation).splitlines() == [
        "fast: chosen",
        "broken: not chosen, its library is missing",
        "eager: not chosen, fast goes first",
    ]


@pytest.mark.usefixtures("three")
def test_auto_skips_what_cannot_serve_device_or_dtype():
    assert sk.resolve(dtype=torch.bfloat16).name == "eager"
    assert sk.explain(dtype=torch.bfloat16).reasons["fast"] == "it reads torch.float32, not torch.bfloat16"
    assert sk.explain(device="meta").reasons["fast"] == "it runs on cpu, not on meta"


@pytest.mark.usefixtures("three")
def test_auto_logs_each_reason_once(caplog):
    with caplog.at_level(logging.INFO, logger="safecode_kernels"):
        sk.resolve()
        sk.resolve()
    assert [record.getMessage() for record in caplog.records] == [
        "back end broken is passed over: its library is missing"
    ]


@pytest.mark.usefixtures("three")
def test_named_backend_is_taken_or_refused_with_its_reason():
    assert sk.resolve("eager").name == "eager"
    with pytest.raises(BackendUnavailable, match="backend='broken' cannot serve float32 logits on cpu: its library is"):
        sk.resolve("broken")
    assert sk.explain("broken").chosen is None
    with pytest.raises(BackendUnavailable, match="its library is missing"):
        sk.decode_step(torch.zeros(1, 4), None, sk.StepParams(), backend="broken")


@pytest.mark.usefixtures("three")
def test_unknown_name_lists_the_known_ones():
    with pytest.raises(sk.ArgumentError, match=r"backend='native' is no back end .* legal: auto, broken, fast, eager"):
        sk.resolve("native")


def test_nothing_usable_lists_every_reason(monkeypatch):
    monkeypatch.setattr(
        registry, "_BACKENDS", (fake("a", priority=1, reason="no a"), fake("b", priority=0, reason="no b"))
    )
    with pytest.raises(BackendUnavailable, match=r"no back end serves .* \(a: no a; b: no b\)"):
        sk.resolve()
    assert sk.explain().chosen is None


@pytest.mark.usefixtures("three")
def test_environment_names_the_backend_of_auto_only(monkeypatch):
    monkeypatch.setenv("SAFECODE_KERNELS_BACKEND", "eager")
    assert sk.resolve().name == "eager"
    assert sk.resolve("fast").name == "fast"
    monkeypatch.setenv("SAFECODE_KERNELS_BACKEND", "broken")
    with pytest.raises(BackendUnavailable, match="SAFECODE_KERNELS_BACKEND='broken' cannot serve"):
        sk.resolve()
    monkeypatch.setenv("SAFECODE_KERNELS_BACKEND", "typo")
    with pytest.raises(sk.ArgumentError, match="SAFECODE_KERNELS_BACKEND='typo' is no back end"):
        sk.resolve()


@pytest.mark.usefixtures("three")
def test_environment_turns_a_fall_back_into_a_failure(monkeypatch):
    monkeypatch.setenv("SAFECODE_REQUIRE", "fast, eager")
    assert sk.resolve().name == "fast"
    with pytest.raises(BackendUnavailable, match="SAFECODE_REQUIRE names 'fast', which cannot serve bfloat16"):
        sk.resolve(dtype=torch.bfloat16)
    monkeypatch.setenv("SAFECODE_REQUIRE", "broken")
    with pytest.raises(BackendUnavailable, match=r"SAFECODE_REQUIRE names 'broken'.*its library is missing"):
        sk.resolve()
    monkeypatch.setenv("SAFECODE_REQUIRE", "native_cpu")
    with pytest.raises(BackendUnavailable, match="names 'native_cpu', which this installation does not have"):
        sk.resolve()
    assert sk.resolve("eager").name == "eager"


@pytest.mark.usefixtures("three")
def test_prepared_step_says_which_backend_it_has():
    prepared = sk.prepare_step(sk.StepParams(), batch=1, vocab_size=4, device="cpu", dtype=torch.float32)
    assert prepared.backend == "fast"


def test_native_cpu_without_its_module_says_so_and_is_passed_over(monkeypatch):
    monkeypatch.setitem(sys.modules, "safecode_kernels._native", None)
    assert sk.resolve().name == "eager"
    assert "its compiled module is missing" in sk.explain().reasons["native_cpu"]
    with pytest.raises(BackendUnavailable, match="install with SAFECODE_NATIVE=on"):
        sk.resolve("native_cpu")


def run_module(**environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "safecode_kernels"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_module_prints_versions_backends_and_reasons():
    done = run_module(SAFECODE_REQUIRE="no_such_back_end")
    assert done.returncode == 1
    for piece in (f"safecode_kernels {sk.__version__}", f"torch            {torch.__version__}", "eager", "native_cpu"):
        assert piece in done.stdout
    assert done.stderr == ""
    assert run_module().returncode == 0
