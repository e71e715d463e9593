"""The codec's own ONNX export, run by other runtimes on the CPU, with as many threads as torch."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.case import Outputs, Run, Unavailable
from bench.peers.codecs import in_turn
from dac_fast.codec import DAC
from dac_fast.inference.export import export_onnx

# A model's path to the model, ready to be called.
Load = Callable[[Path], Callable[[NDArray[np.generic]], NDArray[np.generic]]]


def onnx_runtime(codec: DAC, direction: str, source: Tensor) -> Run:
    """ONNX Runtime, in float32."""
    try:
        import onnxruntime
    except ImportError as error:
        raise Unavailable("onnxruntime is not installed") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()

    def load(path: Path) -> Callable[[NDArray[np.generic]], NDArray[np.generic]]:
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda x: session.run(None, {name: x})[0]

    return Run(_exported(codec, direction, source, load), "float32")


def openvino(codec: DAC, direction: str, source: Tensor, precision: str = "float32") -> Run:
    """OpenVINO, in float32 or bfloat16."""
    try:
        import openvino as ov
    except ImportError as error:
        raise Unavailable("openvino is not installed") from error
    options = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }

    def load(path: Path) -> Callable[[NDArray[np.generic]], NDArray[np.generic]]:
        model = ov.Core().compile_model(path, "CPU", options)
        return lambda x: model(x)[0]

    return Run(_exported(codec, direction, source, load), precision)


def _exported(codec: DAC, direction: str, source: Tensor, load: Load) -> Callable[[], Outputs]:
    with tempfile.TemporaryDirectory() as folder:
        encoder, decoder = (load(path) for path in export_onnx(codec, folder))
    run = in_turn(
        lambda audio: torch.from_numpy(encoder(audio.numpy())),
        lambda codes: torch.from_numpy(decoder(codes.numpy())),
        direction,
    )
    return lambda: run(source)
