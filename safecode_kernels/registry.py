"""Which back ends exist, which one serves a request, and why the others do not."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch

from .contract import LOGIT_DTYPES, Kernels
from .errors import ArgumentError, BackendUnavailable
from .settings import BACKEND_VARIABLE, REQUIRE_VARIABLE, read_settings

_log = logging.getLogger(__name__)

# The oldest that the Triton kernels are compiled for in the tests: bfloat16 and asynchronous copies begin with it.
LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Backend:
    """One implementation of the decode step.

    Attributes:
        name: what `backend=` calls it.
        module: import path of the module with the functions of `contract.Kernels`; imported when first used.
        devices: torch device types it runs on; None = every device of torch.
        dtypes: logit dtypes that it reads.
        priority: the automatic choice takes the highest that can serve.
        probe: returns None if it can run on this machine, else one sentence that says why not.
        refuses: returns None if it serves this device, which is of its types, else one sentence that says why not.
    """

    name: str
    module: str
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]
    priority: int
    probe: Callable[[], str | None]
    refuses: Callable[[torch.device], str | None] = lambda device: None

    def supports(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return None if it serves logits of this device and dtype here, else one sentence that says why not."""
        if self.devices is not None and device.type not in self.devices:
            return f"it runs on {', '.join(self.devices)}, not on {device.type}"
        if dtype not in self.dtypes:
            return f"it reads {', '.join(str(d) for d in self.dtypes)}, not {dtype}"
        return self.refuses(device) or self.probe()

    def load(self) -> Kernels:
        """Import and return its functions."""
        return cast(Kernels, importlib.import_module(self.module))


def _probe_native_cpu() -> str | None:
    try:
        importlib.import_module("safecode_kernels._native")
    except ImportError as error:
        return f"its compiled module is missing ({error}); install with SAFECODE_NATIVE=on to see why it is not built"
    return None


def _why_no_native_cuda(device: int) -> str | None:
    """Return why the compiled module cannot serve a GPU, or any GPU for -1."""
    try:
        native = importlib.import_module("safecode_kernels._native_cuda")
    except ImportError as error:
        return f"its compiled module is missing ({error}); install with SAFECODE_CUDA=on where nvcc is"
    return native.why_unusable(device) or None


@cache
def _why_no_triton() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}); builds of torch with CUDA bring it, else pip install triton"
    return None


def _triton_interprets() -> bool:
    """Whether Triton runs kernels on the CPU: slowly, for tests."""
    return _why_no_triton() is None and bool(importlib.import_module("triton").knobs.runtime.interpret)


