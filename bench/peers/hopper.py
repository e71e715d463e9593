"""The residual unit of csrc/hopper, which no backend has: it was never run on a GPU.

It is compiled by nvcc when it is first wanted, for sm_90a alone.
"""

import ctypes
import functools
from ctypes import c_bool, c_char_p, c_int, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from bench.case import Unavailable
from bench.document import ROOT
from bench.static.csrc import NVCC, RESIDUAL_UNIT, compile_source
from dac_fast.inference.choices import Result

CHANNELS = (64, 96)


class _Unit(ctypes.Structure):
    """`Unit` of residual_unit.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "snaked", "weights", "factors", "lengths")),
        *((name, c_void_p) for name in ("y", "y_snaked")),
        *((name, c_int) for name in ("items", "size", "time", "dilation", "padding")),
    ]


class ResidualUnit:
    """`ops.residual_unit`, in float16 and bfloat16; keeps the packed weights of each layer.

    Args:
        library: made of residual_unit.cu; None: for this machine's GPU, when it is first called.
    """

    def __init__(self, library: Path | None = None) -> None:
        self._path = library
        self._constants: dict[int, tuple[Tensor, Tensor]] = {}

    @functools.cached_property
    def _library(self) -> ctypes.CDLL:
        library = ctypes.CDLL(str(self._path or compiled()))
        library.dac_residual_unit.argtypes = [c_bool, c_int, ctypes.POINTER(_Unit), c_int, c_void_p]
        library.dac_residual_unit.restype = c_char_p
        library.dac_pack_residual_unit.argtypes = [c_int, c_void_p, c_void_p, c_void_p]
        return library

    def __call__(
        self,
        x: Tensor,
        snaked: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        alpha1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        dilation: int,
        padding: int,
        *,
        alpha: Tensor | None = None,
        lengths: Tensor | None = None,
        keep: bool = True,
    ) -> Result:
        """The op, on the current stream; x and snaked with channels innermost, densely.

        Raises:
            Unavailable: this machine cannot compile or run it.
            RuntimeError: the kernel does not take such sizes, or its launch failed.
        """
        items, channels, size = x.shape
        time = size + 2 * padding - 6 * dilation
        key = weight1.data_ptr()
        if key not in self._constants:
            factors = (bias1, alpha1, bias2, alpha1 if alpha is None else alpha)
            self._constants[key] = self._packed(weight1, weight2), _stacked(*factors)
        weights, factors_of_all = self._constants[key]
        y = x.new_empty(items, time, channels) if keep else None
        y_snaked = None if alpha is None else x.new_empty(items, time, channels)
        addresses = [
            tensor if tensor is None else tensor.data_ptr()
            for tensor in (x, snaked, weights, factors_of_all, lengths, y, y_snaked)
        ]
        unit = _Unit(*addresses, items, size, time, dilation, padding)
        multiprocessors, stream = 1, None
        if x.is_cuda:
            multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
            stream = torch.cuda.current_stream().cuda_stream
        problem = self._library.dac_residual_unit(
            x.dtype == torch.bfloat16, channels, ctypes.byref(unit), multiprocessors, stream
        )
        if problem:
            raise RuntimeError(problem.decode())
        first, second = (
            None if output is None else output.transpose(1, 2) for output in (y, y_snaked)
        )
        return first, second

    def _packed(self, weight1: Tensor, weight2: Tensor) -> Tensor:
        """The weights as the kernel has them in shared memory."""
        first, second = weight1.cpu().contiguous(), weight2.cpu().contiguous()
        packed = torch.empty(first.numel() + second.numel(), dtype=first.dtype)
        addresses = (tensor.data_ptr() for tensor in (first, second, packed))
        self._library.dac_pack_residual_unit(len(first), *addresses)
        return packed.to(weight1.device)


def _stacked(bias1: Tensor, alpha1: Tensor, bias2: Tensor, alpha2: Tensor) -> Tensor:
    """`factors` of residual_unit.h, float32 [6, C]."""
    rows = []
    for bias, alpha in ((bias1, alpha1), (bias2, alpha2)):
        single = alpha.flatten().float()
        rows += [bias.float(), single, 1 / (single + 1e-9)]
    return torch.stack(rows).contiguous()


def compiled() -> Path:
    """The library for this machine's GPU.

    Raises:
        Unavailable: there is no nvcc, or another GPU.
    """
    if torch.cuda.get_device_capability() != (9, 0):
        raise Unavailable("the GPU is not of sm_90a")
    if not NVCC:
        raise Unavailable("nvcc was not found")
    library = ROOT / "build/hopper/residual_unit.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    compile_source(RESIDUAL_UNIT, 90, library, "-shared", "-Xcompiler=-fPIC")
    return library
