"""Two import packages from two roots, and the compiled module `safecode_kernels._native`, built from csrc by CMake.

SAFECODE_NATIVE, read here only:
    auto    build it if CMake and a C++ compiler are there and the build succeeds, else install without it (default)
    on      build it; a failure ends the installation
    off     pure Python
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VARIABLE = "SAFECODE_NATIVE"
LEGAL = ("auto", "on", "off")


def say(text):
    """Tell it to whoever installs; pip shows it with -v or when the build fails."""
    sys.stderr.write(f"safecode-kernels: {text}\n")


def native_extensions():
    """Return the compiled module as the environment asks for it: required, optional or left out."""
    wanted = os.environ.get(VARIABLE, "").strip() or "auto"
    if wanted not in LEGAL:
        sys.exit(f"{VARIABLE}={wanted!r} is not legal; legal: {', '.join(LEGAL)}")
    if wanted == "auto":
        compilers = [os.environ.get("CXX", "").partition(" ")[0], "c++", "g++", "clang++", "cl"]
        missing = [] if any(map(shutil.which, filter(None, compilers))) else ["a C++ compiler"]
        missing += [] if shutil.which("cmake") else ["cmake"]
        if missing:
            say(f"no {' and no '.join(missing)}: installing pure Python, the decode step will run in eager torch")
            return []
    return [] if wanted == "off" else [Extension("safecode_kernels._native", sources=[], optional=wanted == "auto")]


class CMakeBuild(build_ext):
    """Builds the module with CMakeLists.txt, which has the list of sources."""

    def build_extension(self, ext):
        """Configure, build and put the module where setuptools expects it."""
        try:
            self._run_cmake(ext)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            if not ext.optional:
                raise
            say(f"the native build failed ({error}): installing pure Python; {VARIABLE}=on shows the failure")

    def _run_cmake(self, ext):
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)  # a failed build must not ship the module of an earlier one
        build = Path(self.build_temp).resolve() / "native"
        build.mkdir(parents=True, exist_ok=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)  # it may name a compiler or interpreter that is gone
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"),
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--config", "Release"], check=True)


setup(
    packages=find_packages(include=["safecode_kernels*"]) + find_packages("python"),
    package_dir={"safecode_mllm": "python/safecode_mllm"},
    # Data is what stands here and no more: by default every file that MANIFEST.in names would count.
    include_package_data=False,
    package_data={
        "safecode_kernels": ["py.typed", "*.pyi"],
        "safecode_mllm": ["py.typed", "hazard_world/weights/*"],
    },
    ext_modules=native_extensions(),
    cmdclass={"build_ext": CMakeBuild},
)
