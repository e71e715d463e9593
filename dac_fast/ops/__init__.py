"""The codec's ops by name, each run by the backend that was asked for: the only place that chooses one.

Backends: `reference` (plain PyTorch), `native` (the compiled extension, CPU and CUDA), `triton`, and `auto`: the
fastest that supports the device, dtype and gradients at hand. A named backend that cannot run raises and says why;
only `auto` falls back. Set it with `use_backend(...)` or the environment variable DAC_FAST_BACKEND.

For an op `f`, a backend's module has `f` with the reference's signature, and `f_unsupported` with the same
arguments, which returns None, or why it cannot run them.
"""

import functools
import os
from collections.abc import Callable

from dac_kernels import conv1d as triton_conv1d
from dac_kernels import native
from dac_kernels import residual_unit as triton_residual_unit
from dac_kernels import rvq as triton_rvq
from dac_kernels import snake as triton_snake
from torch import Tensor

from dac_fast.ops import reference

BANDS = reference.BANDS
BACKENDS = ("auto", "reference", "native", "triton")

# Per op, the backends that have it beside the reference, the one that `auto` prefers first.
IMPLEMENTATIONS = {
    "snake": {"triton": triton_snake, "native": native},
    "conv1d": {"triton": triton_conv1d},
    "conv_transpose1d": {"triton": triton_conv1d},
    "residual_unit": {"triton": triton_residual_unit},
    "rvq_encode": {"triton": triton_rvq},
    "rvq_decode": {"triton": triton_rvq},
    "stft_bands": {"native": native},
    "disc_preprocess": {"native": native},
}


class BackendError(RuntimeError, ValueError):
    """The backend that was asked for cannot run an op on these arguments."""


_backend = None


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin} is {name!r}; accepted: {', '.join(BACKENDS)}")
    return name


def backend() -> str:
    """The backend in force: that of `use_backend`, else of DAC_FAST_BACKEND, else `auto`."""
    return _backend or _checked(os.environ.get("DAC_FAST_BACKEND", "auto"), "DAC_FAST_BACKEND")


class use_backend:  # noqa: N801 (a function to its users)
    """Sets the backend from now on; as a context manager, until the block ends.

    Raises:
        ValueError: the name is not one of `BACKENDS`.
    """

    def __init__(self, name: str):
        global _backend
        self._before = _backend
        _backend = _checked(name, "backend")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        global _backend
        _backend = self._before


def choose(op: str, *args, **kwargs) -> tuple[str, str]:
    """Which backend runs `op` on these arguments, and why not a faster one (for `dac-fast doctor`).

    Raises:
        BackendError: the backend was named and cannot run them.
    """
    name, reasons = backend(), []
    if name == "reference":
        return name, "asked for"
    for candidate, module in IMPLEMENTATIONS[op].items():
        if name not in ("auto", candidate):
            continue
        reason = getattr(module, f"{op}_unsupported")(*args, **kwargs)
        if reason is None and name == "auto" and candidate == "triton" and not args[0].is_cuda:
            reason = "Triton is chosen for CUDA tensors only"
        if reason is None:
            return candidate, "; ".join(reasons)
        reasons.append(f"{candidate}: {reason}")
    if name != "auto":
        raise BackendError(
            f"backend {name!r} cannot run {op}: {'; '.join(reasons) or 'it has no such op'}"
        )
    return "reference", "; ".join(reasons)


def _dispatched(op: Callable) -> Callable:
    """The reference op as a function of the same signature that runs on the backend in force."""

    @functools.wraps(op)
    def run(*args, **kwargs):
        name, _ = choose(op.__name__, *args, **kwargs)
        module = reference if name == "reference" else IMPLEMENTATIONS[op.__name__][name]
        return getattr(module, op.__name__)(*args, **kwargs)

    return run


snake = _dispatched(reference.snake)
conv1d = _dispatched(reference.conv1d)
conv_transpose1d = _dispatched(reference.conv_transpose1d)
residual_unit = _dispatched(reference.residual_unit)
rvq_encode = _dispatched(reference.rvq_encode)
rvq_decode = _dispatched(reference.rvq_decode)
stft_bands = _dispatched(reference.stft_bands)
disc_preprocess = _dispatched(reference.disc_preprocess)


def on_triton(op: str, x: Tensor, *args, **kwargs) -> bool:
    """Whether the fused Triton op may run (by the backend in force) and can."""
    name, implementation = backend(), IMPLEMENTATIONS[op].get("triton")
    if implementation is None or not (name == "triton" or (name == "auto" and x.is_cuda)):
        return False
    return getattr(implementation, f"{op}_unsupported")(x, *args, **kwargs) is None
