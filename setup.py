"""Two import packages from two roots; the compiled modules `safecode_kernels._native` and `._native_cuda`, by CMake.

SAFECODE_NATIVE and SAFECODE_CUDA, read here only, for the CPU and the GPU module:
    auto    build it if what it needs is there and the build succeeds, else install without it (default)
    on      build it; a failure ends the installation
    off     leave it out

The CPU module needs CMake and a C++ compiler, the GPU module nvcc as well. With auto it is built if a GPU is visible,
for the architectures of the GPUs here; with on for every architecture in CUDA_ARCHITECTURES, whatever this machine has.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE, CUDA = "SAFECODE_NATIVE", "SAFECODE_CUDA"
LEGAL = ("auto", "on", "off")
# As CMake names them: "-real" is machine code alone; the last one also brings PTX, which newer GPUs compile themselves.
CUDA_ARCHITECTURES = ("80-real", "90a-real", "100-real", "120")
# What of 9.0 the architecture 90a knows besides; its code runs on 9.0 alone.
SPECIFIC = {"90": "90a"}


def say(text):
    """Tell it to whoever installs; pip shows it with -v or when the build fails."""
    sys.stderr.write(f"safecode-kernels: {text}\n")


def wanted(variable):
    """Return what the environment asks of a module."""
    value = os.environ.get(variable, "").strip() or "auto"
    if value not in LEGAL:
        sys.exit(f"{variable}={value!r} is not legal; legal: {', '.join(LEGAL)}")
    return value


def native_extensions():
    """Return the CPU module as the environment asks for it: required, optional or left out."""
    if wanted(NATIVE) == "auto":
        compilers = [os.environ.get("CXX", "").partition(" ")[0], "c++", "g++", "clang++", "cl"]
        missing = [] if any(map(shutil.which, filter(None, compilers))) else ["a C++ compiler"]
        missing += [] if shutil.which("cmake") else ["cmake"]
        if missing:
            say(f"no {' and no '.join(missing)}: installing pure Python, the decode step will run in eager torch")
            return []
    return [] if wanted(NATIVE) == "off" else [CMakeModule("safecode_kernels._native", NATIVE)]


def cuda_extensions():
    """Return the GPU module likewise."""
    if wanted(CUDA) == "off":
        return []
    if wanted(CUDA) == "on":
        if not nvcc():
            sys.exit("SAFECODE_CUDA=on, and there is no nvcc in PATH, CUDACXX or /usr/local/cuda/bin")
        return [CMakeModule("safecode_kernels._native_cuda", CUDA, CUDA_ARCHITECTURES)]
    if not nvcc() or not shutil.which("cmake"):
        return []
    architectures = architectures_here()
    if not architectures:
        say("nvcc is here but no GPU: installing without the CUDA module; SAFECODE_CUDA=on builds it all the same")
        return []
    return [CMakeModule("safecode_kernels._native_cuda", CUDA, architectures)]


def nvcc():
    """Return the path of CUDA's compiler, None if there is none."""
    named = os.environ.get("CUDACXX")
    return named or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def architectures_here():
    """Return the architectures of the GPUs that the driver shows, none if there is no driver."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        shown = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ()
    found = sorted({major + minor for major, minor in re.findall(r"^(\d+)\.(\d)$", shown, re.MULTILINE)}, key=int)
    return tuple(f"{SPECIFIC.get(one, one)}-real" for one in found)


class CMakeModule(Extension):
    """A module that CMakeLists.txt builds as the target of its name."""

    def __init__(self, name, variable, architectures=()):
        super().__init__(name, sources=[], optional=wanted(variable) == "auto")
        self.variable = variable
        self.target = name.rpartition(".")[2]
        self.architectures = architectures


class CMakeBuild(build_ext):
    """Builds the modules with CMakeLists.txt, which has the list of sources."""

    def build_extension(self, ext):
        """Configure, build and put the module where setuptools expects it."""
        try:
            self._run_cmake(ext)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            if not ext.optional:
                raise
            say(f"{ext.name} could not be built ({error}): installing without it; {ext.variable}=on shows the failure")

    def _run_cmake(self, ext):
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)  # a failed build must not ship the module of an earlier one
        build = Path(self.build_temp).resolve() / ext.target.strip("_")
        build.mkdir(parents=True, exist_ok=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)  # it may name a compiler or interpreter that is gone
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"),
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]
        if ext.architectures:
            configure += [
                f"-DSAFECODE_CUDA_ARCHITECTURES={';'.join(ext.architectures)}",
                f"-DCMAKE_CUDA_COMPILER={nvcc()}",
            ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--config", "Release", "--target", ext.target], check=True)


setup(
    packages=find_packages(include=["safecode_kernels*"]) + find_packages("python"),
    package_dir={"safecode_mllm": "python/safecode_mllm"},
    # Data is what stands here and no more: by default every file that MANIFEST.in names would count.
    include_package_data=False,
    package_data={
        "safecode_kernels": ["py.typed", "*.pyi"],
        "safecode_mllm": ["py.typed", "hazard_world/weights/*", "generation/recipe/*", "generation/recipe/*/*"],
    },
    ext_modules=native_extensions() + cuda_extensions(),
    cmdclass={"build_ext": CMakeBuild},
)
