"""Recipes: everything that defines a training run, from YAML files with inheritance and `key=value` overrides.

A recipe file names a `base` recipe (or none) and what differs from it. Keys are those of the dataclasses below; a dot
goes one level down: `optimizer.learning_rate=2e-4`.
"""

import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

import yaml

from dac_fast.config import PRESETS, Config
from dac_fast.ops import BANDS

FOLDER = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be read or built; one line that names the key and says what is accepted."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Arguments of `dac_fast.discriminators.Discriminator`."""

    rates: tuple[int, ...] = ()
    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    fft_sizes: tuple[int, ...] = (2048, 1024, 512)
    bands: tuple[tuple[float, float], ...] = BANDS


@dataclass(frozen=True)
class LossConfig:
    """Weights of the generator's losses (a loss of weight 0 is not computed), and the scales of the mel loss.

    Without adversarial and feature loss there is no discriminator.
    """

    mel: float = 15.0
    adversarial: float = 1.0
    feature: float = 2.0
    codebook: float = 1.0
    commitment: float = 0.25
    waveform: float = 0.0
    stft: float = 0.0
    mel_bins: tuple[int, ...] = (5, 10, 20, 40, 80, 160, 320)
    mel_windows: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class DataConfig:
    """What is trained and validated on, and how excerpts are drawn from it.

    Attributes:
        train: folder or JSONL manifest, a list of these, or a mapping of domain names to these.
        validation: the same; or a share (0 to 1) of each domain's audio, held out by source; or null: none.
        full_band: domains whose files are full band, where no manifest says; null: files whose rate is the model's.
        balanced: equal shares of every domain in each batch and at least one full-band item (paper, section 4.1);
            otherwise every file is as likely as any other.
        seconds: length of a training excerpt.
        validation_seconds, validation_items: length and number of the validation excerpts.
        loudness: LUFS that every excerpt is brought to; null: as it is.
        loudness_cutoff: LUFS below which another excerpt of the file is tried, up to 8 times; null: take any.
        phase_shift: turn all phases of an excerpt by one random angle.
        workers: processes that read audio, per training process; null: 8, or as many as there are cores.
    """

    train: object = None
    validation: object = 0.05
    full_band: tuple[str, ...] | None = None
    balanced: bool = True
    seconds: float = 0.38
    validation_seconds: float = 5.0
    validation_items: int = 100
    loudness: float | None = -16.0
    loudness_cutoff: float | None = -40.0
    phase_shift: bool = True
    workers: int | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW of both networks. The learning rate is multiplied by `decay` after every step; clips are gradient norms."""

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.8, 0.99)
    weight_decay: float = 0.01
    decay: float = 0.999996
    clip_generator: float = 1e3
    clip_discriminator: float = 10.0


@dataclass(frozen=True)
class TrainerConfig:
    """The run.

    Attributes:
        folder: where checkpoints and logs go; null: `runs/<recipe>`. A run found there is resumed.
        steps: total number of training steps.
        batch_size: items per step, over all processes.
        seed: of everything random.
        device: "cpu", "cuda"; null: cuda where there is one.
        precision: "bf16" (autocast) or "fp32"; null: bf16 on cuda.
        init_from: codec checkpoint or preset whose weights the generator starts with.
        discriminator_warmup: steps at the beginning that train the discriminator only (useful with `init_from`).
        ema: decay of the moving average of the generator's weights, which is validated and exported; 0: none.
        log_every, validate_every, sample_every, save_every: in steps.
        samples: validation items whose audio and spectrograms go to TensorBoard.
        keep_last: checkpoints kept; those of the steps in `keep_steps` are kept besides.
        gradient_checkpointing: compute the codec's blocks twice and keep less of them: for GPUs with little memory.
        cuda_graph: launch a whole step at once (one process on one GPU): for GPUs that wait for Python.
        max_nonfinite: steps in a row without finite gradients after which the run stops.
        tensorboard: write TensorBoard logs too, where the package is installed.
    """

    folder: str | None = None
    steps: int = 400_000
    batch_size: int = 72
    seed: int = 0
    device: str | None = None
    precision: str | None = None
    init_from: str | None = None
    discriminator_warmup: int = 0
    ema: float = 0.0
    log_every: int = 10
    validate_every: int = 1000
    sample_every: int = 10_000
    save_every: int = 1000
    samples: int = 8
    keep_last: int = 3
    keep_steps: tuple[int, ...] = (10_000, 50_000, 100_000, 200_000)
    gradient_checkpointing: bool = False
    cuda_graph: bool = False
    max_nonfinite: int = 20
    tensorboard: bool = True


@dataclass(frozen=True)
class Recipe:
    """A training run. `model` is a `dac_fast.Config`, in files also the name of a preset."""

    model: Config
    name: str = ""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def to_dict(self) -> dict:
        """Plain values, as YAML and JSON have them."""
        return {**_plain(asdict(self)), "model": self.model.to_dict()}


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe, by the name of one that comes with the package or by its YAML file.

    Args:
        name_or_path: "44khz", "ablations/ema", ..., or a path that ends in .yaml.
        overrides: "key=value", dots in the key, the value in YAML.
    Raises:
        RecipeError: no such recipe, an unknown key (the nearest valid one is named), or a value that does not fit.
    """
    values = _read(name_or_path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise RecipeError(f"override {override!r}; accepted: key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        for part in reversed(key.split(".")):
            value = {part: value}
        values = _merged(values, value)
    values.setdefault("name", Path(name_or_path).stem)
    recipe = _build(Recipe, values, "")
    _check(recipe)
    return recipe


def _read(name_or_path: str, seen: tuple[str, ...] = ()) -> dict:
    """The merged values of a recipe file and its bases."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(str(name_or_path), recipe_names(), n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise RecipeError(
            f"no recipe {name_or_path!r}{hint}; accepted: a .yaml file or {', '.join(recipe_names())}"
        )
    if str(path) in seen:
        raise RecipeError(f"{path}: its bases lead back to itself")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: holds a {type(values).__name__}; accepted: keys and values")
    base = values.pop("base", None)
    if base is None:
        return _merged({}, values)
    beside = path.parent / f"{base}.yaml"
    return _merged(_read(str(beside if beside.is_file() else base), (*seen, str(path))), values)


def _merged(base: dict, changes: dict) -> dict:
    """`base` with `changes` on top, mapping by mapping. A preset's name under `model` stands for its values."""
    result = dict(base)
    for key, value in changes.items():
        if key == "model" and isinstance(value, str):
            if value not in PRESETS:
                raise RecipeError(
                    f"model is {value!r}; accepted: keys of a model, or {', '.join(PRESETS)}"
                )
            result[key] = PRESETS[value].to_dict()
            # Left to follow from encoder_dim, should that be changed.
            if (
                result[key]["latent_dim"]
                == Config(encoder_dim=PRESETS[value].encoder_dim).latent_dim
            ):
                del result[key]["latent_dim"]
        elif (
            isinstance(value, dict)
            and isinstance(result.get(key), dict)
            and key not in ("train", "validation")
        ):
            result[key] = _merged(result[key], value)
        else:
            result[key] = _merged({}, value) if isinstance(value, dict) else value
    return result


def _build(cls, values: dict, prefix: str):
    """A dataclass of the tree from plain values, every one of them checked against its annotation."""
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise RecipeError(
                f"unknown key {prefix + str(key)!r}; did you mean {_nearest(prefix + str(key))!r}?"
            )
    arguments = {key: _converted(value, hints[key], prefix + key) for key, value in values.items()}
    try:
        return cls(**arguments)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{prefix.rstrip('.') or 'recipe'}: {error}") from error


def _converted(value, hint, key: str):
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise RecipeError(
                f"{key} is {value!r}; accepted: {key}.<key> for {', '.join(f.name for f in fields(hint))}"
            )
        return _build(hint, value, f"{key}.")
    if hint is object:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return _converted(value, option, key)
            except RecipeError:
                continue
    elif hint is type(None) and value is None:
        return None
    elif origin is tuple and isinstance(value, (list, tuple)):
        if arguments[-1] is Ellipsis:
            return tuple(_converted(v, arguments[0], key) for v in value)
        if len(value) == len(arguments):
            return tuple(_converted(v, h, key) for v, h in zip(value, arguments, strict=True))
    elif hint is bool and isinstance(value, bool):
        return value
    elif hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    elif hint in (int, float) and not isinstance(value, bool):
        try:
            # YAML takes 1e-4 for text.
            number = float(value)
            if hint is float or number == int(number):
                return hint(number)
        except (TypeError, ValueError, OverflowError):
            pass
    raise RecipeError(f"{key} is {value!r}; accepted: {_described(hint)}")


def _described(hint) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_described(option) for option in arguments)
    if origin is tuple:
        return f"a list of {_described(arguments[0])}" + (
            "" if arguments[-1] is Ellipsis else f" ({len(arguments)})"
        )
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    return names[hint]


def _nearest(key: str) -> str:
    """The valid key that is most like this one, in whole or in its last part."""

    def all_keys(cls, prefix=""):
        for name, hint in typing.get_type_hints(cls).items():
            yield prefix + name
            if is_dataclass(hint):
                yield from all_keys(hint, f"{prefix}{name}.")

    def likeness(other: str) -> float:
        last, other_last = key.rpartition(".")[2], other.rpartition(".")[2]
        return (
            difflib.SequenceMatcher(None, last, other_last).ratio()
            + difflib.SequenceMatcher(None, key, other).ratio()
        )

    return max(all_keys(Recipe), key=likeness)


def _check(recipe: Recipe):
    """What types alone do not say. Raises RecipeError."""
    trainer, data = recipe.trainer, recipe.data

    def require(holds: bool, key: str, value, accepted: str):
        if not holds:
            raise RecipeError(f"{key} is {value!r}; accepted: {accepted}")

    for key in (
        "steps",
        "batch_size",
        "log_every",
        "validate_every",
        "sample_every",
        "save_every",
        "keep_last",
    ):
        require(getattr(trainer, key) > 0, f"trainer.{key}", getattr(trainer, key), "1 or more")
    require(
        trainer.precision in (None, "bf16", "fp32"),
        "trainer.precision",
        trainer.precision,
        "bf16, fp32 or null",
    )
    require(0 <= trainer.ema < 1, "trainer.ema", trainer.ema, "0 up to, not including, 1")
    require(data.seconds > 0, "data.seconds", data.seconds, "more than 0")
    require(
        data.validation_seconds > 0,
        "data.validation_seconds",
        data.validation_seconds,
        "more than 0",
    )
    require(
        len(recipe.losses.mel_bins) == len(recipe.losses.mel_windows),
        "losses.mel_bins", list(recipe.losses.mel_bins), "one number per window of losses.mel_windows",
    )  # fmt: skip


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
