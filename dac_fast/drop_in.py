"""The engine inside other packages' models: `accelerate`, `accelerate_decoder` and `restore`.

A model stays an instance of its class, with its methods; forward passes are replaced on that
instance alone.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dac_fast.codec import DAC
from dac_fast.config import Config
from dac_fast.inference.engine import PRECISIONS, Engine
from dac_fast.inference.network import Network
from dac_fast.inference.recorded import record
from dac_fast.storage import checkpoint, hugging_face

Model = TypeVar("Model", bound=nn.Module)

# Positions of the examples that `accelerate_decoder` makes, and tries its network on: two lengths,
# whole numbers of the windows that attention in such decoders has.
LENGTHS = (32, 64)
# The least signal-to-noise ratio, in dB, of a network in float32 against its module. Another
# structure would be far below, float rounding is far above.
LEAST_SNR = 60


def accelerate(model: Model, **options: Any) -> Model:
    """Have our engine run the encoder and decoder of another package's codec.

    Everything else is the model's own: its class, methods, quantizer and outputs. Its own layers go
    on running what the engine does not: in training mode, inputs that require a gradient, audio
    that is no whole number of frames, and calls without padding (the published package's chunk
    mode). So do they once its weights are changed or moved; then accelerate it again. In eval mode
    the parameters of encoder and decoder get gradients only where the input requires one:
    `.train()` is what trains. The engine holds a second copy of the weights; copies of the model,
    pickled ones too, have no engine.

    Args:
        model: a `dac.DAC` of the published package or a `transformers.DacModel`, or an instance of
            a subclass, in float32.
        options: of `DAC.optimize`: precision, memory. (Sizes that `shapes` lists are timed; graphs
            are not used.)
    Returns:
        the same object.
    Raises:
        ValueError: it is neither, its weights do not fit its configuration, or an option is out of
            range.
    """
    restore(model)
    _float32_parameter(model)
    config, state = _content(model)
    # Without memory it takes the model's own tensors, and draws no random numbers.
    with torch.device("meta"):
        codec = DAC(**config.to_dict())
    checkpoint.restore(codec, state, type(model).__name__)
    engine = codec.optimize(**options).engine
    assert engine is not None
    # Where a stride is odd, their decoders end a few samples before the last frame does.
    missing = config.hop_length - codec.decoder.output_length(1)
    decode = functools.partial(_decode, missing)
    encoder: Any = model.encoder
    decoder: Any = model.decoder
    encoder.forward = _Forward(model, encoder, engine, Engine.features, config.hop_length)
    decoder.forward = _Forward(model, decoder, engine, decode)
    return model


def _decode(missing: int, engine: Engine, z: Tensor) -> Tensor:
    """The engine's audio without the last few samples."""
    audio = engine.decode(z, None, padded=True)
    return audio[..., : audio.shape[-1] - missing]


def accelerate_decoder(
    module: Model,
    example: Tensor | None = None,
    *,
    precision: str = "fp32",
    shapes: Iterable[tuple[int, int]] = (),
) -> Model:
    """Have fused kernels run a module that is built as the codec's decoder or encoder is.

    The module is run once, and what it does is recorded: convolutions, plain or weight-normed;
    transposed ones with a kernel of two strides; Snake with a frequency per channel, with a factor
    of its own (SnakeBeta), as logarithms or not; sums, tanh. These run fused, whatever the classes
    are called. All else runs by PyTorch as it is: grouped convolutions, other operations on each
    position, padding and crops, and, as a whole, submodules with anything else in them (attention,
    noise). The result is compared with the module's own on random input of two lengths.

    The module's own layers run in training mode, for an input that requires a gradient, and once
    weights are changed or moved; then accelerate it again. In eval mode parameters get gradients
    only where the input requires one: `.train()` is what trains. `restore` undoes it. A second copy
    of the weights is held. Hooks of submodules that run fused are not called.
    `print(module.forward)` says what runs fused, and what by PyTorch.

    Args:
        module: of one tensor [B, C, T] in float32, which gives one; in eval mode.
        example: an input [B, C, T] to record and compare it on; None: random, of the channels that
            the first convolution has.
        precision: of the fused layers, as for `DAC.optimize`.
        shapes: (batch, positions) pairs, at which the ways to run each layer are timed.
    Returns:
        the same object.
    Raises:
        ValueError: the module does something that no record holds, with the name of it; it gives
            other results fused; or an argument is out of range.
    """
    for part in module.modules():
        restore(part)
    parameter = _float32_parameter(module)
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; accepted: {', '.join(PRECISIONS)}")
    if module.training:
        raise ValueError(f"the {type(module).__name__} is in training mode; accepted: eval mode")
    if example is None:
        short, long = (_example(module, length).to(parameter.device) for length in LENGTHS)
    else:
        short = example.detach().repeat(2, 1, 1)[:2]
        long = torch.cat([short, short.flip(0)], dim=2)
    # What a module draws here, it draws again later.
    with torch.random.fork_rng([parameter.device] if parameter.is_cuda else []):
        try:
            recording = record(module, short)
        except RuntimeError as error:
            raise ValueError(
                f"the {type(module).__name__} does not run on an input of shape "
                f"{list(short.shape)} ({str(error).splitlines()[0]:.200}); "
                "accepted: an `example` on which it does"
            ) from error
        exact = Network(recording, *PRECISIONS["fp32"])
        for x in (short, long):
            _check_equal(module, exact, x)
    network = exact if precision == "fp32" else Network(recording, *PRECISIONS[precision])
    for batch, positions in shapes:
        network.time(short.new_ones(batch, short.shape[1], positions))
    whole: Any = module
    whole.forward = _Forward(module, module, network, Network.__call__)
    return module


