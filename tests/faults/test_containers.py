"""`.dac` files of both formats: changed headers, contents, pickles and bytes."""

import pickle
import zlib
from pathlib import Path
from random import Random

import numpy as np
import pytest

from dac_fast.storage.dac2 import HEADER, DACFile
from faults import trials
from faults.pickles import Array, Reference, reprogrammed
from faults.trials import NUMBERS, ODD, changed, mutated

GOLDEN = Path(__file__).parents[1] / "golden"


def a_file(random: Random) -> DACFile:
    """A small file of any kind."""
    size = random.choice((1, 2, 3, 1000, 1024, 65536))
    c, n, f = random.choice((1, 1, 2, 5)), random.randrange(1, 4), random.randrange(1, 20)
    codes = np.random.default_rng(random.randrange(1000)).integers(0, size, (c, n, f))
    gains = np.linspace(0.5, 2, c, dtype=np.float32)
    return DACFile(
        codes=codes,
        chunk_length=random.randint(1, f),
        original_length=random.randint(1, 500 * f),
        input_db=-20.0,
        channels=c,
        sample_rate=44100,
        padding=random.random() < 0.7,
        gains=random.choice((None, gains)),
        codebook_size=size,
        model_sample_rate=44100,
        hop_length=512,
        model=random.choice(("", "tiny", "modèle")),
    )


def dac2(folder: Path) -> trials.Trial:
    """Files of our own format; an accepted one is written again with the same bytes."""
    path, again = folder / "a.dac", folder / "b.dac"

    def trial(random: Random) -> None:
        a_file(random).save(path)
        data = path.read_bytes()
        if random.random() < 0.5:
            fields = list(HEADER.unpack_from(data))
            for _ in range(random.choice((1, 1, 2, 3))):
                at = random.randrange(1, len(fields))
                number = random.choice((*NUMBERS, *range(12), 500, 1024, 44100))
                size = {1: 2, 2: 2, 7: 2, 8: 2, 9: 8, 10: 8, 11: 8, 13: 1}.get(at, 4)
                loudness = random.choice((0.0, -70.0, 300.0, np.nan, np.inf, -0.0))
                fields[at] = loudness if at == 12 else number % 256**size
            data = HEADER.pack(*fields) + data[HEADER.size :]
        else:
            data = mutated(random, data)
        # Most checksums are right, so that what they protect is looked at.
        if random.random() < 0.9 and len(data) > 4:
            data = data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "little")
        path.write_bytes(data)
        DACFile.load(path).save(again)
        assert again.read_bytes() == data

    return trial


def dac1(folder: Path) -> trials.Trial:
    """Files of the published package; an accepted one holds what Python's own machine reads."""
    path = folder / "a.dac"
    golden = [file.read_bytes() for file in sorted(GOLDEN.glob("file_*.dac"))]

    def trial(random: Random) -> None:
        data = random.choice(golden)
        start = 10 + int.from_bytes(data[8:10], "little")
        match random.randrange(4):
            case 0:
                data = mutated(random, data)
            case 1:
                data = mutated(random, data[:700]) + data[700:]
            case 2:
                data = data[:start] + reprogrammed(random, data[start:])
            case 3:
                data = data[:start] + content_changed(random)
        path.write_bytes(data)
        assert_holds(DACFile.load(path), data[10 + int.from_bytes(data[8:10], "little") :])

    return trial


def content_changed(random: Random) -> bytes:
    """The pickle of a file in which something stands that should not."""
    shape = random.choice(((1, 2, 3), (2, 1, 4), (2, 3), (1, 0, 2), ()))
    dtype = random.choice(("<u2", ">u2", "<i8", "<u8", "u1", "f4", "c8", "?", "M8[s]", "U3", "O"))
    codes = np.zeros(shape, dtype)
    if random.random() < 0.5:
        codes = np.arange(12, dtype=random.choice(("<u2", ">i4"))).reshape(1, 3, 4)
    metadata: dict[str, object] = {
        "input_db": np.array([-20], random.choice(("f4", ">f8", "i2"))),
        "original_length": random.choice((7, np.int64(7), np.array([[7]]))),
        "sample_rate": 44100,
        "chunk_length": 1,
        "channels": codes.shape[0] if codes.ndim else 1,
        "padding": True,
        "dac_version": "1.0.0",
    }
    content: object = {"codes": np.asfortranarray(codes), "metadata": metadata}
    if random.random() < 0.8:
        odd = (*ODD, np.zeros(3), np.float32(np.nan), np.array(["a"], object), complex(1, 2))
        content = changed(random, content, odd)
    outer = np.empty(random.choice(((), (), 1)), object)
    outer[(0,) * outer.ndim] = content
    return pickle.dumps(outer, random.choice((0, 1, 2, 3, 3, 3, 4, 4, 5)))


def assert_holds(file: DACFile, pickled: bytes) -> None:
    """The codes and numbers of a file are those that another reader finds."""
    outer = Reference.read(pickled)
    assert isinstance(outer, Array)
    (content, *_) = outer.state[4]
    assert np.array_equal(file.codes.numpy(), content["codes"].value())
    for name, value in content["metadata"].items():
        if isinstance(value, Array):
            value = value.value().item()
        assert name == "dac_version" or getattr(file, name) == value, name


@pytest.mark.parametrize("kind", [dac2, dac1])
def test_containers(kind: trials.Kind, tmp_path: Path) -> None:
    trials.run(kind, tmp_path, 2000)
