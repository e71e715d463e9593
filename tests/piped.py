"""Audio as programs write it into a pipe."""

import io

import numpy as np


def flac(audio: np.ndarray, rate: int) -> bytes:
    """Audio [C, T] as FLAC whose header does not say how long it is."""
    # Where other parts are tested, soundfile may be missing.
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, audio.T, rate, format="FLAC")
    data = bytearray(file.getvalue())
    # The 36 bits of STREAMINFO that count the samples: none means that it is not known.
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    return bytes(data)
