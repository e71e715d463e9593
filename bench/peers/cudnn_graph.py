"""cuDNN's convolution with all that follows it as one operation graph, and so one kernel.

By the package nvidia-cudnn-frontend: bias, tanh, residual and Snake are pointwise operations on the
convolution's sums, in float32.
"""

from typing import Any

import torch
from torch import Tensor

from bench.case import Unavailable

# The convolution's output and its Snake, either None where nobody needs it.
Pair = tuple[Tensor | None, Tensor | None]


class Fused:
    """`ops.conv1d` by cuDNN; keeps the graph of each weight, whose other arguments never change."""

    def __init__(self) -> None:
        self._graphs: dict[int, Graph] = {}

    def conv1d(self, x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Pair:
        """The op, on a GPU.

        Raises:
            Unavailable: the package is not installed, or cuDNN has no kernel for the graph.
        """
        key = weight.data_ptr()
        if key not in self._graphs:
            self._graphs[key] = Graph(x, weight, *rest, **options)
            self._graphs[key].build()
        return self._graphs[key](x, options.get("residual"))


class Graph:
    """The graph of `ops.conv1d` for one weight and shape; the arguments are the op's.

    Raises:
        Unavailable: the package is not installed.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        stride: int,
        padding: int,
        dilation: int,
        *,
        alpha: Tensor | None,
        keep: bool,
        residual: Tensor | None = None,
        tanh: bool = False,
    ):
        try:
            import cudnn
        except ImportError as error:
            raise Unavailable("nvidia-cudnn-frontend is not installed") from error
        self.cudnn, self.device, self.keep = cudnn, x.device, keep
        kinds = cudnn.data_type
        self.types = {torch.float16: kinds.HALF, torch.bfloat16: kinds.BFLOAT16}
        self.types[torch.float32] = kinds.FLOAT
        # Without a GPU there is no handle, and a graph can be validated, but not run.
        self.handle = cudnn.create_handle() if x.is_cuda else None
        self.graph = cudnn.pygraph(
            handle=self.handle,
            io_data_type=self.types[x.dtype],
            intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
        )
        # What no call brings anew.
        self.constants: dict[Any, Tensor] = {}
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
        self.residual = None if residual is None else self._tensor(residual.unsqueeze(2))
        if residual is not None:
            y = self.graph.add(y, self.residual)
        self.outputs = [y] if keep else []
        if alpha is not None:
            frequency = alpha.view(1, -1, 1, 1)
            sine = self.graph.sin(self.graph.mul(y, self._constant(frequency)))
            inverse = self._constant(1 / (frequency.float() + 1e-9))
            snaked = self.graph.add(y, self.graph.mul(self.graph.mul(sine, sine), inverse))
            self.outputs.append(snaked)
        for output in self.outputs:
            output.set_output(True).set_data_type(self.types[x.dtype])
        length = (x.shape[2] + 2 * padding - dilation * (weight.shape[2] - 1) - 1) // stride + 1
        self.shape = (x.shape[0], length, weight.shape[0])

    def _tensor(self, like: Tensor) -> Any:
        shape, strides = list(like.shape), list(like.stride())
        return self.graph.tensor(dim=shape, stride=strides, data_type=self.types[like.dtype])

    def _constant(self, value: Tensor) -> Any:
        tensor = self._tensor(value)
        self.constants[tensor] = value
        return tensor

    def lower(self) -> None:
        """Has cuDNN check the graph."""
        self.graph.validate()
        self.graph.build_operation_graph()

    def build(self) -> None:
        """Has cuDNN make a kernel.

        Raises:
            Unavailable: it has none.
        """
        self.lower()
        try:
            modes = self.cudnn.heur_mode
            self.graph.create_execution_plans([modes.A, modes.B])
            self.graph.check_support()
            self.graph.build_plans()
        except self.cudnn.cudnnGraphNotSupportedError as error:
            raise Unavailable(f"cuDNN has no kernel for it: {error}") from error
        size = max(self.graph.get_workspace_size(), 1)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=self.device)

    def __call__(self, x: Tensor, residual: Tensor | None) -> Pair:
        """The op's results, for an x and a residual of the shapes that the graph has."""
        if self.handle is not None:
            stream = torch.cuda.current_stream().cuda_stream
            self.cudnn.set_stream(handle=self.handle, stream=stream)
        made = [x.new_empty(self.shape).transpose(1, 2) for _ in self.outputs]
        tensors = {self.x: x.unsqueeze(2)} | self.constants
        tensors |= {node: y.unsqueeze(2) for node, y in zip(self.outputs, made, strict=True)}
        if residual is not None:
            tensors[self.residual] = residual.unsqueeze(2)
        self.graph.execute(tensors, self.workspace, handle=self.handle)
        y, *rest = made if self.keep else [None, *made]
        return y, rest[0] if rest else None