def _probe_triton() -> str | None:
    if reason := _why_no_triton():
        return reason
    if _triton_interprets():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device (and Triton's interpreter, which tests switch on by TRITON_INTERPRET=1, is off)"
    return "its kernels are made for NVIDIA devices, not for ROCm's" if torch.version.hip else None


def _triton_refuses(device: torch.device) -> str | None:
    if _triton_interprets():
        return None
    if device.type == "cpu":
        return "it runs on CUDA devices (on the CPU only in Triton's interpreter, TRITON_INTERPRET=1, for tests)"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"{device} is older than compute capability {'.'.join(map(str, LEAST_CAPABILITY))}"
    return None


_BACKENDS: tuple[Backend, ...] = (
    Backend(
        name="native_cuda",
        module="safecode_kernels.backends.native_cuda",
        devices=("cuda",),
        dtypes=LOGIT_DTYPES,
        priority=30,
        probe=lambda: _why_no_native_cuda(-1),
        refuses=lambda device: _why_no_native_cuda(-1 if device.index is None else device.index),
    ),
    Backend(
        name="native_cpu",
        module="safecode_kernels.backends.native_cpu",
        devices=("cpu",),
        dtypes=LOGIT_DTYPES,
        priority=10,
        probe=_probe_native_cpu,
    ),
    Backend(
        name="triton",
        module="safecode_kernels.backends.triton",
        devices=("cuda", "cpu"),
        dtypes=LOGIT_DTYPES,
        priority=5,
        probe=_probe_triton,
        refuses=_triton_refuses,
    ),
    Backend(
        name="eager",
        module="safecode_kernels.backends.eager",
        devices=None,
        dtypes=LOGIT_DTYPES,
        priority=0,
        probe=lambda: None,
    ),
)


@dataclass(frozen=True)
class Explanation:
    """What was chosen for a request and why; `str()` is one line per back end.

    Attributes:
        chosen: name of the back end, None if none can serve.
        reasons: for each other back end why it was not chosen.
    """

    chosen: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        chosen = [f"{self.chosen}: chosen"] if self.chosen else []
        return "\n".join(chosen + [f"{name}: not chosen, {reason}" for name, reason in self.reasons.items()])


def list_backends() -> list[Backend]:
    """Return every back end of this installation, best first, usable here or not."""
    return sorted(_BACKENDS, key=lambda backend: -backend.priority)


def resolve(
    backend: str = "auto", *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Backend:
    """Return the back end that serves logits of this device and dtype; call it once per generation.

    Args:
        backend: a name, or "auto" for the best that can serve (or the one that SAFECODE_KERNELS_BACKEND names).
        device: where the logits are.
        dtype: of the logits.

    Raises:
        ArgumentError: there is no back end of that name.
        BackendUnavailable: the named one cannot serve, none can, or one that SAFECODE_REQUIRE names cannot ("auto").
    """
    chosen, refusals = _choose(backend, torch.device(device), dtype)
    if backend == "auto":
        for name, reason in refusals.items():
            if reason is not None and (name, reason) not in _logged:
                _logged.add((name, reason))
                _log.info("back end %s is passed over: %s", name, reason)
    return chosen


_logged: set[tuple[str, str]] = set()  # each reason is logged once per process; explain() tells it any time


def explain(
    backend: str = "auto", *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Explanation:
    """Return which back end `resolve` chooses for the same arguments and why it does not choose the others."""
    try:
        chosen, refusals = _choose(backend, torch.device(device), dtype)
    except BackendUnavailable as error:
        return Explanation(None, {backend: str(error)})
    return Explanation(chosen.name, {name: reason or f"{chosen.name} goes first" for name, reason in refusals.items()})


def _choose(requested: str, device: torch.device, dtype: torch.dtype) -> tuple[Backend, dict[str, str | None]]:
    """Return the back end for a request, and per other back end why it cannot serve (None if it could)."""
    settings = read_settings()
    refusals = {b.name: b.supports(device, dtype) for b in list_backends()}
    request = f"{str(dtype).removeprefix('torch.')} logits on {device}"
    named = settings.backend if requested == "auto" else requested
    if named != "auto":
        source = BACKEND_VARIABLE if requested == "auto" else "backend"
        chosen = _by_name(named, source)
        if reason := refusals.pop(named):
            raise BackendUnavailable(f"{source}={named!r} cannot serve {request}: {reason}")
        return chosen, refusals
    for name in settings.required:
        _by_name(name, REQUIRE_VARIABLE)
        if reason := refusals[name]:
            raise BackendUnavailable(f"{REQUIRE_VARIABLE} names {name!r}, which cannot serve {request}: {reason}")
    usable = [b for b in list_backends() if refusals[b.name] is None]
    if not usable:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        raise BackendUnavailable(f"no back end serves {request} ({reasons})")
    refusals.pop(usable[0].name)
    return usable[0], refusals


def _by_name(name: str, source: str) -> Backend:
    for backend in _BACKENDS:
        if backend.name == name:
            return backend
    known = ", ".join(backend.name for backend in list_backends())
    if source == REQUIRE_VARIABLE:
        raise BackendUnavailable(f"{source} names {name!r}, which this installation does not have; it has: {known}")
    raise ArgumentError(f"{source}={name!r} is no back end of this installation; legal: auto, {known}")
