"""The engine inside other packages' models: `accelerate` and `restore`.

A model stays an instance of its class, with its methods and its own quantizer; the forward passes
of its encoder and decoder are replaced, on that instance alone.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dac_fast.codec import DAC
from dac_fast.config import Config
from dac_fast.storage import checkpoint, hugging_face

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, **options: Any) -> Model:
    """Have our engine run the encoder and decoder of another package's codec.

    Everything else is the model's own: its class, methods, quantizer and outputs. Its own layers go
    on running what the engine does not: in training mode, where a gradient is wanted, audio that is
    no whole number of frames, and calls without padding (the published package's chunk mode). So do
    they once its weights are changed or moved; then accelerate it again. The engine holds a second
    copy of the weights.

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
    parameter = next(model.parameters())
    if parameter.dtype != torch.float32:
        raise ValueError(f"the model's parameters are {parameter.dtype}; accepted: torch.float32")
    config, state = _content(model)
    codec = DAC(**config.to_dict())
    checkpoint.restore(codec, state, type(model).__name__)
    codec = codec.to(parameter.device).optimize(**options)
    directions = {"encoder": codec.hop_length, "decoder": 1}
    for name, multiple in directions.items():
        part = getattr(model, name)
        part.forward = _Forward(model, part.forward, codec, name, multiple)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`; does nothing where it was not called. Returns the same object."""
    for name in ("encoder", "decoder"):
        part = getattr(model, name, None)
        if part is not None and isinstance(part.__dict__.get("forward"), _Forward):
            del part.forward
    return model


class _Forward:
    """A part's forward pass: the engine's where it fits, else the part's own.

    Args:
        model: the whole.
        own: the part's own forward pass.
        codec: with the engine.
        name: of the part.
        multiple: of which the input's length is to be.
    """

    def __init__(
        self,
        model: nn.Module,
        own: Callable[[Tensor], Tensor],
        codec: DAC,
        name: str,
        multiple: int,
    ):
        self._model, self._own = model, own
        self._codec, self._name, self._multiple = codec, name, multiple
        self._part = getattr(model, name)
        self._weights = self._versions()

    def __call__(self, x: Tensor) -> Tensor:
        engine = self._codec.engine
        fits = (
            engine is not None
            and not self._model.training
            # The published package's: False while it works in chunks.
            and getattr(self._model, "padding", True)
            and x.dtype == torch.float32
            and not (x.requires_grad and torch.is_grad_enabled())
            and x.shape[-1] % self._multiple == 0
            and self._versions() == self._weights
        )
        if not fits or engine is None:
            return self._own(x)
        if self._name == "encoder":
            return engine.features(x)
        audio = engine.decode(x, None, padded=True)
        # Where a stride is odd, theirs end a few samples before the last frame does.
        return audio[..., : self._codec.decoder.output_length(x.shape[-1])]

    def _versions(self) -> list[tuple[int, int]]:
        """What changes when weights are changed in place, replaced or moved."""
        return [(p.data_ptr(), p._version) for p in self._part.parameters()]


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
