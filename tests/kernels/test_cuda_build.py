"""The CUDA module compiles and links with nvcc, and ptxas and the disassembler find in it what was meant.

    make test-cuda-build        the architecture of H100 and H200, in CI; the others in make test-all

No GPU is needed. A line per kernel says what it takes (shown with pytest -s).
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from kernels.emulated_cuda import build

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ("decode_cluster", "decode_blocks", "scores_cluster", "scores_blocks")
FORMATS = ("Float32", "BFloat16", "Float16")
ARCHITECTURES = ("80", "90a", "100", "120")
FIRST_WITH_CLUSTERS = 90
# 65,536 registers of a multiprocessor over the 512 threads of a block.
MAX_REGISTERS = 128
# What a block has without asking for more.
MAX_SHARED_BYTES = 48 * 1024
# csrc/cuda/scan.cuh: kVectorsPerThread loads are in flight.
VECTOR_LOADS = 6
NOT_AVAILABLE = 3  # exit code of the driver


class Usage(NamedTuple):
    """What ptxas says about one kernel, in its own units."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    spilled_bytes: int


class Built(NamedTuple):
    """A finished build: its folder, and the usage of each kernel by (kernel, format)."""

    folder: Path
    usage: dict[tuple[str, str], Usage]


def usage_of(log: str) -> dict[tuple[str, str], Usage]:
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        kernel = next(k for k in KERNELS if k in name), next(f for f in FORMATS if f"{len(f)}{f}E" in name)
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        )
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        found[kernel] = Usage(registers, int(shared.group(1)) if shared else 0, stack, stores + loads)
    return found


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda architecture: f"sm_{architecture}")
def built(request, tmp_path_factory):
    """The module and the driver for one architecture, from nothing, so that ptxas says something about every kernel."""
    if shutil.which("nvcc") is None or shutil.which("cmake") is None:
        pytest.skip("nvcc or cmake is not here: the CUDA module is not compiled")
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("cuda")
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(folder), "-DSAFECODE_TESTS=ON", "-DCMAKE_CUDA_FLAGS=-Xptxas -v"),
        f"-DSAFECODE_CUDA_ARCHITECTURES={request.param}-real",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    compile_all = ["cmake", "--build", str(folder), "--target", "_native_cuda", "cuda_driver", "--parallel", "2"]
    log = ""
    for command in (configure, compile_all):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        log = done.stdout + done.stderr
        assert done.returncode == 0, log
    assert "warning" not in log, log
    return request.param, Built(folder, usage_of(log))


def test_every_kernel_fits_and_spills_nothing(built):
    architecture, (_, usage) = built
    assert sorted(usage) == sorted((kernel, format) for kernel in KERNELS for format in FORMATS)
    for (kernel, format), used in sorted(usage.items()):
        print(
            f"\nsm_{architecture} {kernel} {format}: {used.registers} registers, {used.spilled_bytes} bytes spilled, "
            f"{used.stack_bytes} of stack, {used.shared_bytes} of shared memory",
            end="",
        )
        assert used.spilled_bytes == 0, kernel
        assert used.stack_bytes == 0, kernel
        assert used.registers <= MAX_REGISTERS, kernel
        assert used.shared_bytes <= MAX_SHARED_BYTES, kernel
        has_body = not kernel.endswith("_cluster") or int(architecture.rstrip("a")) >= FIRST_WITH_CLUSTERS
        assert (used.shared_bytes > 0) == has_body, "the form for clusters has a body exactly where clusters exist"


def test_the_module_loads_without_a_gpu_and_links_no_cuda_library(built):
    architecture, (folder, _) = built
    (module,) = folder.glob("_native_cuda*.so")
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); import _native_cuda as native; "
        "print(native.architectures()); print(native.why_unusable(-1))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == f"{architecture}-real"
    listed = subprocess.run(["ldd", str(module)], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in listed.replace(str(module), "")
    assert "torch" not in listed


def test_the_driver_says_when_there_is_no_gpu(built):
    """With a GPU it compares the kernels with the CPU code; `make sanitize` runs it under compute-sanitizer."""
    driver = built[1].folder / "tests" / "cpp" / "cuda_driver"
    done = subprocess.run([str(driver)], capture_output=True, text=True, check=False)
    if done.returncode == NOT_AVAILABLE:
        assert done.stdout.startswith("not available: ")
    else:
        assert done.returncode == 0, done.stdout + done.stderr


def disassembler() -> str | None:
    """Where cuobjdump is: of the toolkit, or the one that Triton's package carries."""
    if found := shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    return shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))


def test_the_scan_loads_sixteen_bytes_at_a_time_and_nothing_lies_in_local_memory(built):
    architecture, (folder, _) = built
    cuobjdump = disassembler()
    if cuobjdump is None:
        pytest.skip("cuobjdump is not here (CUDA toolkit or the package triton): the machine code is not read")
    (module,) = folder.glob("_native_cuda*.so")
    listed = subprocess.run([cuobjdump, "-sass", str(module)], capture_output=True, text=True, check=True).stdout
    functions = {part.split()[0]: part for part in listed.split("Function : ")[1:]}
    assert len(functions) == len(KERNELS) * len(FORMATS)
    for name, code in functions.items():
        assert not re.search(r"\b(STL|LDL)\b", code), name
        is_scan = "decode_blocks" in name or ("decode_cluster" in name and architecture != "80")
        if is_scan:
            assert len(re.findall(r"\bLDG\.E\.128\b", code)) >= VECTOR_LOADS, name


def test_the_driver_agrees_with_the_cpu_code_on_the_emulated_gpu():
    driver = build("emulated_driver") / "emulated_driver"
    done = subprocess.run([str(driver)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "72 of 72 runs agree with the CPU code" in done.stdout


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_driver_under_sanitizers(sanitizers):
    """ThreadSanitizer takes every emulated thread for a thread: a barrier or fence that is missing is a data race."""
    folder = f"sanitized_{sanitizers.partition(',')[0]}"
    driver = build("emulated_driver", folder=folder, SAFECODE_SANITIZE=sanitizers) / "emulated_driver"
    done = subprocess.run([str(driver)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
