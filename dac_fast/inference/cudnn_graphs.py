"""cuDNN's convolution with all that follows it in one kernel, by the package nvidia-cudnn-frontend.

Bias, tanh, mask, residual and Snake are pointwise operations on the convolution's sums, in float32.
A graph of operations is for one shape, and cuDNN takes seconds to make a kernel of it.
"""

import functools
import threading
import warnings
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from dac_fast.inference.choices import Result, Way
from dac_fast.model.channels_last import innermost
from dac_fast.ops.reference import valid_mask

# How many roundings to the arguments' dtype two ways may lie apart: each rounds a few times.
TOLERANCE = 8

# A handle has one stream at a time.
_using_handle = threading.Lock()


class UnsupportedError(RuntimeError):
    """The package is not installed, or cuDNN has no kernel for the graph."""


def _cudnn() -> Any:
    try:
        import cudnn
    except ImportError as error:
        raise UnsupportedError("nvidia-cudnn-frontend is not installed") from error
    return cudnn


def takes(x: Tensor) -> bool:
    """Whether there may be graphs for such an input: in float32 cuDNN's would round to TF32."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


@functools.cache
def _handle(device: torch.device) -> Any:
    with torch.cuda.device(device):
        return _cudnn().create_handle()


class CudnnGraph:
    """`ops.conv1d` by cuDNN, for one weight and the shapes at hand.

    The arguments are the op's; x, weight and residual with channels innermost in memory.

    Raises:
        UnsupportedError: the package is not installed.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        *,
        alpha: Tensor | None = None,
        residual: Tensor | None = None,
        lengths: Tensor | None = None,
        keep: bool = True,
        tanh: bool = False,
    ):
        self.cudnn, self.dtype, self.keep = _cudnn(), x.dtype, keep
        self.result_dtype = torch.float32 if tanh else x.dtype
        kinds = self.cudnn.data_type
        self.types = {torch.float16: kinds.HALF, torch.bfloat16: kinds.BFLOAT16}
        self.types[torch.float32] = kinds.FLOAT
        # Without a GPU there is no handle, and a graph can be validated, but not run.
        self.handle = _handle(x.device) if x.is_cuda else None
        self.graph = self.cudnn.pygraph(
            handle=self.handle,
            io_data_type=self.types[x.dtype],
            intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
        )
        # What no call brings anew.
        self.constants: dict[Any, Tensor] = {}
        length = (x.shape[2] + 2 * padding - dilation * (weight.shape[2] - 1) - 1) // stride + 1
        self.shape = (x.shape[0], length, weight.shape[0])

        self.x = self._tensor(x.unsqueeze(2))
        sums = self.graph.conv_fprop(
            image=self.x,
            weight=self._constant(weight.unsqueeze(2)),
            pre_padding=[0, padding],
            post_padding=[0, padding],
            stride=[1, stride],
            dilation=[1, dilation],
        )
        y = self.graph.bias(input=sums, bias=self._constant(bias.view(1, -1, 1, 1)))
        if tanh:
            y = self.graph.tanh(y)
        self.mask = None if lengths is None else self._tensor(self._mask(lengths))
        if self.mask is not None:
            y = self.graph.mul(y, self.mask)
        self.residual = None if residual is None else self._tensor(residual.unsqueeze(2))
        if self.residual is not None:
            y = self.graph.add(y, self.residual)
        self.outputs = [y] if keep else []
        if alpha is not None:
            frequency = alpha.view(1, -1, 1, 1)
            sine = self.graph.sin(self.graph.mul(y, self._constant(frequency)))
            inverse = self._constant(1 / (frequency.float() + 1e-9))
            snaked = self.graph.add(y, self.graph.mul(self.graph.mul(sine, sine), inverse))
            self.outputs.append(snaked)
        for output in self.outputs:
            output.set_output(True).set_data_type(self.types[self.result_dtype])
            positions, channels = self.shape[1:]
            output.set_dim([x.shape[0], channels, 1, positions])
            output.set_stride([channels * positions, 1, channels * positions, channels])

    def _tensor(self, like: Tensor) -> Any:
        shape, strides = list(like.shape), list(like.stride())
        if shape[1] == 1:
            # PyTorch leaves any stride here, from which cuDNN guesses the layout.
            strides[1] = 1
        return self.graph.tensor(dim=shape, stride=strides, data_type=self.types[like.dtype])

    def _constant(self, value: Tensor) -> Any:
        tensor = self._tensor(value)
        self.constants[tensor] = value
        return tensor

    def _mask(self, lengths: Tensor) -> Tensor:
        """1 up to each item's length and 0 past it: [B, 1, 1, T'], in memory like an image."""
        items, positions, _ = self.shape
        valid = valid_mask(lengths, positions).view(items, positions, 1)
        return valid.to(self.dtype).transpose(1, 2).unsqueeze(2)

    def build(self) -> None:
        """Has cuDNN make a kernel.

        Raises:
            UnsupportedError: it has none.
        """
        modes = self.cudnn.heur_mode
        try:
            self.graph.validate()
            self.graph.build_operation_graph()
            self.graph.create_execution_plans([modes.A, modes.B])
            self.graph.check_support()
            self.graph.build_plans()
        except self.cudnn.cudnnGraphNotSupportedError as error:
            raise UnsupportedError(f"cuDNN has no kernel for it: {error}") from error

    def __call__(self, x: Tensor, residual: Tensor | None, lengths: Tensor | None) -> Result:
        """The op's results, of arguments like those that the graph was made for."""
        empty = [x.new_empty(self.shape, dtype=self.result_dtype) for _ in self.outputs]
        made = [y.transpose(1, 2) for y in empty]
        tensors = {self.x: x.unsqueeze(2)} | self.constants
        tensors |= {node: y.unsqueeze(2) for node, y in zip(self.outputs, made, strict=True)}
        if residual is not None:
            tensors[self.residual] = residual.unsqueeze(2)
        if lengths is not None:
            tensors[self.mask] = self._mask(lengths)
        size = max(self.graph.get_workspace_size(), 1)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        with _using_handle, torch.cuda.device_of(x):
            if self.handle is not None:
                stream = torch.cuda.current_stream().cuda_stream
                self.cudnn.set_stream(handle=self.handle, stream=stream)
            self.graph.execute(tensors, workspace, handle=self.handle)
        y, *rest = made if self.keep else [None, *made]
        return y, rest[0] if rest else None


