"""Long signals through the codec in chunks, in constant memory.

`encode` and `decode` give each chunk the context that its edges can see, and drop the context's output: the result
is that of the whole signal at once (up to float rounding). The published package's own chunk mode is different: there
the convolutions run without padding on overlapping windows.

What is computed at once is a `Window`. Windows depend on nothing but their own signal, so any of them, of whatever
signals, can share a batch (`encode_batch`, `decode_batch`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dac_fast.model.layers import Conv1d, ConvTranspose1d
from dac_fast.ops.upload import upload


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
            positions = -(
                -(positions + max(conv.padding, conv.kernel_size - 1 - conv.padding)) // conv.stride
            )
    return positions


class Window(NamedTuple):
    """What is encoded or decoded at once.

    Attributes:
        codec: the `DAC` that it is for.
        signal: samples [C, n], or codes [C, N, f]; channels are independent.
        begin, end: the frames of it whose output is wanted; the others are context.
        padded: whether convolutions are padded; False: the published package's chunk mode, all output is wanted.
    """

    codec: nn.Module
    signal: Tensor
    begin: int = 0
    end: int = 0
    padded: bool = True

    @property
    def seconds(self) -> float:
        """Its length."""
        hop = self.codec.hop_length if self.signal.dim() == 3 else 1
        return self.signal.shape[-1] * hop / self.codec.sample_rate


def encode(
    codec, blocks: Iterable[Tensor], chunk_frames: int, n_quantizers: int | None = None
) -> Iterator[Tensor]:
    """Codes [C, N, chunk_frames] of a signal, the last ones fewer, equal to those of the whole signal encoded at once.

    Args:
        codec, blocks, chunk_frames: as for `sample_windows`.
        n_quantizers: use the first that many codebooks; None: all.
    """
    return (
        encode_batch([window], n_quantizers)()[0]
        for window in sample_windows(codec, blocks, chunk_frames)
    )


def decode(codec, codes: Tensor, chunk_frames: int) -> Iterator[Tensor]:
    """Audio [C, chunk_frames hop_length] of codes [C, N, F], the last one shorter, equal to that of all at once."""
    return (decode_batch([window])()[0] for window in code_windows(codec, codes, chunk_frames))


def sample_windows(codec, blocks: Iterable[Tensor], chunk_frames: int) -> Iterator[Window]:
    """A signal in windows to encode.

    Args:
        codec: the `DAC`.
        blocks: the signal, piece by piece, each [C, n] for any n.
        chunk_frames: frames that come out per window.
    """
    hop = codec.hop_length
    context = -(-reach(codec.encoder) // hop)
    buffer, first, done = (
        None,
        0,
        0,
    )  # the samples held, the frame that they begin with, the frames already out
    for block in chain(blocks, [None]):
        ended = block is None
        if not ended:
            buffer = block if buffer is None else torch.cat([buffer, block], dim=1)
        if buffer is None:
            return
        available = first + (-(-buffer.shape[1] // hop) if ended else buffer.shape[1] // hop)
        while done < available if ended else done + chunk_frames + context <= available:
            until = min(done + chunk_frames, available)
            signal = buffer[:, : (min(until + context, available) - first) * hop]
            yield Window(codec, signal, done - first, until - first)
            done = until
            keep = max(done - context, 0)
            buffer, first = buffer[:, (keep - first) * hop :], keep


def code_windows(codec, codes: Tensor, chunk_frames: int) -> Iterator[Window]:
    """Codes [C, N, F] in windows to decode, `chunk_frames` frames each."""
    frames, context = codes.shape[-1], reach(codec.decoder)
    for begin in range(0, frames, chunk_frames):
        end = min(begin + chunk_frames, frames)
        first, last = max(begin - context, 0), min(end + context, frames)
        yield Window(codec, codes[..., first:last], begin - first, end - first)


@torch.inference_mode()
def encode_batch(
    windows: Sequence[Window], n_quantizers: int | None = None
) -> Callable[[], list[Tensor]]:
    """Begin to encode windows of one codec; of any lengths, where they are padded.

    Returns:
        a function that waits for the codes, and returns those [C, N, f] of each window, on the CPU.
    """
    codec, _, _, _, padded = windows[0]
    samples, lengths = _stacked([window.signal for window in windows], codec)
    codes = codec.encode(samples, lengths, n_quantizers, padded).codes
    return _later(codes, windows, 1)


@torch.inference_mode()
def decode_batch(windows: Sequence[Window]) -> Callable[[], list[Tensor]]:
    """Begin to decode windows of one codec and number of codebooks; of any lengths, where they are padded.

    Returns:
        a function that waits for the audio, and returns that [C, n] of each window, on the CPU.
    """
    codec, _, _, _, padded = windows[0]
    codes, lengths = _stacked([window.signal for window in windows], codec)
    audio = codec.decode_codes(codes, lengths, padded)
    return _later(audio[:, 0], windows, codec.hop_length)


def _stacked(signals: Sequence[Tensor], codec) -> tuple[Tensor, Tensor | None]:
    """Signals as one batch on the codec's device, and the length of each item, None where they are all the same."""
    parameter = next(codec.parameters())
    # samples [C, n] are items of one channel each
    signals = [signal if signal.dim() == 3 else signal[:, None] for signal in signals]
    lengths = torch.tensor([signal.shape[2] for signal in signals for _ in signal])
    longest = int(lengths.max())
    dtype = parameter.dtype if signals[0].is_floating_point() else signals[0].dtype
    batch = torch.zeros(
        len(lengths), signals[0].shape[1], longest, dtype=dtype, pin_memory=parameter.is_cuda
    )
    item = 0
    for signal in signals:
        batch[item : item + signal.shape[0], :, : signal.shape[2]] = signal
        item += signal.shape[0]
    batch = upload(batch, parameter.device)
    return batch, lengths if int(lengths.min()) < longest else None


