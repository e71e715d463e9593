"""Recipes: all settings of a training run, from YAML files and `key=value` overrides.

A recipe file says what differs from its `base`, another recipe; without a base, from the defaults
below. Keys are the names of the dataclasses' fields; a dot goes one level down:
`optimizer.learning_rate=2e-4`.
"""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from dac_fast.config import PRESETS, UNTRAINED, Config
from dac_fast.discriminators import checked_width
from dac_fast.ops import BANDS
from dac_fast.ops.reference import minimum_length
from dac_fast.training import mistakes

FOLDER = Path(__file__).parent / "recipes"
CONFIG = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
# Samples that the STFT loss and the metrics of validation need, for their window of 2048.
STFT_SAMPLES = 1025

# Strict, so that `true` is no number and 1 is not true.
Count: TypeAlias = Annotated[StrictInt, Field(ge=0)]
Positive: TypeAlias = Annotated[StrictInt, Field(ge=1)]
Window: TypeAlias = Annotated[StrictInt, Field(ge=4, multiple_of=4)]
Weight: TypeAlias = Annotated[StrictFloat, Field(ge=0)]
Rate: TypeAlias = Annotated[StrictFloat, Field(gt=0)]
Seconds: TypeAlias = Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False)]
Share: TypeAlias = Annotated[StrictFloat, Field(ge=0, lt=1)]
Fraction: TypeAlias = Annotated[StrictFloat, Field(ge=0, le=1)]
Loudness: TypeAlias = Annotated[StrictFloat, Field(allow_inf_nan=False)]
# Folders and manifests, with domains or without.
Sources: TypeAlias = StrictStr | list[StrictStr] | dict[str, StrictStr | list[StrictStr]]


class RecipeError(ValueError):
    """A recipe that cannot be read or built; one line: the key, its value, and what is accepted."""


@dataclass(frozen=True, config=CONFIG)
class DiscriminatorConfig:
    """Arguments of `dac_fast.discriminators.Discriminator`."""

    rates: tuple[Positive, ...] = ()
    periods: tuple[Positive, ...] = (2, 3, 5, 7, 11)
    fft_sizes: tuple[Window, ...] = (2048, 1024, 512)
    bands: tuple[tuple[Fraction, Fraction], ...] = BANDS
    width: Annotated[StrictFloat, AfterValidator(checked_width)] = 1.0


@dataclass(frozen=True, config=CONFIG)
class LossConfig:
    """Weights of the generator's losses, and the scales of the mel loss.

    A loss of weight 0 is not computed. Without adversarial and feature loss there is no
    discriminator.
    """

    mel: Weight = 15.0
    adversarial: Weight = 1.0
    feature: Weight = 2.0
    codebook: Weight = 1.0
    commitment: Weight = 0.25
    waveform: Weight = 0.0
    stft: Weight = 0.0
    kl: Weight = 1e-3
    mel_bins: tuple[Positive, ...] = (5, 10, 20, 40, 80, 160, 320)
    mel_windows: tuple[Window, ...] = (32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True, config=CONFIG)
class DataConfig:
    """The audio that is trained and validated on, and how excerpts are drawn from it.

    Attributes:
        train: folder or JSONL manifest, a list of these, or a mapping of domain names to these.
        validation: the same; or a share (0 to 1) of each domain's audio, which is held out by
            source; or null: no validation.
        full_band: domains whose files are full band, where no manifest says so; null: files whose
            rate is at least the model's.
        balanced: whether each batch has equal shares of every domain and at least one full-band
            item (paper, section 4.1); otherwise every file is as likely as any other.
        seconds: length of a training excerpt.
        validation_seconds, validation_items: length and number of the validation excerpts.
        loudness: LUFS that every excerpt is brought to; null: excerpts stay as they are.
        loudness_cutoff: LUFS below which another excerpt of the file is tried, up to 8 times; null:
            any excerpt is taken.
        phase_shift: whether all phases of an excerpt are turned by one random angle.
        workers: processes that read audio, per training process; null: as many as cores, up to 8.
    """

    train: Sources | None = None
    validation: Share | Sources | None = 0.05
    full_band: tuple[str, ...] | None = None
    balanced: StrictBool = True
    seconds: Seconds = 0.38
    validation_seconds: Seconds = 5.0
    validation_items: Positive = 100
    loudness: Loudness | None = -16.0
    loudness_cutoff: Loudness | None = -40.0
    phase_shift: StrictBool = True
    workers: Count | None = None


