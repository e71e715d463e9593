"""What every Triton op here shares: an optional Triton, launches, and the choice of tile sizes."""

import functools
import math
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

__all__ = [
    "DTYPES",
    "INTERPRETED",
    "Config",
    "device_unsupported",
    "jit",
    "launch",
    "milliseconds",
    "tl",
    "tuned",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Triton decides between compiler and interpreter when a kernel is defined, which the modules that
# import this one are about to do.
INTERPRETED = triton is not None and triton.knobs.runtime.interpret

# Of the GPUs that Triton compiles for: bfloat16 and asynchronous copies begin there.
LEAST_CAPABILITY = (8, 0)

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


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


# torch.compile takes the result for a constant. `torch.compiler.assume_constant_result` sets this
# mark too, but takes 0.8 s to import.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def device_unsupported(x: Tensor) -> str | None:
    """Why no Triton kernel can run where x lies, or None."""
    if triton is None:
        return "Triton is not installed"
    if x.is_cuda:
        capability = _capability(x.device)
        if capability < LEAST_CAPABILITY:
            return "the GPU has compute capability {}.{}; accepted: 8.0 or later".format(
                *capability
            )
        return None
    if INTERPRETED and x.device.type == "cpu":
        return None
    if x.device.type == "cpu":
        return "the tensor is on the CPU, which Triton serves only with TRITON_INTERPRET=1"
    return f"the tensor is on {x.device.type!r}; accepted: cuda"


def launch(kernel: Any, programs: int, first: Tensor, /, *rest: Any, **options: Any) -> None:
    """Run that many programs of a kernel on the device of its first argument."""
    if programs:
        with torch.cuda.device(first.get_device()):
            # Said aloud, because the default changes with Triton 3.10.
            kernel[(programs,)](first, *rest, enable_fp_fusion=True, **options)


# Of launches that are timed together.
TIMED_MS = 2.0


def milliseconds(run: Callable[[], object]) -> float:
    """How long the GPU takes for what `run` launches on the current device, with warm caches.

    In a CUDA graph of many calls: launched one by one, short kernels wait for the host.
    """
    stream = torch.cuda.Stream()
    # What is still under way may use the memory that `run` writes to.
    stream.wait_stream(torch.cuda.current_stream())
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def elapsed(work: Callable[[], object], times: int) -> float:
        start.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        total: float = start.elapsed_time(end)
        return total / times

    with torch.cuda.stream(stream):
        # The first call compiles.
        run()
        calls = min(max(round(TIMED_MS / max(elapsed(run, 5), 1e-3)), 1), 1000)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on allocating memory meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(calls):
                run()
        graph.replay()
        return elapsed(graph.replay, 10) / calls


_choices: dict[Hashable, Config] = {}


def tuned(
    op: str,
    x: Tensor,
    shape: Sequence[Hashable],
    configs: Sequence[Config],
    run: Callable[[Config], object],
) -> Config:
    """The fastest configuration of an op: timed the first time, remembered afterwards.

    Only for kernels whose result does not depend on the configuration, to the bit. The first one is
    the default: it is taken in the interpreter, and during the capture of a CUDA graph where none
    was chosen before (so call `warmup` first). One that the GPU has no room for is passed over.

    Args:
        op: its name.
        x: a tensor of the device and dtype that the choice is for.
        shape: what else the choice may depend on.
        configs: the configurations, the default first.
        run: launches the kernel with a configuration.
    """
    if INTERPRETED or len(configs) == 1:
        return configs[0]

    def time(config: Config) -> float:
        try:
            return milliseconds(lambda: run(config))
        except triton.OutOfResources:
            return math.inf

    key = (op, x.device, x.dtype, *shape)
    if key not in _choices:
        with torch.cuda.device(x.get_device()):
            if torch.cuda.is_current_stream_capturing():
                return configs[0]
            _choices[key] = min(configs, key=time)
    return _choices[key]
