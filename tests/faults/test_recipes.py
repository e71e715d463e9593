"""Recipes and manifests: changed values, bytes, overrides, and texts that grow as they are read."""

import json
from pathlib import Path
from random import Random

import pytest
import yaml

from dac_fast.audio.sources import audio_files
from dac_fast.training import load_recipe
from faults import trials
from faults.test_checkpoints import JSON
from faults.trials import changed, mutated

# Ten to the power of nine, in 200 bytes; brackets that a parser has to come back from.
ALIASES = "a0: &a0 [1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
DEEP = "[" * 10_000
TEXTS = (
    ALIASES,
    f"model: {DEEP}",
    "base: a",
    "base: [a]",
    "base: ..",
    "? [a]: b",
    "a: *b",
    "--- a\n--- b",
)


def recipes(folder: Path) -> trials.Trial:
    """Recipe files and overrides; an accepted one says of itself what it was loaded from."""
    path, again = folder / "a.yaml", folder / "b.yaml"
    values = load_recipe("tiny").to_dict()
    good = yaml.safe_dump(values)
    keys = [f"{group}.{key}" for group in values if group != "name" for key in values[group]]

    def trial(random: Random) -> None:
        data, overrides = good.encode(), []
        match random.randrange(4):
            case 0:
                text = yaml.dump(changed(random, values, JSON), allow_unicode=True)
                data = text.encode(errors="replace")
            case 1:
                data = mutated(random, data)
            case 2:
                data = f"{random.choice((good, ''))}\n{random.choice(TEXTS)}".encode()
            case 3:
                key = random.choice((*keys, "", ".", "model", "a", "trainer.steps.more"))
                value = random.choice((ALIASES, DEEP, "{a: 1}", *JSON))
                overrides = [f"{key}={value}"]
        path.write_bytes(data)
        recipe = load_recipe(str(path), overrides)
        again.write_text(yaml.safe_dump(recipe.to_dict()))
        assert load_recipe(str(again)) == recipe

    return trial


def manifests(folder: Path) -> trials.Trial:
    """Lists of audio files; an accepted one has a file for each of its lines."""
    path = folder / "manifest.jsonl"
    entries: list[dict[str, object]] = [
        {"file": "a/x.wav", "domain": "music", "full_band": True, "seconds": 1.5, "rate": 44100},
        {"file": "b.flac", "package": "p", "full_band": False},
        {"file": "/c.ogg"},
    ]
    numbers = '{"file": "a.wav", "rate": 1e999}', '{"file": "a.wav", "seconds": -Infinity}'

    def trial(random: Random) -> None:
        lines = [json.dumps(entry) for entry in entries]
        match random.randrange(3):
            case 0:
                lines = [json.dumps(changed(random, entry, JSON)) for entry in entries]
            case 1:
                lines.append(random.choice((DEEP, '{"file": ' + DEEP, "null", *numbers)))
            case 2:
                pass
        data = "\n".join(lines).encode()
        path.write_bytes(mutated(random, data) if random.random() < 0.5 else data)
        found = audio_files(path)
        text = path.read_bytes().decode(errors="replace")
        expected = [json.loads(line)["file"] for line in text.splitlines() if line.strip()]
        assert sorted(file.name for file in found) == sorted(Path(x).as_posix() for x in expected)

    return trial


@pytest.mark.parametrize("kind", [recipes, manifests])
def test_recipes(kind: trials.Kind, tmp_path: Path) -> None:
    trials.run(kind, tmp_path, 500)
