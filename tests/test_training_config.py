"""Recipes: inheritance, overrides, and one clear line for every mistake."""

import pytest
import yaml

from dac_fast.codec import DAC
from dac_fast.config import PRESETS
from dac_fast.training import RecipeError, load_recipe, recipe_names


def test_the_recipes_are_the_published_ones():
    for name, preset in PRESETS.items():
        assert load_recipe(name).model == preset
    full = load_recipe("44khz")
    assert (full.trainer.steps, full.trainer.batch_size, full.data.seconds) == (400_000, 72, 0.38)
    assert (full.losses.mel, full.losses.feature, full.losses.adversarial) == (15, 2, 1)
    assert (full.losses.codebook, full.losses.commitment) == (1, 0.25)
    assert (full.optimizer.learning_rate, full.optimizer.betas, full.optimizer.decay) == (
        1e-4,
        (0.8, 0.99),
        0.999996,
    )


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("ablations/")])
def test_an_ablation_is_its_baseline_with_one_part_changed(name):
    baseline, recipe = (load_recipe(n).to_dict() for n in ("ablations/baseline", name))
    changed = {part for part in baseline if part != "name" and baseline[part] != recipe[part]}
    if name == "ablations/baseline":
        assert baseline["trainer"]["batch_size"] == 12
        assert baseline["model"]["quantizer_dropout"] == 1.0
    else:
        # Where discriminators or mel scales go, a weight makes up for them.
        assert changed in (
            {"model"},
            {"data"},
            {"losses"},
            {"discriminator"},
            {"discriminator", "losses"},
        )


def test_overrides_and_bases(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: tiny\nmodel:\n  encoder_dim: 8\noptimizer:\n  learning_rate: 3e-4\n")
    recipe = load_recipe(
        str(path),
        ["trainer.steps=1e3", "data.train={speech: a, music: [b, c]}", "data.loudness=null"],
    )
    assert recipe.name == "mine"
    assert recipe.model.latent_dim == 8 * 16  # follows from encoder_dim
    assert recipe.model.decoder_dim == PRESETS["tiny"].decoder_dim
    assert recipe.optimizer.learning_rate == 3e-4
    assert recipe.trainer.steps == 1000
    assert recipe.data.train == {"speech": "a", "music": ["b", "c"]}
    assert recipe.data.loudness is None
    # What a run writes down about itself gives the same run.
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.stepz=3", "unknown key 'trainer.stepz'; did you mean 'trainer.steps'?"),
        ("steps=3", "unknown key 'steps'; did you mean 'trainer.steps'?"),
        ("lossess.mel=3", "unknown key 'lossess'; did you mean 'losses'?"),
        ("model.encoderdim=4", "unknown key 'model.encoderdim'; did you mean 'model.encoder_dim'?"),
        ("model=tinny", "model is 'tinny'; accepted: keys of a model, or 44khz"),
        ("trainer.steps=many", "trainer.steps is 'many'; accepted: a whole number"),
        ("trainer.batch_size=0", "trainer.batch_size is 0; accepted: 1 or more"),
        ("optimizer.betas=[0.9]", "optimizer.betas is [0.9]; accepted: a list of a number (2)"),
        ("model.n_codebooks=0", "model: n_codebooks is 0; accepted: a positive integer"),
        (f"model.n_codebooks={10**30}", f"model: n_codebooks is {10**30}; accepted: up to 1024"),
        ("discriminator=none", "discriminator is 'none'; accepted: discriminator.<key>"),
        ("trainer.steps", "override 'trainer.steps'; accepted: key=value"),
        ("trainer.steps=true", "trainer.steps is True; accepted: a whole number"),
        ("trainer.precision=fp16", "trainer.precision is 'fp16'; accepted: 'bf16' or 'fp32'"),
        ("losses.mel=-1", "losses.mel is -1; accepted: 0 or more"),
        ("losses.mel_bins=[5]", "losses.mel_bins is [5]; accepted: one number per window"),
        ("data.train=3", "data.train is 3; accepted: text or a list or keys and values"),
        ("data.workers=-1", "data.workers is -1; accepted: 0 or more"),
        ("data.validation=1.5", "data.validation is 1.5; accepted: less than 1"),
        ("data.seconds=0.0001", "data.seconds is 0.0001; accepted: at least 1277 samples at 44100"),
        (
            "data.validation_seconds=0.01",
            "data.validation_seconds is 0.01; accepted: at least 1025",
        ),
        (
            "discriminator.width=0.3",
            "discriminator.width: width is 0.3; accepted: 1, 0.5, 0.25, 0.125",
        ),
        (
            "trainer={discriminator_start: 1, discriminator_warmup: 1}",
            "trainer.discriminator_start is 1; accepted with trainer.discriminator_warmup: 0",
        ),
        ("discriminator.bands=[[0, 2]]", "discriminator.bands[0][1] is 2; accepted: 1 or less"),
        (
            "discriminator.fft_sizes=[30]",
            "discriminator.fft_sizes[0] is 30; accepted: multiples of",
        ),
    ],
)
def test_mistakes_are_one_line(override, message):
    with pytest.raises(RecipeError) as error:
        load_recipe("tiny", [override])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_suggests_a_known_one():
    with pytest.raises(RecipeError, match=r"no recipe '44kz' \(did you mean 44khz\?\)"):
        load_recipe("44kz")


def test_quantizer_forms_reach_the_model():
    recipe = load_recipe(
        "ablations/ema", ["model.encoder_dim=4", "model.decoder_dim=16", "model.n_codebooks=1"]
    )
    assert (
        DAC(**vars(recipe.model)).quantizer.quantizers[0].codebook.embedding_dim
        == recipe.model.latent_dim
    )
