"""Running the codec: on streams, and outside PyTorch."""

from dac_fast.inference.export import export, export_onnx
from dac_fast.inference.streaming import DecoderStreams, EncoderStreams, StreamingDecoder, StreamingEncoder

__all__ = ["DecoderStreams", "EncoderStreams", "StreamingDecoder", "StreamingEncoder", "export", "export_onnx"]