class CudnnGraphs:
    """The graphs of one layer, which differ in the shapes of their inputs alone."""

    def __init__(self) -> None:
        # None where there is no graph.
        self._graphs: dict[Hashable, CudnnGraph | None] = {}
        self._weight: Tensor | None = None

    def way(self, arguments: list[Any], options: dict[str, Any], other: Way | None) -> Way | None:
        """The layer by a graph, or None where there is none.

        Args:
            arguments, options: of `ops.conv1d`.
            other: the same layer in another way, to make and check a graph of a new shape; None:
                none is made.
        """
        x, padding = arguments[0], arguments[4]
        if not takes(x):
            return None
        residual, lengths = options.get("residual"), options.get("lengths")
        layout = None if residual is None else residual.stride()
        key = x.shape, x.stride(), padding, layout, lengths is None
        if other is not None and key not in self._graphs:
            if self._weight is None:
                self._weight = innermost(arguments[1].unsqueeze(2)).squeeze(2)
            self._graphs[key] = _checked([x, self._weight, *arguments[2:]], options, other)
        if graph := self._graphs.get(key):
            return functools.partial(graph, x, residual, lengths)
        return None


def _checked(arguments: list[Any], options: dict[str, Any], other: Way) -> CudnnGraph | None:
    """A graph whose results are those of another way, or None.

    A frontend that does not fit, or a wrong result, must not end what goes on without: it is said.
    """
    try:
        graph = CudnnGraph(*arguments, **options)
        graph.build()
        found = graph(arguments[0], options.get("residual"), options.get("lengths"))
        for ours, theirs in zip(found, other(), strict=True):
            if ours is not None and theirs is not None:
                allowed = TOLERANCE * torch.finfo(arguments[0].dtype).eps * theirs.float().norm()
                if not (ours.float() - theirs.float()).norm() <= allowed:
                    raise ValueError("its result is wrong")
    except UnsupportedError:
        return None
    except Exception as error:
        shape = tuple(arguments[0].shape)
        warnings.warn(
            f"cuDNN's fused convolution of {shape} is left out: {error}", RuntimeWarning, 2
        )
        return None
    return graph
