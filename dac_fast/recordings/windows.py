"""Long signals through the codec in windows, in constant memory.

A window is one channel of a chunk (two of them for a stereo codec), with the context that the
chunk's edges can see. The context's output is dropped, so the result is that of the whole signal at
once (up to float rounding). The published package's own chunk mode is different: there the
convolutions run without padding on overlapping windows.

A window depends on nothing but its own signal, so any windows, of whatever signals, can share a
batch (`encode_batch`, `decode_batch`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, count
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dac_fast.model.halves import Absent
from dac_fast.model.interface import Codec
from dac_fast.model.layers import Conv1d, ConvTranspose1d
from dac_fast.ops.upload import upload


class Window(NamedTuple):
    """What is encoded or decoded at once.

    Attributes:
        codec: that it is for.
        signal: samples [1, n], of a stereo codec [2, n]; or codes [1, N, f], of a continuous codec
            latents [1, D, f].
        keep: the frames or samples of its output that are wanted; the others are context.
        padded: whether convolutions are padded; False: as in the published package's chunk mode.
    """

    codec: Codec
    signal: Tensor
    keep: slice = slice(None)
    padded: bool = True

    @property
    def seconds(self) -> float:
        """Its length."""
        hop = self.codec.hop_length if self.signal.dim() == 3 else 1
        return self.signal.shape[-1] * hop / self.codec.sample_rate


def sample_windows(codec: Codec, blocks: Iterable[Tensor], chunk_frames: int) -> Iterator[Window]:
    """A signal in windows to encode: of each chunk, those of all its items, see `items_of`.

    Args:
        codec: that encodes.
        blocks: the signal, piece by piece, each [C, n] for any n; at least one.
        chunk_frames: frames that come out per window, fewer of the last chunk.
    """
    hop = codec.hop_length
    context = -(-reach(codec.encoder) // hop)
    tape = _Tape(blocks)
    for begin in count(0, chunk_frames):
        first = max(begin - context, 0)
        signal = tape.part(first * hop, (begin + chunk_frames + context) * hop)
        end = min(begin + chunk_frames, first - (-signal.shape[1] // hop))
        if end <= begin:
            return
        for item in items_of(codec, signal):
            yield Window(codec, item, slice(begin - first, end - first))


def item_count(codec: Codec, channels: int) -> int:
    """Items that so many channels are encoded as."""
    return -(-channels // codec.config.channels)


def items_of(codec: Codec, signal: Tensor) -> tuple[Tensor, ...]:
    """A signal [C, n] as items [1, n], of a stereo codec [2, n]: channels in pairs, as they come.

    The last one of an odd number is there twice; `channels_of` takes that back.
    """
    width = codec.config.channels
    if missing := -len(signal) % width:
        signal = torch.cat([signal, signal[-missing:]])
    return torch.split(signal, width)


def channels_of(items: Tensor, channels: int) -> Tensor:
    """The items of a signal, one after the other [C', n], to its channels [C, n].

    What the last channel has become, where it was there twice, is averaged.
    """
    last = items[channels - 1 :].mean(0, keepdim=True)
    return torch.cat([items[: channels - 1], last]) if len(items) > channels else items


def code_windows(codec: Codec, codes: Tensor, chunk_frames: int) -> Iterator[Window]:
    """Codes [items, N, F] in windows to decode, of `chunk_frames` frames, like `sample_windows`."""
    hop = codec.hop_length
    frames = codes.shape[-1]
    context = reach(codec.decoder)
    for begin in range(0, frames, chunk_frames):
        end = min(begin + chunk_frames, frames)
        first = max(begin - context, 0)
        keep = slice((begin - first) * hop, (end - first) * hop)
        for item in torch.split(codes[..., first : end + context], 1):
            yield Window(codec, item, keep)


class _Tape:
    """A signal that comes in blocks [C, n], and of which a part that moves on is held."""

    def __init__(self, blocks: Iterable[Tensor]):
        self._blocks = iter(blocks)
        self._held: list[Tensor] = []
        # The positions in the signal where what is held begins and ends.
        self._begin = 0
        self._end = 0

    def part(self, begin: int, end: int) -> Tensor:
        """Samples [C, end - begin], fewer at the signal's end; what lies before is dropped."""
        while self._end < end and (block := next(self._blocks, None)) is not None:
            self._held.append(block)
            self._end += block.shape[1]
        signal = torch.cat(self._held, dim=1)[:, begin - self._begin :]
        self._held, self._begin = [signal], begin
        return signal[:, : end - begin]


def convolutions(module: nn.Module) -> list[Conv1d | ConvTranspose1d]:
    """The convolutions of a module, in the order in which a signal meets them."""
    module = module.sizes if isinstance(module, Absent) else module
    return [m for m in module.modules() if isinstance(m, (Conv1d, ConvTranspose1d))]


def reach(module: nn.Module) -> int:
    """Input positions to either side that an output position of an encoder or decoder can see."""
    positions = 0
    for conv in reversed(convolutions(module)):
        if isinstance(conv, Conv1d):
            span = conv.dilation * (conv.kernel_size - 1)
            positions = positions * conv.stride + max(conv.padding, span - conv.padding)
        else:
            margin = max(conv.padding, conv.kernel_size - 1 - conv.padding)
            positions = -(-(positions + margin) // conv.stride)
    return positions


@torch.inference_mode()
def encode_batch(
    windows: Sequence[Window], n_quantizers: int | None = None
) -> Callable[[], list[Tensor]]:
    """Begins to encode windows of one codec; of any lengths, where they are padded.

    Returns:
        a function that waits for the codes and returns those [1, N, f] of each window, on the CPU;
        of a continuous codec the latents [1, D, f].
    """
    codec, padded = windows[0].codec, windows[0].padded
    samples, lengths = _stacked([window.signal for window in windows], codec)
    if codec.config.continuous:
        return _later(codec.encode_latents(samples, lengths, padded).mean, windows)
    return _later(codec.encode(samples, lengths, n_quantizers, padded).codes, windows)


@torch.inference_mode()
def decode_batch(windows: Sequence[Window]) -> Callable[[], list[Tensor]]:
    """Begins to decode windows of one codec and, where it has any, number of codebooks.

    The windows may be of any lengths, where they are padded.

    Returns:
        a function that waits for the audio and returns that of each window on the CPU: [1, n], of
        a stereo codec [2, n].
    """
    codec, padded = windows[0].codec, windows[0].padded
    kept, lengths = _stacked([window.signal for window in windows], codec)
    decode = codec.decode if codec.config.continuous else codec.decode_codes
    collect = _later(decode(kept, lengths, padded), windows)
    return lambda: [audio[0] for audio in collect()]


def _stacked(signals: Sequence[Tensor], codec: Codec) -> tuple[Tensor, Tensor | None]:
    """Signals as one batch on the codec's device, and the length of each item; None: one length."""
    parameter = next(codec.parameters())
    signals = [signal if signal.dim() == 3 else signal[None] for signal in signals]
    lengths = torch.tensor([signal.shape[2] for signal in signals])
    longest = int(lengths.max())
    dtype = parameter.dtype if signals[0].is_floating_point() else signals[0].dtype
    batch = torch.zeros(
        len(signals), signals[0].shape[1], longest, dtype=dtype, pin_memory=parameter.is_cuda
    )
    for row, signal in zip(batch, signals, strict=True):
        row[:, : signal.shape[2]] = signal[0]
    batch = upload(batch, parameter.device)
    return batch, lengths if int(lengths.min()) < longest else None


def _later(outputs: Tensor, windows: Sequence[Window]) -> Callable[[], list[Tensor]]:
    """A function that returns the wanted part of each window's output, once the GPU is done."""
    finished = None
    if outputs.is_cuda:
        device = outputs.device
        outputs = outputs.to("cpu", non_blocking=True)
        finished = torch.cuda.current_stream(device).record_event()

    def collect() -> list[Tensor]:
        if finished is not None:
            finished.synchronize()
        pairs = zip(torch.split(outputs, 1), windows, strict=True)
        return [output[..., window.keep] for output, window in pairs]

    return collect


def survives_unpadded(module: nn.Module, length: int) -> bool:
    """Whether every convolution of an encoder or decoder gives something out, none being padded."""
    for conv in convolutions(module):
        length = conv.output_length(length, padded=False)
        if length <= 0:
            return False
    return True


def output_samples(codec: Codec, samples: int) -> int:
    """Samples that a window of that many gives back where no convolution is padded."""
    frames = codec.encoder.output_length(samples, padded=False)
    return int(codec.decoder.output_length(frames, padded=False))


def delay(codec: Codec) -> int:
    """Samples by which the unpadded codec's output lags, as the published package counts them."""
    shortest = length = output_samples(codec, 0)
    for conv in reversed(convolutions(codec.encoder) + convolutions(codec.decoder)):
        if isinstance(conv, Conv1d):
            length = (length - 1) * conv.stride + conv.dilation * (conv.kernel_size - 1) + 1
        else:
            length = -(-(length - conv.kernel_size) // conv.stride) + 1
    return (length - shortest) // 2


def unpadded_sample_windows(codec: Codec, blocks: Iterable[Tensor], size: int) -> Iterator[Window]:
    """A signal in windows to encode, as the published package's chunk mode cuts it.

    Args:
        codec: that encodes.
        blocks: the signal, piece by piece, each [C, n]; at least one.
        size: samples per window, a multiple of hop_length, from which a frame must come out.
    Raises:
        ValueError: the window is too short.
    """
    _require_long_enough(codec, size)
    step, lead = output_samples(codec, size), delay(codec)
    tape = _Tape(_between_zeros(blocks, lead, lead + size))
    # A window starts at every `step` before the signal's end, and the last ones reach beyond it.
    for begin in count(0, step):
        ahead = tape.part(begin, begin + 2 * lead + size + 1)
        if ahead.shape[1] <= 2 * lead + size:
            return
        for item in items_of(codec, ahead[:, :size]):
            yield Window(codec, item, padded=False)


def _between_zeros(blocks: Iterable[Tensor], before: int, after: int) -> Iterator[Tensor]:
    """A signal in blocks [C, n], with so many zeros before and after it."""
    blocks = iter(blocks)
    first = next(blocks)
    zeros = first.new_zeros(len(first), 1)
    yield from chain([zeros.expand(-1, before), first], blocks, [zeros.expand(-1, after)])


def _require_long_enough(codec: Codec, size: int) -> None:
    def long_enough(samples: int) -> bool:
        frames = int(codec.encoder.output_length(samples, padded=False))
        encoded = survives_unpadded(codec.encoder, samples)
        return encoded and survives_unpadded(codec.decoder, frames)

    if not long_enough(size):
        shortest = next(n for n in count(size, codec.hop_length) if long_enough(n))
        raise ValueError(
            f"chunks of {size / codec.sample_rate:g} s; accepted without padding: "
            f"at least {shortest / codec.sample_rate:g} s"
        )


def unpadded_code_windows(
    codec: Codec, codes: Tensor, chunk_frames: int, most_frames: int
) -> Iterator[Window]:
    """Codes [items, N, F], made in the published package's chunk mode, in windows to decode.

    Args:
        codec: that decodes.
        codes: of all chunks.
        chunk_frames: frames of a chunk, fewer of the last one.
        most_frames: a longer chunk is decoded in windows of so many frames and their context.
    """
    hop = codec.hop_length
    before, after = _seen_unpadded(codec.decoder, hop)
    for chunk in torch.split(codes, chunk_frames, dim=-1):
        # The samples of the last frames see beyond the chunk, and are missing: the window before
        # takes these frames too, which are too few to be decoded alone.
        starts = range(0, max(chunk.shape[-1] - after, 1), most_frames)
        for begin in starts:
            end = None if begin == starts[-1] else begin + most_frames
            first = max(begin - before, 0)
            keep = slice((begin - first) * hop, end and (end - first) * hop)
            for item in torch.split(chunk[..., first : end and end + after], 1):
                yield Window(codec, item, keep, padded=False)


def _seen_unpadded(decoder: nn.Module, hop: int) -> tuple[int, int]:
    """Frames before and after frame f that the samples from f * hop to (f + 1) * hop can see."""
    first, last = 0, hop - 1
    for conv in reversed(convolutions(decoder)):
        if isinstance(conv, Conv1d):
            last += conv.dilation * (conv.kernel_size - 1)
        else:
            first = -((conv.kernel_size - 1 - first) // conv.stride)
            last = last // conv.stride
    return -first, last