@dataclass(frozen=True, config=CONFIG)
class OptimizerConfig:
    """AdamW, for both networks.

    After every step the learning rate is multiplied by `decay`. Clips are norms of gradients.
    """

    learning_rate: Weight = 1e-4
    betas: tuple[Share, Share] = (0.8, 0.99)
    weight_decay: Weight = 0.01
    decay: Rate = 0.999996
    clip_generator: Rate = 1e3
    clip_discriminator: Rate = 10.0


@dataclass(frozen=True, config=CONFIG)
class TrainerConfig:
    """The run.

    Attributes:
        folder: of checkpoints and logs; null: `runs/<recipe>`. A run found there is resumed.
        steps: total number of training steps.
        batch_size: items per step, over all processes.
        seed: of everything random.
        device: "cpu", "cuda", "cuda:N"; null: cuda where there is one.
        precision: "bf16" (autocast) or "fp32"; null: bf16 on cuda, and on processors that multiply
            it natively.
        init_from: codec checkpoint or preset whose weights the generator starts with.
        discriminator_warmup: steps at the beginning that train the discriminator only, for use with
            `init_from`.
        discriminator_start: steps at the beginning that train the codec alone, by the losses that
            need no discriminator.
        ema: decay of the moving average of the generator's weights, which is validated and
            exported; 0: no average.
        log_every, validate_every, sample_every, save_every: in steps.
        samples: validation items whose audio and spectrograms are shown, in the run's folder too.
        keep_last: checkpoints kept, beside those of the steps in `keep_steps`.
        gradient_checkpointing: compute the codec's blocks twice and keep less of them, for GPUs
            with little memory.
        cuda_graph: launch a whole step at once, for one GPU that waits for Python.
        max_nonfinite: steps in a row without finite gradients after which the run stops.
        tensorboard: write TensorBoard logs too, where the package is installed.
    """

    folder: str | None = None
    steps: Positive = 400_000
    batch_size: Positive = 72
    seed: Count = 0
    device: str | None = None
    precision: Literal["bf16", "fp32"] | None = None
    init_from: str | None = None
    discriminator_warmup: Count = 0
    discriminator_start: Count = 0
    ema: Share = 0.0
    log_every: Positive = 10
    validate_every: Positive = 1000
    sample_every: Positive = 10_000
    save_every: Positive = 1000
    samples: Count = 8
    keep_last: Positive = 3
    keep_steps: tuple[Positive, ...] = (10_000, 50_000, 100_000, 200_000)
    gradient_checkpointing: StrictBool = False
    cuda_graph: StrictBool = False
    max_nonfinite: Positive = 20
    tensorboard: StrictBool = True


