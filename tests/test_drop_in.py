"""`accelerate`: other packages' models give their own results, by our engine."""

import copy
import pickle

import pytest
import torch

import dac_fast
from dac_fast import accelerate, restore

# An odd stride, after which their decoders stop early.
CONFIG = {
    "encoder_dim": 8,
    "encoder_rates": (2, 5),
    "decoder_dim": 32,
    "decoder_rates": (5, 2),
    "n_codebooks": 3,
    "codebook_size": 64,
    "sample_rate": 8000,
}


class StandIn(torch.nn.Module):
    """What `accelerate` asks of the published `dac.DAC`, where that package is not installed."""

    padding = True

    def __init__(self, **config):
        super().__init__()
        codec = dac_fast.DAC(**config)
        for name, value in {**vars(codec.config), **config}.items():
            setattr(self, name, value)
        self.encoder, self.quantizer, self.decoder = codec.encoder, codec.quantizer, codec.decoder

    def encode(self, audio):
        return self.quantizer(self.encoder(audio))

    def decode(self, z):
        return self.decoder(z)


StandIn.__module__, StandIn.__name__ = "dac.model.dac", "DAC"


class Importable(StandIn):
    """Of a class that pickle finds."""


@pytest.fixture(params=["dac", "transformers"])
def model(request, tmp_path):
    """A model of a subclass of each package's class."""
    torch.manual_seed(0)
    codec = dac_fast.DAC(**CONFIG)
    for name, parameter in codec.named_parameters():
        if name.endswith("alpha"):
            torch.nn.init.uniform_(parameter, 0.5, 2)
    if request.param == "transformers":
        package = pytest.importorskip("transformers", reason="transformers is not installed")

        class Hers(package.DacModel):
            pass

        codec.save(tmp_path / "model")
        return Hers.from_pretrained(tmp_path / "model").eval()
    try:
        from dac import DAC
    except ImportError:
        DAC = StandIn  # noqa: N806

    class His(DAC):
        pass

    his = His(**{key: list(v) if isinstance(v, tuple) else v for key, v in CONFIG.items()})
    his.load_state_dict(codec.state_dict())
    return his.eval()


def results(model, audio):
    """Codes, latent and audio by the package's own methods."""
    with torch.no_grad():
        encoded = model.encode(audio)
        if hasattr(encoded, "audio_codes"):
            decoded = model.decode(encoded.quantized_representation).audio_values
            return encoded.audio_codes, encoded.quantized_representation, decoded
        return encoded[1], encoded[0], model.decode(encoded[0])


class Calls(list):
    """Which of the model's own layers have run."""

    def watch(self, model):
        for name in ("encoder", "decoder"):
            first = next(m for m in getattr(model, name).modules() if not list(m.children()))
            first.register_forward_hook(lambda *_, name=name: self.append(name))
        return self


def test_the_model_gives_what_it_gave_by_our_engine(model):
    audio = torch.randn(2, 1, 800, generator=torch.manual_seed(1)) / 4
    expected = results(model, audio)
    own, kind, random = Calls().watch(model), type(model), torch.get_rng_state()
    assert accelerate(model) is model
    assert torch.equal(torch.get_rng_state(), random)
    assert type(model) is kind
    codes, z, restored = results(model, audio)
    assert not own
    assert torch.equal(codes, expected[0])
    for actual, before in ((z, expected[1]), (restored, expected[2])):
        assert actual.shape == before.shape
        torch.testing.assert_close(actual, before, rtol=1e-4, atol=1e-5)
    assert restore(model) is model
    codes, z, restored = results(model, audio)
    assert own == ["encoder", "decoder"]
    assert torch.equal(restored, expected[2])
    assert not any("forward" in vars(part) for part in (model.encoder, model.decoder))


def test_what_the_engine_does_not_run_the_model_runs(model):
    audio = torch.randn(1, 1, 800, generator=torch.manual_seed(1)) / 4
    uneven = audio[..., :-3]
    own = Calls()
    expected = results(model, uneven)
    # The published layers cannot be copied once a gradient went through them.
    changed = copy.deepcopy(model)
    accelerate(model)
    # A copy has no engine, and runs by itself.
    twin = copy.deepcopy(model)
    assert torch.equal(results(twin, audio)[0], results(changed, audio)[0])
    own.watch(model)
    # Not a whole number of frames.
    assert torch.equal(results(model, uneven)[0], expected[0])
    assert own == ["encoder"]
    # A gradient, and training.
    model.encoder(audio.clone().requires_grad_()).sum().backward()
    model.train().encoder(audio)
    assert own == ["encoder"] * 3
    model.eval()
    model.encoder(audio)
    assert own == ["encoder"] * 3
    # Other weights: a stale engine would give the old answer.
    with torch.no_grad():
        for one in (model, changed):
            next(one.encoder.parameters()).mul_(1.5)
        assert torch.equal(model.encoder(audio), changed.encoder(audio))
    assert own == ["encoder"] * 4


def test_a_pickled_model_runs_by_itself():
    model = accelerate(Importable(**CONFIG).eval())
    audio = torch.randn(1, 1, 800, generator=torch.manual_seed(1)) / 4
    twin = pickle.loads(pickle.dumps(model))
    own = Calls().watch(twin)
    assert torch.equal(results(twin, audio)[0], results(restore(model), audio)[0])
    assert own == ["encoder", "decoder"]


def test_without_padding_the_model_runs(model):
    """As the published package works in chunks: its setter takes the padding off its layers."""
    audio = torch.randn(1, 1, 800, generator=torch.manual_seed(1)) / 4
    model.padding = False
    expected = results(model, audio)
    model.padding = True
    accelerate(model)
    own = Calls().watch(model)
    model.padding = False
    for actual, before in zip(results(model, audio), expected, strict=True):
        assert torch.equal(actual, before)
    assert own == ["encoder", "decoder"]


def test_what_cannot_be_accelerated_is_named(model):
    with pytest.raises(ValueError, match=r"Linear cannot be accelerated; accepted: dac\.DAC"):
        accelerate(torch.nn.Linear(1, 1))
    with pytest.raises(
        ValueError, match=r"parameters are torch\.float16; accepted: torch\.float32"
    ):
        accelerate(model.half())
    with pytest.raises(ValueError, match="precision is 'fp8'"):
        accelerate(model.float(), precision="fp8")
    assert not any("forward" in vars(part) for part in (model.encoder, model.decoder))
