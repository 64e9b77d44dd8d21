"""What importing the package costs and pulls in, and what it exports."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import safecode_kernels as sk

MAX_IMPORT_SECONDS = 0.05
ATTEMPTS = 5

PROBE = """
import sys, time, torch
before = set(sys.modules)
start = time.process_time()
import safecode_kernels
print(time.process_time() - start)
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def probe() -> tuple[float, set[str]]:
    """Return the CPU seconds that the import adds to importing torch, and the top-level modules it adds."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    seconds, modules = done.stdout.splitlines()
    return float(seconds), set(modules.split())


def test_import_is_light_and_needs_torch_only():
    seconds, modules = probe()
    third_party = modules - set(sys.stdlib_module_names) - {"safecode_kernels", "torch"}
    assert not third_party, "importing safecode_kernels pulls in more than torch"
    for _ in range(ATTEMPTS):  # a busy machine may slow one import down, not five
        if seconds < MAX_IMPORT_SECONDS:
            break
        seconds = min(seconds, probe()[0])
    assert seconds < MAX_IMPORT_SECONDS


def test_public_names_exist_and_are_documented():
    for name in sk.__all__:
        assert getattr(sk, name).__doc__, f"{name} has no docstring"


def test_version_is_that_of_the_distribution():
    assert sk.__version__ == version("safecode-kernels")