def _later(outputs: Tensor, windows: Sequence[Window], hop: int) -> Callable[[], list[Tensor]]:
    """A function that returns the wanted part of each window, `hop` positions a frame, once the GPU is done."""
    finished = None
    if outputs.is_cuda:
        device = outputs.device
        outputs = outputs.to("cpu", non_blocking=True)
        finished = torch.cuda.current_stream(device).record_event()

    def collect():
        if finished is not None:
            finished.synchronize()
        parts = outputs.split([window.signal.shape[0] for window in windows])
        pairs = zip(parts, windows, strict=True)
        return [part[..., w.begin * hop : w.end * hop] if w.padded else part for part, w in pairs]

    return collect


def survives_unpadded(module: nn.Module, length: int) -> bool:
    """Whether every convolution of an encoder or decoder gives something out where none is padded."""
    for conv in convolutions(module):
        length = conv.output_length(length, padded=False)
        if length <= 0:
            return False
    return True


def output_samples(codec, samples: int) -> int:
    """Samples that a window of that many gives back where no convolution is padded."""
    return codec.decoder.output_length(
        codec.encoder.output_length(samples, padded=False), padded=False
    )


def delay(codec) -> int:
    """Samples by which the unpadded codec's output lags its input, as the published package counts them."""
    shortest = length = output_samples(codec, 0)
    for conv in reversed(convolutions(codec.encoder) + convolutions(codec.decoder)):
        if isinstance(conv, Conv1d):
            length = (length - 1) * conv.stride + conv.dilation * (conv.kernel_size - 1) + 1
        else:
            length = -(-(length - conv.kernel_size) // conv.stride) + 1
    return (length - shortest) // 2


def unpadded_sample_windows(codec, blocks: Iterable[Tensor], size: int) -> Iterator[Window]:
    """A signal in windows to encode, as the published package's chunk mode cuts it; each gives as many frames.

    Args:
        codec: the `DAC`.
        blocks: the signal, piece by piece, each [C, n].
        size: samples per window, a multiple of hop_length and long enough for a frame to come out.
    Raises:
        ValueError: the window is too short.
    """
    step, lead = output_samples(codec, size), delay(codec)

    def long_enough(samples):
        frames = codec.encoder.output_length(samples, padded=False)
        return survives_unpadded(codec.encoder, samples) and survives_unpadded(
            codec.decoder, frames
        )

    if not long_enough(size):
        shortest = next(n for n in range(size, 1 << 30, codec.hop_length) if long_enough(n))
        raise ValueError(
            f"chunks of {size / codec.sample_rate:g} s; accepted without padding: "
            f"at least {shortest / codec.sample_rate:g} s"
        )
    buffer, begin, total = (
        None,
        0,
        0,
    )  # the samples held, where they begin in the signal, its samples so far
    for block in chain(blocks, [None]):
        if block is not None:
            total += block.shape[1]
            buffer = torch.cat(
                [block.new_zeros(block.shape[0], lead) if buffer is None else buffer, block], dim=1
            )
        elif buffer is not None:
            # a window starts at every `step` before the end of the signal; the last ones reach beyond it
            buffer = nn.functional.pad(buffer, (0, lead + size))
        while buffer is not None and buffer.shape[1] >= size and begin < total:
            yield Window(codec, buffer[:, :size], padded=False)
            buffer, begin = buffer[:, step:], begin + step


def unpadded_code_windows(codec, codes: Tensor, chunk_frames: int) -> Iterator[Window]:
    """Codes [C, N, F] that were made in the published package's chunk mode, `chunk_frames` at a time."""
    return (Window(codec, part, padded=False) for part in codes.split(chunk_frames, dim=-1))
