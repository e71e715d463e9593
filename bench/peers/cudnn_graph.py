"""cuDNN's convolution with all that follows it in one kernel, as the engine takes it."""

from typing import Any

from torch import Tensor

from bench.case import Unavailable
from dac_fast.inference.choices import Result
from dac_fast.inference.cudnn_graphs import CudnnGraph, UnsupportedError


class Fused:
    """`ops.conv1d` by cuDNN; keeps the graph of each weight, whose other arguments never change."""

    def __init__(self) -> None:
        self._graphs: dict[int, CudnnGraph] = {}

    def conv1d(self, x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Result:
        """The op, on a GPU.

        Raises:
            Unavailable: the package is not installed, or cuDNN has no kernel for the graph.
        """
        key = weight.data_ptr()
        if key not in self._graphs:
            try:
                graph = CudnnGraph(x, weight, *rest, **options)
                graph.build()
            except UnsupportedError as error:
                raise Unavailable(str(error)) from error
            self._graphs[key] = graph
        return self._graphs[key](x, options.get("residual"), options.get("lengths"))
