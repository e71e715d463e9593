"""dac_fast: the Descript Audio Codec, its reference and its fast kernels (arXiv 2306.06546)."""

from dac_fast.codec import DAC, load
from dac_fast.config import PRESETS, Config
from dac_fast.drop_in import accelerate, accelerate_decoder, restore
from dac_fast.ops import use_backend
from dac_fast.storage.dac2 import DACFile
from dac_fast.streaming.signal import StreamingDecoder, StreamingEncoder
from dac_fast.version import __version__

__all__ = [
    "DAC",
    "PRESETS",
    "Config",
    "DACFile",
    "StreamingDecoder",
    "StreamingEncoder",
    "__version__",
    "accelerate",
    "accelerate_decoder",
    "load",
    "restore",
    "use_backend",
]
