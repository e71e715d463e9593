"""What a reconstruction costs and how near it comes, for `dac-fast reconstruct`."""

import numpy as np
import torch

from dac_fast.metrics import mel_distance, si_sdr


def report(file, audio: np.ndarray, restored: np.ndarray, elapsed: float) -> tuple[str, ...]:
    """Bitrate in kbit/s, ratio to 16-bit PCM, speed as a multiple of real time, SI-SDR in dB, mel distance.

    Args:
        file: the `DACFile`.
        audio, restored: float32 [C, T].
        elapsed: seconds that encoding and decoding took.
    """
    x, y = torch.from_numpy(audio)[None], torch.from_numpy(restored)[None]
    distance = (
        f"{mel_distance(x, y, file.sample_rate):.3f}" if audio.shape[1] > 1024 else "too short"
    )
    return (
        f"{file.bitrate / 1000:.2f}",
        f"{16 * file.sample_rate * file.channels / file.bitrate:.0f}",
        f"{file.duration / elapsed:.1f}",
        f"{si_sdr(x, y):.2f}",
        distance,
    )
