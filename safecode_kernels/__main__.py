"""`python -m safecode_kernels`: print versions, settings, and every back end with the reason if it cannot serve."""

from __future__ import annotations

import platform
import sys

import torch

from . import BackendUnavailable, __version__, explain, list_backends, resolve
from .settings import BACKEND_VARIABLE, REQUIRE_VARIABLE, read_settings


def main() -> int:
    """Print the report; return 1 if the environment asks for a back end that cannot serve on the CPU or accelerator."""
    settings = read_settings()
    accelerator = _accelerator()
    print(f"safecode_kernels {__version__}")
    print(f"python           {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(
        f"torch            {torch.__version__}, {torch.get_num_threads()} threads, accelerator: {accelerator or 'none'}"
    )
    print(f"{BACKEND_VARIABLE}={settings.backend}")
    print(f"{REQUIRE_VARIABLE}={','.join(settings.required)}")
    print("\nback ends, best first")
    for backend in list_backends():
        devices = ", ".join(backend.devices) if backend.devices else "any device"
        print(f"  {backend.name:<14} {devices:<12} {backend.probe() or 'usable'}")
    exit_code = 0
    for device in filter(None, ["cpu", accelerator]):
        print(f"\nautomatic choice for float32 logits on {device}")
        print("  " + str(explain(device=device)).replace("\n", "\n  "))
        try:
            resolve(device=device)
        except BackendUnavailable:
            exit_code = 1
    return exit_code


def _accelerator() -> str | None:
    """Return the type of torch's current accelerator, None on a machine without."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device.type if device is not None else None


if __name__ == "__main__":
    sys.exit(main())
