"""dac_fast: the Descript Audio Codec, its reference and its fast kernels (arXiv 2306.06546)."""

from pathlib import Path

import torch

from dac_fast import download
from dac_fast.config import PRESETS, Config
from dac_fast.container import DACFile
from dac_fast.inference import StreamingDecoder, StreamingEncoder
from dac_fast.model import DAC
from dac_fast.ops import use_backend
from dac_fast.version import __version__

__all__ = [
    "DAC",
    "PRESETS",
    "Config",
    "DACFile",
    "StreamingDecoder",
    "StreamingEncoder",
    "__version__",
    "load",
    "use_backend",
]


def load(name_or_path, *, device="cpu", dtype: torch.dtype = torch.float32, engine: bool | dict | None = None) -> DAC:
    """A codec in eval mode.

    Args:
        name_or_path: a preset ("tiny" is bundled; "44khz", "44khz_16kbps", "24khz", "16khz" are downloaded when they
            are not in the cache), or a checkpoint: ours, a published .pth, or a Hugging Face folder.
        device, dtype: of the parameters.
        engine: True, or arguments of `DAC.optimize`, which is called then.
    Raises:
        ValueError: no such preset or path, the checkpoint is damaged or no codec's, or as `DAC.optimize` says.
        OSError: the weights cannot be downloaded.
    """
    path = Path(name_or_path)
    # a preset's name means the preset; ./44khz is the folder of that name
    is_path = str(name_or_path) not in PRESETS and (path.exists() or path.suffix or len(path.parts) > 1)
    name = "" if is_path else str(name_or_path)
    codec = DAC.load(download.download(name) if name else path)
    codec.name = name
    codec = codec.to(device=device, dtype=dtype)
    return codec if engine in (None, False) else codec.optimize(**({} if engine is True else engine))
