"""Triton's interpreter, which runs kernels on the CPU: the tests of the back end in a process that has it on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import safecode_kernels as sk
from kernels.conftest import REQUIRED

ROOT = Path(__file__).resolve().parents[2]
# Fewer would mean that most were skipped or not found.
FEWEST = {"not slow": 60, "slow": 30}
FILES = ("tests/kernels/test_triton.py", "tests/kernels/test_triton_steps.py")


def record() -> sk.Backend:
    return next(backend for backend in sk.list_backends() if backend.name == "triton")


@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_in_the_interpreter(marks):
    if "triton" not in REQUIRED:
        pytest.importorskip("triton", reason="triton is not installed, so nothing tests its back end here")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "SAFECODE"))}
    environment |= {"TRITON_INTERPRET": "1", "SAFECODE_REQUIRE": "triton"}
    command = [*(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"), "-m", marks]
    done = subprocess.run(
        [*command, *FILES],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert passed is not None
    assert int(passed[1]) >= FEWEST[marks], done.stdout


def test_without_gpu_and_interpreter_it_says_why_it_is_not_usable():
    code = (
        "import safecode_kernels as sk\n"
        "print(sk.explain().reasons['triton'])\n"
        "print(sk.explain('triton', device='cpu').reasons['triton'])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    automatic, named = done.stdout.splitlines()
    assert "it runs on CUDA devices" in automatic or "triton cannot be imported" in automatic
    assert "backend='triton' cannot serve float32 logits on cpu: " in named


def test_it_is_passed_over_where_triton_is_missing(monkeypatch):
    from safecode_kernels import registry

    monkeypatch.setitem(sys.modules, "triton", None)
    registry._why_no_triton.cache_clear()
    try:
        assert sk.resolve().name != "triton"
        assert "triton cannot be imported" in record().probe()
    finally:
        monkeypatch.undo()
        registry._why_no_triton.cache_clear()


def test_it_refuses_devices_that_its_kernels_are_not_made_for(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    cuda = torch.device("cuda:0")
    assert record().supports(cuda, torch.float32) == "cuda:0 is older than compute capability 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert record().supports(cuda, torch.float32) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert record().supports(cuda, torch.float32) == "its kernels are made for NVIDIA devices, not for ROCm's"
