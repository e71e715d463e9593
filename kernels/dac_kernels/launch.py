"""What every Triton op here shares: an optional Triton, launches, and the choice of tile sizes."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    # Modules of kernels stay importable, so that a caller can ask why an op cannot run.
    triton = tl = None

__all__ = ["DTYPES", "INTERPRETED", "Config", "device_unsupported", "jit", "launch", "tl", "tuned"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Triton decides between compiler and interpreter when a kernel is defined, which the modules that
# import this one are about to do.
INTERPRETED = triton is not None and triton.knobs.runtime.interpret

# Tile sizes, and compiler options such as `num_warps`, by name.
Config = dict[str, int]


def jit(
    kernel: Callable[..., Any] | None = None, *, any_value: Sequence[str] = ()
) -> Callable[..., Any]:
    """`triton.jit`; without Triton the plain function, which nobody can launch then.

    Kernels are not Python, so they are also marked `no_type_check`.

    Args:
        any_value: integer arguments that change from call to call. By default Triton compiles a
            kernel anew where an integer is 1 or a multiple of 16; for these it does not.
    """
    if kernel is None:
        return functools.partial(jit, any_value=any_value)
    return triton.jit(kernel, do_not_specialize=any_value) if triton else kernel


def device_unsupported(x: Tensor) -> str | None:
    """Why no Triton kernel can run where x lies, or None."""
    if triton is None:
        return "Triton is not installed"
    if x.is_cuda or (INTERPRETED and x.device.type == "cpu"):
        return None
    if x.device.type == "cpu":
        return "the tensor is on the CPU, which Triton serves only with TRITON_INTERPRET=1"
    return f"the tensor is on {x.device.type!r}; accepted: cuda"


def launch(kernel: Any, programs: int, first: Tensor, /, *rest: Any, **options: Any) -> None:
    """Run that many programs of a kernel on the device of its first argument."""
    if programs:
        with torch.cuda.device(first.get_device()):
            kernel[(programs,)](first, *rest, **options)


_choices: dict[Hashable, Config] = {}


def tuned(key: Hashable, configs: Sequence[Config], run: Callable[[Config], object]) -> Config:
    """The fastest configuration for a shape class: timed the first time, remembered afterwards.

    Only for kernels whose result does not depend on the configuration, to the bit. The first one is
    the default: it is taken in the interpreter, and during the capture of a CUDA graph where none
    was chosen before (so call `warmup` first).

    Args:
        key: names the op, the device, and all that the choice may depend on.
        configs: the configurations, the default first.
        run: launches the kernel with a configuration.
    """
    if INTERPRETED or len(configs) == 1:
        return configs[0]
    if key not in _choices:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        _choices[key] = min(
            configs,
            key=lambda config: triton.testing.do_bench(lambda: run(config), warmup=5, rep=20),
        )
    return _choices[key]
