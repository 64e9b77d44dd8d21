"""Runs a driver of the published code on this package: `python -m safecode_mllm.compat safecode.main --help`."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from safecode_mllm.compat.decode import OnUnknown
from safecode_mllm.compat.installing import install
from safecode_mllm.errors import SafeCoDeError


def main(arguments: list[str] | None = None) -> int:
    """Swap our functions in, then run the driver with the arguments behind it; returns 2 if nothing can be swapped."""
    parser = argparse.ArgumentParser(prog="python -m safecode_mllm.compat", description=__doc__)
    parser.add_argument("--strict-published", action="store_true", help="decide as the published code does")
    parser.add_argument("--unknown-is-unsafe", action="store_true", help="do not stop at a verdict that cannot be read")
    parser.add_argument("--loader", action="store_true", help="load models as this package does: also without a GPU")
    parser.add_argument("driver", help="module (safecode.main) or script (demo.py) of the published code")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="its own arguments")
    options = parser.parse_args(arguments)
    on_unknown: OnUnknown = "treat_as_unsafe" if options.unknown_is_unsafe else "raise"
    # As for `python FILE` and `python -m MODULE`: what lies beside the driver can be imported.
    is_script = options.driver.endswith(".py")
    sys.path.insert(0, str(Path(options.driver).resolve().parent) if is_script else str(Path.cwd()))
    try:
        install(strict_published=options.strict_published, on_unknown=on_unknown, loader=options.loader)
    except SafeCoDeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.argv = [options.driver, *options.rest]
    if is_script:
        runpy.run_path(options.driver, run_name="__main__")
    else:
        runpy.run_module(options.driver, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
