"""Running the codec: on streams, and outside PyTorch."""

from dac_fast.inference.export import export, export_onnx
from dac_fast.inference.streaming import StreamingDecoder, StreamingEncoder
from dac_fast.inference.streams import DecoderStreams, EncoderStreams

__all__ = ["DecoderStreams", "EncoderStreams", "StreamingDecoder", "StreamingEncoder", "export", "export_onnx"]
