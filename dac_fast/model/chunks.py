"""Long signals through the codec in chunks, in constant memory.

`encode` and `decode` give each chunk the context that its edges can see, and drop the context's output: the result
is that of the whole signal at once (up to float rounding). `encode_unpadded` and `decode_unpadded` are the published
package's own chunk mode, in which the convolutions run without padding on overlapping windows.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from dac_fast.model.layers import Conv1d, ConvTranspose1d


def convolutions(module: nn.Module) -> list:
    """The convolutions of a module, in the order in which a signal meets them."""
    return [m for m in module.modules() if isinstance(m, (Conv1d, ConvTranspose1d))]


def reach(module: nn.Module) -> int:
    """Input positions to either side that one output position of an encoder or decoder can depend on."""
    positions = 0
    for conv in reversed(convolutions(module)):
        if isinstance(conv, Conv1d):
            span = conv.dilation * (conv.kernel_size - 1)
            positions = positions * conv.stride + max(conv.padding, span - conv.padding)
        else:
            positions = -(-(positions + max(conv.padding, conv.kernel_size - 1 - conv.padding)) // conv.stride)
    return positions


@torch.inference_mode()
def encode(codec, blocks: Iterable[Tensor], chunk_frames: int, n_quantizers: int | None = None) -> Iterator[Tensor]:
    """Codes of a signal, equal to those of the whole signal encoded at once.

    Args:
        codec: the `DAC`.
        blocks: the signal, piece by piece, each [C, n] for any n; channels are independent.
        chunk_frames: frames that come out per chunk.
        n_quantizers: use the first that many codebooks; None: all.
    Yields:
        codes [C, N, chunk_frames], the last one shorter.
    """
    hop = codec.hop_length
    context = -(-reach(codec.encoder) // hop)
    buffer, first, done = None, 0, 0  # the samples held, the frame that they begin with, the frames already out
    for block in chain(blocks, [None]):
        ended = block is None
        if not ended:
            buffer = block if buffer is None else torch.cat([buffer, block], dim=1)
        if buffer is None:
            return
        available = first + (-(-buffer.shape[1] // hop) if ended else buffer.shape[1] // hop)
        while done < available if ended else done + chunk_frames + context <= available:
            until = min(done + chunk_frames, available)
            window = buffer[:, : (min(until + context, available) - first) * hop]
            yield codec.encode(window[:, None], n_quantizers=n_quantizers).codes[..., done - first : until - first]
            done = until
            keep = max(done - context, 0)
            buffer, first = buffer[:, (keep - first) * hop :], keep


@torch.inference_mode()
def decode(codec, codes: Tensor, chunk_frames: int) -> Iterator[Tensor]:
    """Audio of codes [C, N, F], equal to that of all frames decoded at once.

    Yields:
        [C, chunk_frames * hop_length], the last one shorter.
    """
    hop, frames = codec.hop_length, codes.shape[-1]
    context = reach(codec.decoder)
    for begin in range(0, frames, chunk_frames):
        end = min(begin + chunk_frames, frames)
        first, last = max(begin - context, 0), min(end + context, frames)
        audio = codec.decode_codes(codes[..., first:last])[:, 0]
        yield audio[:, (begin - first) * hop : (end - first) * hop]


def survives_unpadded(module: nn.Module, length: int) -> bool:
    """Whether every convolution of an encoder or decoder gives something out where none is padded."""
    for conv in convolutions(module):
        length = conv.output_length(length, padded=False)
        if length <= 0:
            return False
    return True


def output_samples(codec, samples: int) -> int:
    """Samples that a window of that many gives back where no convolution is padded."""
    return codec.decoder.output_length(codec.encoder.output_length(samples, padded=False), padded=False)


def delay(codec) -> int:
    """Samples by which the unpadded codec's output lags its input, as the published package counts them."""
    shortest = length = output_samples(codec, 0)
    for conv in reversed(convolutions(codec.encoder) + convolutions(codec.decoder)):
        if isinstance(conv, Conv1d):
            length = (length - 1) * conv.stride + conv.dilation * (conv.kernel_size - 1) + 1
        else:
            length = -(-(length - conv.kernel_size) // conv.stride) + 1
    return (length - shortest) // 2


@torch.inference_mode()
def encode_unpadded(codec, blocks: Iterable[Tensor], window: int, n_quantizers: int | None = None) -> Iterator[Tensor]:
    """Codes of a signal in the published package's chunk mode.

    Args:
        codec: the `DAC`.
        blocks: the signal, piece by piece, each [C, n].
        window: samples per window, a multiple of hop_length and long enough for a frame to come out.
        n_quantizers: use the first that many codebooks; None: all.
    Yields:
        codes [C, N, f], the same f for every window.
    Raises:
        ValueError: the window is too short.
    """
    step, lead = output_samples(codec, window), delay(codec)

    def long_enough(samples):
        frames = codec.encoder.output_length(samples, padded=False)
        return survives_unpadded(codec.encoder, samples) and survives_unpadded(codec.decoder, frames)

    if not long_enough(window):
        shortest = next(n for n in range(window, 1 << 30, codec.hop_length) if long_enough(n))
        raise ValueError(
            f"chunks of {window / codec.sample_rate:g} s; accepted without padding: "
            f"at least {shortest / codec.sample_rate:g} s"
        )
    buffer, begin, total = None, 0, 0  # the samples held, where they begin in the signal, its samples so far
    for block in chain(blocks, [None]):
        if block is not None:
            total += block.shape[1]
            buffer = torch.cat([block.new_zeros(block.shape[0], lead) if buffer is None else buffer, block], dim=1)
        elif buffer is not None:
            # a window starts at every `step` before the end of the signal; the last ones reach beyond it
            buffer = nn.functional.pad(buffer, (0, lead + window))
        while buffer is not None and buffer.shape[1] >= window and begin < total:
            z = codec.run_encoder(buffer[:, None, :window], padded=False)
            yield codec.quantizer(z, n_quantizers)[1]
            buffer, begin = buffer[:, step:], begin + step


@torch.inference_mode()
def decode_unpadded(codec, codes: Tensor, chunk_frames: int) -> Iterator[Tensor]:
    """Audio of codes [C, N, F] that were made in the published package's chunk mode, `chunk_frames` at a time."""
    for part in codes.split(chunk_frames, dim=-1):
        yield codec.run_decoder(codec.quantizer.decode(part), padded=False)[:, 0]
