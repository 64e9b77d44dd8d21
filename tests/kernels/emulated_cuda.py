"""The CUDA back end on a CPU: its kernels, launcher and bindings compiled against the emulation in tests/cpp.

Everything but the GPU and CUDA itself is the code that ships: native_cuda.py calls the bindings, these the launcher,
which runs the kernels thread by thread (tests/cpp/emulation/emulator.h says what that can show and what not).
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import safecode_kernels as sk
from safecode_kernels import registry

ROOT = Path(__file__).resolve().parents[2]
# Threads of an emulated block, hence candidates that a row may have before it goes the dense way (csrc/cuda/task.h).
THREADS = 64
MODULE, BACKEND = "safecode_kernels._native_cuda", "safecode_kernels.backends.native_cuda"
# Blocks that share a row, in a cluster or not; None is what the launcher chooses.
PLANS = (None, (True, 1), (True, 3), (True, 8), (False, 1), (False, 2), (False, 5))


def build(target: str, *, folder: str = "emulated", **options: str) -> Path:
    """Return the folder where CMake has built a target of tests/cpp; several test processes may ask for the same."""
    missing = [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"the emulation needs {' and '.join(missing)}")
    pybind11 = pytest.importorskip("pybind11")
    where = ROOT / "build" / folder
    where.mkdir(parents=True, exist_ok=True)
    defined = {
        "SAFECODE_TESTS": "ON",
        "SAFECODE_EMULATED_THREADS": str(THREADS),
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "Python_EXECUTABLE": sys.executable,
        **options,
    }
    configure = ["cmake", "-S", str(ROOT), "-B", str(where), *(f"-D{key}={value}" for key, value in defined.items())]
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    with open(where / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(where), "--target", target]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return where / "tests" / "cpp"


class EmulatedGpu:
    """The emulated device and what a test may do to it; `module` is the emulated _native_cuda."""

    def __init__(self, module: ModuleType):
        self.module = module
        self._library = ctypes.CDLL(str(module.__file__))
        self._library.emulated_set_schedule.argtypes = [ctypes.c_uint64]
        self.reset()

    def set_device(self, *, count: int = 1, capability: int = 90, multiprocessors: int = 4) -> None:
        """Set what CUDA says about the machine; 90 is compute capability 9.0, clusters exist from there on."""
        self._library.emulated_set_device(count, capability, multiprocessors)

    def set_schedule(self, seed: int) -> None:
        """Set the order of threads and blocks: 0 is their own, any other seed a random one."""
        self._library.emulated_set_schedule(seed)

    def fail_next_launch(self, error: int) -> None:
        """Let the next launch return one of CUDA's error codes."""
        self._library.emulated_fail_next_launch(error)

    def reset(self) -> None:
        """Return to the default device and schedule."""
        self.set_device()
        self.set_schedule(0)


@contextmanager
def emulated_gpu() -> Iterator[EmulatedGpu]:
    """Let the back end native_cuda serve CPU tensors by the emulation."""
    found = sorted(build("emulated_module").glob("_native_cuda*.so"))
    assert len(found) == 1, found
    spec = importlib.util.spec_from_file_location(MODULE, found[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, MODULE, module)
        patch.setattr(sk, "_native_cuda", module, raising=False)
        patch.delitem(sys.modules, BACKEND, raising=False)
        records = [replace(b, devices=("cpu",)) if b.name == "native_cuda" else b for b in registry._BACKENDS]
        patch.setattr(registry, "_BACKENDS", tuple(records))
        native_cuda = importlib.import_module(BACKEND)
        patch.setattr(native_cuda, "_stream", lambda device: 0)
        yield EmulatedGpu(module)
        sys.modules.pop(BACKEND, None)


@contextmanager
def forced_plan(plan: tuple[bool, int] | None) -> Iterator[None]:
    """Let every step be launched by this plan instead of the chosen one."""
    native_cuda = importlib.import_module(BACKEND)
    make = native_cuda._native_step

    def planned(*arguments):
        native = make(*arguments)
        if plan is not None:
            native.use_plan(*plan)
        return native

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_cuda, "_native_step", planned)
        yield


@pytest.fixture(scope="module")
def emulation():
    with emulated_gpu() as gpu:
        yield gpu


@pytest.fixture
def gpu(emulation):
    """The emulated GPU, as every test begins with it."""
    emulation.reset()
    return emulation


def same(a: sk.StepResult, b: sk.StepResult) -> bool:
    return all(x.equal(y) for x, y in zip(a, b, strict=True))
