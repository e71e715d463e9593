"""Live signals through the codec, piece by piece."""

from dac_fast.streaming.export import DecodeStep, EncodeStep
from dac_fast.streaming.signal import StreamingDecoder, StreamingEncoder
from dac_fast.streaming.slots import DecoderStreams, EncoderStreams

__all__ = [
    "DecodeStep",
    "DecoderStreams",
    "EncodeStep",
    "EncoderStreams",
    "StreamingDecoder",
    "StreamingEncoder",
]
