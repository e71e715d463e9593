"""A step of a stream as a module without memory, for other runtimes: state in, state out.

    EncodeStep   audio [B, 1, f hop_length], first, length, state to codes [B, N, f], next_state
    DecodeStep   codes [B, N, f], first, length, state to audio [B, 1, f hop_length], next_state

`first` int64 [B] is the number of frames that each stream was given before, and `length` int64 [B]
the number of its frames in all; while that is not known, any number past those to come, as 2^40.
`state` float32 [B, S] is zeros at first, then the `next_state` of the step before. Any numbers of
streams and frames are taken, in each step.

The outputs lag: a stream's first `lag` ones (samples of a decoder, frames of an encoder) come
before its signal, and are zeros. After its last frame, which an encoder takes filled up with zeros,
a stream is given `delay` more frames of anything, with its length set, until all has come out. What
came out, joined, is what the whole signal gives.

Stereo and continuous codecs differ as in `dac_fast.inference.parts`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dac_fast.inference.parts import Part, Port, Varying
from dac_fast.model.interface import Codec
from dac_fast.model.layers import Chain
from dac_fast.streaming.layers import Span, StreamedChain


class Step(Part):
    """A `Part` with its layers streamed. Args: those of `Part`."""

    def __init__(self, codec: Codec, part: str, n_quantizers: int | None, precision: str):
        super().__init__(codec, part, n_quantizers, precision)
        layers: Chain = self.encoder.block if part == "encoder" else self.decoder.model
        self.chain = StreamedChain(layers, batch=1)
        self.shapes = [kept.shape[1:] for kept in self.chain.tails]
        # Whole frames, as every step takes them.
        frames = torch.export.Dim("frames")
        self.samples = Varying(3 * self.hop_length, self.hop_length * frames)

    def set_ports(self, given: Port, result: Port, lag: int, delay: int, kept: int = 0) -> None:
        """Says what goes in and comes out; kept: numbers of the state beside the layers' own."""
        size = kept + sum(math.prod(shape) for shape in self.shapes)
        streams = [Port(name, ("batch",), torch.int64) for name in ("first", "length")]
        self.inputs = (given, *streams, Port("state", ("batch", size)))
        self.outputs = (result, Port("next_state", ("batch", size)))
        self.numbers |= {"lag": lag, "delay": delay}

    def described(self) -> dict[str, int | str]:
        """What a caller must know that cannot ask the model, see `page/stream.js`."""
        (given, *_, state), (result, _) = self.inputs, self.outputs
        per_frame = {self.audio: self.hop_length, self.kept: 1}
        return {
            "given": given.name,
            "given_per_frame": per_frame[given],
            "result": result.name,
            "result_per_frame": per_frame[result],
            "state": state.shape[1],
            "lag": self.numbers["lag"],
            "delay": self.numbers["delay"],
        }

    def run(self, x: Tensor, span: Span, state: Tensor) -> tuple[Tensor, Span, Tensor]:
        """A block through the layers: the outputs, their span, and the layers' next state."""
        sizes = [math.prod(shape) for shape in self.shapes]
        pieces = state.to(self.dtype).split(sizes, dim=1)
        # The chain writes to its tails, and nothing may write to what was given.
        self.chain.set_tails(
            piece.clone().unflatten(1, shape)
            for piece, shape in zip(pieces, self.shapes, strict=True)
        )
        y, outputs = self.chain(x, span, None)
        assert outputs is not None
        return y, outputs, torch.cat([kept.flatten(1) for kept in self.chain.tails], 1).float()


class DecodeStep(Step):
    """Codes to audio. Args: those of `Part`."""

    def __init__(self, codec: Codec, n_quantizers: int | None = None, precision: str = "fp32"):
        super().__init__(codec, "decoder", n_quantizers, precision)
        lag = -self.chain.first_output(0)
        delay = -(-lag // self.hop_length)
        self.set_ports(self.kept, self.audio, lag, delay)

    def forward(  # noqa: D102
        self, codes: Tensor, first: Tensor, length: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        z = self.quantizer.decode(codes)
        audio, span, state = self.run(z, Span(first, length), state)
        return span.mask(audio), state


class EncodeStep(Step):
    """Audio to codes. Args: those of `Part`."""

    def __init__(self, codec: Codec, n_quantizers: int | None = None, precision: str = "fp32"):
        super().__init__(codec, "encoder", n_quantizers, precision)
        look_ahead = self.chain.first_input(0)
        delay = -(-look_ahead // self.hop_length)
        # The layers are given samples that much late, so that a block of them ends with the last
        # one that a frame's codes depend on; the state keeps these samples meanwhile.
        self.lead = delay * self.hop_length - look_ahead
        self.channels = codec.config.channels
        kept = self.channels * self.lead
        self.set_ports(self.audio, self.kept, delay, delay, kept)

    def forward(  # noqa: D102
        self, audio: Tensor, first: Tensor, length: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        pending, state = state.tensor_split([self.channels * self.lead], dim=1)
        samples = torch.cat([pending.unflatten(1, (self.channels, self.lead)), audio], dim=2)
        block, pending = samples.tensor_split([audio.shape[2]], dim=2)
        span = Span(first * self.hop_length - self.lead, length * self.hop_length)
        y, span, state = self.run(block, span, state)
        codes = self.quantizer.encode(y, self.n_quantizers)
        return span.mask(codes), torch.cat([pending.flatten(1), state], dim=1)


STEPS: dict[str, Callable[..., Step]] = {"encoder": EncodeStep, "decoder": DecodeStep}
