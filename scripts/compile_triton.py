#!/usr/bin/env python3
"""Compile every variant of the Triton kernels that the back end launches, without a GPU, and check what came out.

The back end itself is run, with a launcher that writes down what it would launch: kernels, constants and alignments are
those of a real call. Asserted per variant: no spilled register, at most MAX_REGISTERS, and 16-byte loads in kernels
that read rows of logits or scores whose size and stride allow it. Run it in a process of its own, without
TRITON_INTERPRET.

usage: compile_triton.py [--arch 80 --arch 90 ...] [--dtype bfloat16 ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

import safecode_kernels as sk
from safecode_kernels.backends import triton as backend
from safecode_kernels.backends.triton_kernels.shapes import SIZES, options_of
from safecode_kernels.contract import LOGIT_DTYPES, DrawKey, RefusalMask
from safecode_kernels.params import resolve_rows

# Per thread; at most 220 were measured. scan_slices needs two programs of 256 threads per SM.
MAX_REGISTERS = 232
MAX_REGISTERS_OF = {"scan_slices": 128}
# Kernels that read no row from one end to the other, only single tokens or what others have left.
READ_NO_ROW = {"finish_rows", "merge_slices"}
COLUMNS = ("kernel", "arch", "dtype", "registers", "spills", "shared", "loads", "wide_loads", "instructions", "seconds")
WARP_SIZE = 32
VOCAB_SIZE = 32_064  # a multiple of 16, as the vocabularies of all supported models are


class Launch(NamedTuple):
    """A kernel and its arguments by name."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


def record_launches(dtype: torch.dtype) -> list[Launch]:
    """Return what the back end launches for logits of this dtype: few and many rows, with and without a cut."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], values: dict[str, Any]) -> None:
        arguments = {name: values[name] for name in kernel.arg_names}
        launches.append(Launch(kernel, arguments, options_of(kernel.__name__)))

    backend._launch = record
    words = sk.pack_mask([1], VOCAB_SIZE)
    for batch in (2, SIZES.max_split_rows + 1):
        clean = torch.zeros(batch, VOCAB_SIZE, dtype=dtype)
        ids = torch.zeros(batch, dtype=torch.int64)
        mask, key = RefusalMask(words, ids), DrawKey(ids, ids, 0)
        for beta in (0.1, 0.0):
            params = sk.StepParams(plausibility_beta=beta, refusal_bias=1.0, bias_scope=20, greedy=False)
            rows = resolve_rows(params, batch=batch, device=clean.device)
            backend.step(clean, clean, rows, mask, key)
            backend.scores(clean, clean, rows, mask)
        backend.draw(clean, key)
    return launches


class Variant(NamedTuple):
    """What distinguishes two compilations of a kernel, as triton.jit sees it."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]


def variants_of(launches: list[Launch], target: GPUTarget) -> Iterator[Variant]:
    """Yield each variant once, as the just-in-time compiler would make it."""
    seen = set()
    compiler = make_backend(target)
    for kernel, arguments, options in launches:
        bind = create_function_from_signature(kernel.signature, kernel.params, compiler)
        bound, specialization, _ = bind(**arguments, **options)
        key = (kernel.__name__, str(specialization), str(options))
        if key not in seen:
            seen.add(key)
            _, signature, constants, attributes = kernel._pack_args(
                compiler, dict(options), bound, specialization, dict(options)
            )
            yield Variant(kernel, signature, constants, attributes, options)


def usage_of(cubin: bytes) -> dict[str, int]:
    """Return registers, spilled stores, loads and 16-byte loads of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def dump(flag: str) -> str:
        done = subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        registers = re.search(r"REG:(\d+)", dump("-res-usage"))
        sass = dump("-sass")
    assert registers is not None
    return {
        "registers": int(registers[1]),
        "spills": len(re.findall(r"\bSTL", sass)),
        "loads": len(re.findall(r"\bLDG", sass)),
        "wide_loads": len(re.findall(r"\bLDG\.E[^;]*\.128", sass)),
        "instructions": sass.count(";"),
    }


def main() -> int:
    """Compile, print one line per variant; return 1 if one breaks a limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", help="compute capability, for instance 90 (default)")
    parser.add_argument("--dtype", action="append", help="dtype of the logits (default: all)")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    parser.add_argument("--only", help="kernels whose name contains this")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("compile_triton: TRITON_INTERPRET is on, and interpreted functions cannot be compiled")
    dtypes = [d for d in LOGIT_DTYPES if not arguments.dtype or str(d).removeprefix("torch.") in arguments.dtype]
    rows = []
    print(*(f"{name:>13}" for name in COLUMNS))
    for arch in arguments.arch or [90]:
        target = GPUTarget("cuda", arch, WARP_SIZE)
        launches = [launch for dtype in dtypes for launch in record_launches(dtype)]
        for variant in variants_of(launches, target):
            if arguments.only and arguments.only not in variant.kernel.__name__:
                continue
            rows.append(compile_variant(variant, target))
            print(*(f"{rows[-1][name]:>13}" for name in COLUMNS), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "variants": rows}, indent=1) + "\n")
    broken = [(row, reason) for row in rows if (reason := broken_limit(row))]
    for row, reason in broken:
        print(f"compile_triton: {row['kernel']} for sm_{row['arch']} and {row['dtype']}: {reason}", file=sys.stderr)
    return 1 if broken or not rows else 0


def broken_limit(row: dict[str, Any]) -> str | None:
    """Return what is wrong with a compiled variant, None if nothing is."""
    limit = MAX_REGISTERS_OF.get(row["kernel"], MAX_REGISTERS)
    if row["spills"]:
        return f"{row['spills']} spilled stores"
    if row["registers"] > limit:
        return f"{row['registers']} registers, allowed are {limit}"
    if not row["wide_loads"] and row["kernel"] not in READ_NO_ROW:
        return "no 16-byte load"
    if row["fused"]:
        return f"{row['fused']} products and sums in one instruction"
    return None


def compile_variant(variant: Variant, target: GPUTarget) -> dict[str, Any]:
    """Return what a variant is and what it uses."""
    start = time.perf_counter()
    source = ASTSource(variant.kernel, variant.signature, variant.constants, variant.attributes)
    compiled = triton.compile(source, target=target, options=variant.options)
    seconds = time.perf_counter() - start
    # The logits, if the kernel reads any, else what it reads most of.
    pointer = next(name for name in ("clean", "scores", "logits", "packed", "plan_left") if name in variant.signature)
    return {
        "kernel": variant.kernel.__name__,
        "arch": target.arch,
        "dtype": variant.signature[pointer].removeprefix("*"),
        **usage_of(compiled.asm["cubin"]),
        "fused": compiled.asm["ptx"].count("fma.rn.f32"),
        "shared": compiled.metadata.shared,
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
