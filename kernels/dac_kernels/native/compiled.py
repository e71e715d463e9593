"""The compiled module, dac_kernels._C, and what its faces share: refusals and calls.

The module knows addresses and strides only, no tensors, and checks nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dac_kernels.native import threads

__all__ = [
    "call",
    "channel_rows",
    "contiguous_rows",
    "differs",
    "extension",
    "require",
    "status",
    "unsupported",
]

try:
    from dac_kernels import _C as extension  # noqa: N811
except ImportError as error:
    extension, _MISSING = None, str(error)  # type: ignore[assignment]


def status() -> str:
    """One line on what was built and what of it can run here."""
    if extension is None:
        return (
            f"absent ({_MISSING}): "
            "install again with a C++ compiler on PATH and DAC_KERNELS_BUILD not 'none'"
        )
    if not extension.cuda_architectures:
        return "CPU ops; no CUDA ops: install again with nvcc on PATH and DAC_KERNELS_BUILD=cuda"
    architectures = ", ".join(f"sm_{name}" for name in extension.cuda_architectures.split(";"))
    try:
        devices = extension.cuda_devices()
    except RuntimeError as error:
        return f"CPU ops; CUDA ops for {architectures}, which cannot run here ({error})"
    return f"CPU ops; CUDA ops for {architectures}; {devices} CUDA device{'s' * (devices != 1)}"


def unsupported(x: Tensor, dtypes: Mapping[str, Sequence[torch.dtype]]) -> str | None:
    """Why no op can run on this tensor, or None. dtypes: the accepted ones, per type of device."""
    device = x.device.type
    if extension is None:
        return f"the compiled module is absent ({_MISSING})"
    if device not in dtypes:
        return f"the tensor is on {device}, not {' or '.join(dtypes)}"
    if x.dtype not in dtypes[device]:
        return f"the dtype is {x.dtype}, not {' or '.join(map(str, dtypes[device]))} ({device})"
    if x.is_cuda and not extension.cuda_architectures:
        return "the compiled module was built without nvcc"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < _oldest_capability():
        return (
            f"the GPU is older than those of the compiled module ({extension.cuda_architectures})"
        )
    return None


def _oldest_capability() -> tuple[int, int]:
    names = extension.cuda_architectures.split(";")
    return min(divmod(int(name.rstrip("af")), 10) for name in names)


def differs(name: str, tensor: Tensor, shape: Sequence[int], like: Tensor) -> str | None:
    """Why a tensor does not have that shape and the dtype and device of `like`, or None."""
    if list(tensor.shape) != list(shape):
        return f"{name} has shape {list(tensor.shape)}, not {list(shape)}"
    if (tensor.dtype, tensor.device) != (like.dtype, like.device):
        return f"{name} is {tensor.dtype} on {tensor.device}, not {like.dtype} on {like.device}"
    return None


def require(op: str, reason: str | None) -> None:
    """Refuse to run, if there is a reason."""
    if reason is not None:
        raise RuntimeError(f"native {op} cannot run: {reason}")


def contiguous_rows(x: Tensor) -> Tensor:
    """x [rows, T] with the elements of each row next to each other: a copy only where not."""
    return x if x.stride(1) == 1 else x.contiguous()


def channel_rows(x: Tensor) -> Any:
    """x [B, C, T], whose channels lie innermost, as the extension's rows: one for each position."""
    return extension.Rows(x.data_ptr(), x.stride(0), x.shape[1])


def call(op: str, tensor: Tensor, dtypes: Sequence[torch.dtype], *args: Any) -> None:
    """Call the compiled function of that op for the tensor's device and those dtypes."""
    suffix = "_".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if tensor.is_cuda:
        stream = torch.cuda.current_stream(tensor.device).cuda_stream
        getattr(extension, f"{op}_cuda_{suffix}")(*args, tensor.get_device(), stream)
    else:
        getattr(extension, f"{op}_{suffix}")(*args, threads.count())