@dataclass(frozen=True, config=CONFIG)
class Recipe:
    """A training run. In files, `model` may also be the name of a preset."""

    model: Config
    name: str = ""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        """Raises ValueError where values do not fit each other."""
        losses, data = self.losses, self.data
        if self.trainer.discriminator_warmup and self.trainer.discriminator_start:
            raise ValueError(
                f"trainer.discriminator_start is {self.trainer.discriminator_start}; "
                "accepted with trainer.discriminator_warmup: 0"
            )
        rate = self.model.sample_rate
        if len(losses.mel_bins) != len(losses.mel_windows):
            raise ValueError(
                f"losses.mel_bins is {list(losses.mel_bins)!s:.80}; "
                "accepted: one number per window of losses.mel_windows"
            )
        needed = {"data.seconds": _samples_needed(self)}
        if data.validation is not None:
            needed["data.validation_seconds"] = STFT_SAMPLES
        for key, minimum in needed.items():
            seconds = getattr(data, key.removeprefix("data."))
            if int(seconds * rate) < minimum:
                raise ValueError(
                    f"{key} is {seconds}; accepted: at least {minimum} samples at {rate} Hz"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON have them."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain | {"model": self.model.to_dict()}


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe, by the name of one that comes with the package or by its YAML file.

    Args:
        name_or_path: "44khz", "ablations/ema", ..., or a path that ends in .yaml.
        overrides: "key=value", dots in the key, the value in YAML.
    Raises:
        RecipeError: there is no such recipe, a key is unknown (the nearest valid one is named), or
            a value does not fit.
    """
    values = _read(name_or_path)
    for override in overrides:
        values = _merged(values, _parsed(override))
    values.setdefault("name", Path(name_or_path).stem)
    try:
        return TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        known = asdict(Recipe(Config()))
        raise RecipeError(mistakes.described(error.errors(), values, known)) from error


class _Loader(yaml.SafeLoader):
    """YAML whose numbers may have an exponent (PyYAML takes 1e-4 for text), without aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        # A few lines of aliases of aliases stand for billions of values.
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not accepted")
        return super().compose_node(parent, index)


# What a text that is not UTF-8, not YAML, or too deep for the parser comes to.
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)


def _number(loader: _Loader, node: yaml.ScalarNode) -> float | int:
    """A number; 1e3 is a whole one."""
    value = float(loader.construct_yaml_float(node))
    return int(value) if value.is_integer() else value


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def _read(name_or_path: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The merged values of a recipe file and its bases."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(str(name_or_path), recipe_names(), n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise RecipeError(
            f"no recipe {name_or_path!r:.200}{hint}; "
            f"accepted: a .yaml file or {', '.join(recipe_names())}"
        )
    if str(path) in seen:
        raise RecipeError(f"{path}: its bases lead back to itself")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except NOT_YAML as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: holds a {type(values).__name__}; accepted: keys and values")
    base = values.pop("base", None)
    if base is None:
        return _merged({}, values)
    beside = path.parent / f"{base}.yaml"
    return _merged(_read(str(beside if beside.is_file() else base), (*seen, str(path))), values)


def _parsed(override: str) -> dict[str, Any]:
    """The values that an override "a.b=value" stands for: {"a": {"b": value}}."""
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"override {override!r:.80}; accepted: key=value")
    try:
        value = yaml.load(text, _Loader)
    except NOT_YAML:
        value = text
    for part in reversed(key.split(".")):
        value = {part: value}
    values: dict[str, Any] = value
    return values


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` on top, mapping by mapping.

    A preset's name under `model` stands for its values, a mapping of domains for all of them.
    """
    result = dict(base)
    for key, value in changes.items():
        if key == "model" and isinstance(value, str):
            result[key] = _preset(value)
        elif isinstance(value, dict) and key not in ("train", "validation"):
            before = result.get(key)
            result[key] = _merged(before if isinstance(before, dict) else {}, value)
        else:
            result[key] = value
    return result


def _preset(name: str) -> dict[str, Any]:
    """The values of a preset, without latent_dim where that follows from encoder_dim.

    Then latent_dim still follows when encoder_dim is changed.
    """
    presets = PRESETS | UNTRAINED
    if name not in presets:
        accepted = ", ".join(presets)
        raise RecipeError(f"model is {name!r:.80}; accepted: keys of a model, or {accepted}")
    values = presets[name].to_dict()
    if presets[name] == replace(presets[name], latent_dim=None):
        del values["latent_dim"]
    return values


def _samples_needed(recipe: Recipe) -> int:
    """Samples that an excerpt needs, so that losses and discriminators can reflect its edges."""
    losses, discriminator = recipe.losses, recipe.discriminator
    needed = [1, *(window // 2 + 1 for window in losses.mel_windows)]
    if losses.stft:
        needed.append(STFT_SAMPLES)
    if losses.adversarial or losses.feature:
        samples = int(recipe.data.seconds * recipe.model.sample_rate)
        needed += [minimum_length(samples, window) for window in discriminator.fft_sizes]
        needed += [period + 1 for period in discriminator.periods]
    return max(needed)
