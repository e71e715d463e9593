"""The codec's ops by name, each run by the backend in force: the only place that chooses one.

Backends: `reference` (plain PyTorch), `native` (the compiled extension, CPU and CUDA), `triton`,
and `auto`: the fastest that supports the device, dtype and gradients at hand. A named backend that
cannot run raises and says why; only `auto` falls back. `use_backend` and the environment variable
DAC_FAST_BACKEND set it.

For an op `f`, a backend's module has `f` with the reference's signature, and `f_unsupported` with
the same arguments, which returns None, or why the backend cannot run them.
"""

import functools
import os
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

from dac_kernels import conv1d as triton_conv1d
from dac_kernels import native
from dac_kernels import residual_unit as triton_residual_unit
from dac_kernels import rvq as triton_rvq
from dac_kernels import snake as triton_snake

from dac_fast.ops import reference

P = ParamSpec("P")
R = TypeVar("R")

BANDS = reference.BANDS
BACKENDS = ("auto", "reference", "native", "triton")

# Per op, the backends that have it beside the reference, the one that `auto` prefers first.
IMPLEMENTATIONS: dict[str, dict[str, ModuleType]] = {
    "snake": {"triton": triton_snake, "native": native},
    "snake_beta": {"triton": triton_snake, "native": native},
    "conv1d": {"triton": triton_conv1d, "native": native},
    "conv_transpose1d": {"triton": triton_conv1d, "native": native},
    "residual_unit": {"triton": triton_residual_unit, "native": native},
    "rvq_encode": {"triton": triton_rvq},
    "rvq_decode": {"triton": triton_rvq},
    "stft_bands": {"native": native},
    "disc_preprocess": {"native": native},
}


class BackendError(RuntimeError, ValueError):
    """The backend that was asked for cannot run an op on these arguments."""


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin} is {name!r}; accepted: {', '.join(BACKENDS)}")
    return name


class use_backend:  # noqa: N801 (a function to its users)
    """Sets the backend: by a plain call for good, in a `with` statement until the block ends.

    A block counts in its own thread (or asyncio task) alone. A plain call counts in the thread that
    makes it, and, once nothing holds its result, in every thread that has set nothing itself.

    Args:
        name: one of `BACKENDS`.
    Raises:
        ValueError: there is no such backend.
    """

    def __init__(self, name: str):
        # Until the call turns out to be a plain one, other threads must not see it.
        self._plain = name in BACKENDS
        self._name = _checked(name, "backend")
        self._before = _here.get()
        _here.set(name)

    def __enter__(self) -> "use_backend":
        self._plain = False
        _here.set(self._name)
        return self

    def __exit__(self, *_: object) -> None:
        _here.set(self._before)

    def __del__(self) -> None:
        global _process
        # No block can begin any more.
        if self._plain:
            _process = self._name


# The backend that was set in this thread or asyncio task, and that of the others.
_here: ContextVar[str | None] = ContextVar("dac_fast.backend", default=None)
_process: str | None = None


def _set_here() -> str | None:
    return _here.get()


# torch.compile cannot trace a ContextVar, so a compiled function keeps the backend that it was
# compiled with. `torch.compiler.assume_constant_result` sets this mark too, but takes 0.8 s to
# import.
_set_here._dynamo_marked_constant = True  # type: ignore[attr-defined]


def backend() -> str:
    """The backend in force: that of `use_backend`, else of DAC_FAST_BACKEND, else `auto`."""
    if name := _set_here() or _process:
        return name
    return _checked(os.environ.get("DAC_FAST_BACKEND", "auto"), "DAC_FAST_BACKEND")


def _implementation(
    op: str, name: str, asked: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., Any] | str:
    """A backend's function for an op, or why it does not run these arguments."""
    if asked == "auto" and name == "triton" and not args[0].is_cuda:
        return "Triton is chosen for CUDA tensors only"
    module = IMPLEMENTATIONS[op][name]
    reason: str | None = getattr(module, f"{op}_unsupported")(*args, **kwargs)
    function: Callable[..., Any] = getattr(module, op)
    return reason or function


def implementations(op: str, *args: Any, **kwargs: Any) -> dict[str, Callable[..., Any] | str]:
    """What the backend in force may run an op with, but for the reference; the preferred one first.

    Each is a function of the op's signature, or the reason why it does not run these arguments.
    """
    asked = backend()
    return {
        name: _implementation(op, name, asked, args, kwargs)
        for name in IMPLEMENTATIONS[op]
        if asked in ("auto", name)
    }


def _chosen(
    op: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Callable[..., Any], str]:
    """The backend that runs the op, its function, and why not a faster one."""
    asked = backend()
    reasons: list[str] = []
    for name in IMPLEMENTATIONS[op]:
        if asked in ("auto", name):
            found = _implementation(op, name, asked, args, kwargs)
            if not isinstance(found, str):
                return name, found, "; ".join(reasons)
            reasons.append(f"{name}: {found}")
    why = "; ".join(reasons)
    if asked not in ("auto", "reference"):
        raise BackendError(f"backend {asked!r} cannot run {op}: {why or 'it has no such op'}")
    return "reference", getattr(reference, op), why or "asked for"


def choose(op: str, *args: Any, **kwargs: Any) -> tuple[str, str]:
    """Which backend runs `op` on these arguments, and why not a faster one (`dac-fast doctor`).

    Raises:
        BackendError: the backend was named and cannot run them.
    """
    name, _, reason = _chosen(op, args, kwargs)
    return name, reason


def _dispatched(op: Callable[P, R]) -> Callable[P, R]:
    """The reference op as a function of the same signature that runs on the backend in force."""

    @functools.wraps(op)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        _, function, _ = _chosen(op.__name__, args, kwargs)
        result: R = function(*args, **kwargs)
        return result

    return run


snake = _dispatched(reference.snake)
snake_beta = _dispatched(reference.snake_beta)
conv1d = _dispatched(reference.conv1d)
conv_transpose1d = _dispatched(reference.conv_transpose1d)
residual_unit = _dispatched(reference.residual_unit)
rvq_encode = _dispatched(reference.rvq_encode)
rvq_decode = _dispatched(reference.rvq_decode)
stft_bands = _dispatched(reference.stft_bands)
disc_preprocess = _dispatched(reference.disc_preprocess)