def restore(model: Model) -> Model:
    """Undo `accelerate` or `accelerate_decoder`; does nothing else. Returns the same object."""
    for part in (model, getattr(model, "encoder", None), getattr(model, "decoder", None)):
        if part is not None and isinstance(vars(part).get("forward"), _Forward):
            del part.forward
    return model


class _Forward:
    """A module's forward pass: another one where that fits, else the module's own.

    Args:
        model: the whole that the module is a part of, or itself.
        part: the module.
        other: what has the other forward pass; None in a copy of the module.
        run: of `other` and the input, to the output.
        multiple: of which the input's length is to be.
    """

    def __init__(
        self,
        model: nn.Module,
        part: nn.Module,
        other: Engine | Network,
        run: Callable[[Any, Tensor], Tensor],
        multiple: int = 1,
    ):
        self._model = model
        self._part = part
        self._own = part.forward
        self._other = other
        self._run = run
        self._multiple = multiple
        self._weights = self._versions()

    def __call__(self, x: Tensor, *others: Any, **named: Any) -> Any:
        fits = (
            self._other is not None
            and not (others or named)
            and not self._model.training
            # The published package's: False while it works in chunks.
            and getattr(self._model, "padding", True) is not False
            and x.dim() == 3
            and x.dtype == torch.float32
            and not (x.requires_grad and torch.is_grad_enabled())
            and x.shape[-1] % self._multiple == 0
            and self._versions() == self._weights
        )
        return self._run(self._other, x) if fits else self._own(x, *others, **named)

    def __str__(self) -> str:
        return str(self._other)

    def _versions(self) -> list[tuple[int, int]]:
        """What changes when weights are changed in place, replaced or moved."""
        tensors = (*self._part.parameters(), *self._part.buffers())
        # Those made in inference mode cannot be changed outside of it, and have no version.
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def _float32_parameter(model: nn.Module) -> nn.Parameter:
    """A parameter of the model, all of which are in single precision.

    Raises:
        ValueError: one is not, or there is none.
    """
    parameters = list(model.parameters())
    for parameter in parameters:
        if parameter.dtype != torch.float32:
            wrong = f"the model's parameters are {parameter.dtype}"
            raise ValueError(f"{wrong}; accepted: torch.float32")
    if not parameters:
        raise ValueError(f"the {type(model).__name__} has no parameters; accepted: convolutions")
    return parameters[0]


def _example(module: nn.Module, length: int) -> Tensor:
    """Random input [2, C, T] of a module, such that about `length` positions come out or go in."""
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)]
    if not convolutions:
        raise ValueError(
            f"the {type(module).__name__} has no convolution that tells its channels; "
            "accepted: with an example"
        )
    strides = [conv.stride[0] for conv in convolutions if isinstance(conv, nn.Conv1d)]
    size = (2, convolutions[0].in_channels, length * math.prod(strides))
    return torch.randn(size, generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def _check_equal(module: nn.Module, network: Network, x: Tensor) -> None:
    """Raises ValueError where a network does not give what its module gives."""
    outputs = []
    for run in (module.forward, network):
        # The same noise for both.
        torch.manual_seed(x.shape[-1])
        outputs.append(run(x))
    exact, found = outputs
    error = (found - exact).square().mean() if found.shape == exact.shape else math.inf
    if not error <= exact.square().mean() * 10 ** (-LEAST_SNR / 10):
        raise ValueError(
            f"the {type(module).__name__} gives something else for {x.shape[-1]} positions than "
            "its recorded steps; accepted: modules that do the same to signals of any length"
        )


def _content(model: nn.Module) -> tuple[Config, dict[str, Tensor]]:
    """The configuration of a model and its state dict under the published names."""
    state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    classes = {f"{c.__module__.partition('.')[0]}.{c.__name__}" for c in type(model).__mro__}
    values: dict[str, Any]
    if "transformers.DacModel" in classes:
        theirs: Any = model.config
        values = hugging_face.values_of(theirs.to_dict())
        config = Config(**values)
        return config, checkpoint.unfolded(hugging_face.published(state, config))
    if "dac.DAC" in classes:
        values = {name: getattr(model, name) for name in _PUBLISHED}
        return Config(**values), checkpoint.unfolded(state)
    raise ValueError(
        f"{type(model).__module__}.{type(model).__name__} cannot be accelerated; "
        "accepted: dac.DAC, transformers.DacModel, and classes derived from them"
    )


# Arguments of the published class that it keeps as attributes.
_PUBLISHED = (
    "encoder_dim",
    "encoder_rates",
    "latent_dim",
    "decoder_dim",
    "decoder_rates",
    "n_codebooks",
    "codebook_size",
    "codebook_dim",
    "sample_rate",
)
