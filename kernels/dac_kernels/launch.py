"""What every Triton op here shares: an optional Triton, reasons not to run, launches, and the choice of tile sizes."""

import functools
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

try:
    import triton
    from triton import language as tl
except ImportError:
    # The modules stay importable, so that a caller can ask `*_unsupported` and take another backend.
    triton = tl = None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def jit(kernel: Callable | None = None, *, any_value: Sequence[str] = ()):
    """`triton.jit`, or the plain function where there is no Triton (nobody can launch it then).

    any_value: integer arguments of which no value is compiled for apart, as Triton does for 1 and multiples of 16.
    """
    if kernel is None:
        return functools.partial(jit, any_value=any_value)
    return triton.jit(kernel, do_not_specialize=any_value) if triton else kernel


@jit
def _probe():
    pass


# Triton decides between compiler and interpreter when a kernel is defined, so this holds for every kernel here.
INTERPRETED = triton is not None and not isinstance(_probe, triton.JITFunction)


def device_unsupported(x: Tensor) -> str | None:
    """Why no Triton kernel can run where x lies, or None."""
    if triton is None:
        return "Triton is not installed"
    if x.is_cuda or (INTERPRETED and x.device.type == "cpu"):
        return None
    if x.device.type == "cpu":
        return "the tensor is on the CPU, which Triton serves only with TRITON_INTERPRET=1"
    return f"the tensor is on {x.device.type!r}; accepted: cuda"


def launch(kernel, programs: int, *args, **options) -> None:
    """Run `programs` instances of the kernel on the device of its first argument, a tensor; none if there are none."""
    if programs:
        with torch.cuda.device_of(args[0]):
            kernel[(programs,)](*args, **options)


def clear_choices() -> None:
    """Forget every tuned configuration, so that the next calls time them again."""
    _choices.clear()


_choices: dict[Hashable, dict] = {}


def tuned(key: Hashable, configs: Sequence[dict], run: Callable[[dict], object]) -> dict:
    """The fastest of `configs` for shape class `key`: timed with `run` the first time, remembered afterwards.

    Only for kernels whose result does not depend on the configuration, to the bit. The first configuration is the
    default: it is taken in the interpreter, and during CUDA graph capture where nothing was chosen before it
    (call `warmup` first).
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
