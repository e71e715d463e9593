"""Checkpoints of all three kinds: changed configurations, tensors, archives and bytes."""

import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from dac_fast import DAC
from faults import trials
from faults.pickles import TorchReference, reprogrammed
from faults.trials import ODD, changed, mutated

NEWER = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}


def a_codec() -> DAC:
    """The smallest there is, whose weights all differ."""
    torch.manual_seed(0)
    rates = {"encoder_rates": [2], "decoder_rates": [2]}
    codec = DAC(2, decoder_dim=4, n_codebooks=2, codebook_size=3, codebook_dim=2, **rates)
    codec.load_state_dict({key: torch.randn_like(t) for key, t in codec.state_dict().items()})
    return codec.eval()


def safetensors_files(folder: Path) -> trials.Trial:
    """Our own format."""
    codec, path = a_codec(), folder / "a.safetensors"
    codec.save(path)
    good = path.read_bytes()
    state = from_safetensors(good)
    values = codec.config.to_dict()

    def trial(random: Random) -> None:
        match random.randrange(4):
            case 0:
                data = mutated(random, good)
            case 1:
                data = header_changed(random, good)
            case 2:
                metadata = {"dac_fast": json.dumps(changed(random, values, JSON))}
                data = to_safetensors(state, metadata)
            case 3:
                contiguous = as_safetensors(state_changed(random, state))
                data = to_safetensors(contiguous, {"dac_fast": json.dumps(values)})
        path.write_bytes(data)
        assert_holds(DAC.load(path), from_safetensors(data))

    return trial


def hugging_face_folders(folder: Path) -> trials.Trial:
    """Folders of transformers' model."""
    codec, path = a_codec(), folder / "a"
    codec.fold_weight_norm().save(path)
    codec.save(folder / "a.safetensors")
    published = from_safetensors((folder / "a.safetensors").read_bytes())
    good = {file: file.read_bytes() for file in path.iterdir()}
    config, weights = path / "config.json", path / "model.safetensors"
    values, state = json.loads(good[config]), from_safetensors(good[weights])
    # All tensors differ, so that their values tell which is which.
    names = {
        theirs: next(ours for ours, other in published.items() if torch.equal(tensor, other))
        for theirs, tensor in state.items()
    }

    def trial(random: Random) -> None:
        shutil.rmtree(path)
        path.mkdir()
        for file, data in good.items():
            file.write_bytes(data)
        match random.randrange(6):
            case 0:
                config.write_text(json.dumps(changed(random, values, JSON)))
            case 1:
                config.write_bytes(mutated(random, good[config]))
            case 2:
                weights.write_bytes(header_changed(random, good[weights]))
            case 3:
                weights.write_bytes(mutated(random, good[weights]))
            case 4:
                weights.write_bytes(to_safetensors(as_safetensors(state_changed(random, state))))
            case 5:
                replaced(random, random.choice((config, weights)))
        restored = DAC.load(path)
        found = from_safetensors(weights.read_bytes())
        assert_holds(restored, {names.get(key, key): tensor for key, tensor in found.items()})

    return trial


def pth_files(folder: Path) -> trials.Trial:
    """The published package's format."""
    codec, path = a_codec(), folder / "a.pth"
    codec.save(path)
    good, state = path.read_bytes(), codec.state_dict()
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    kwargs = codec.config.to_dict()
    del kwargs["activation"]

    def trial(random: Random) -> None:
        content: object = {"state_dict": state, "metadata": {"kwargs": kwargs}}
        match random.randrange(6):
            case 0:
                path.write_bytes(mutated(random, good))
            case 1:
                write_archive(random, path, records)
            case 2:
                program = reprogrammed(random, records["archive/data.pkl"])
                write_archive(Random(0), path, records | {"archive/data.pkl": program})
            case 3:
                content = {"state_dict": state_changed(random, state, ODD), "metadata": {}}
                content["metadata"] = {"kwargs": kwargs}
                torch.save(content, path)
            case 4:
                metadata = {"kwargs": changed(random, kwargs)}
                torch.save({"state_dict": state, "metadata": metadata}, path)
            case 5:
                torch.save(changed(random, content), path)
        restored = DAC.load(path)
        with zipfile.ZipFile(path) as archive:
            (program,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            content = TorchReference(archive, program).load()
        assert_holds(restored, content["state_dict"])

    return trial


# What JSON can say of `ODD`.
JSON = tuple(value for value in ODD if not isinstance(value, bytes))


def header_changed(random: Random, data: bytes) -> bytes:
    """A .safetensors file whose description of its tensors has a change."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    dtypes = ("F32", "F16", "BF16", "F64", "I8", "U64", "BOOL", "F8_E4M3", [0, 8], [2**62, 2**63])
    text = json.dumps(changed(random, header, (*JSON, *dtypes))).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def state_changed(
    random: Random, state: Mapping[str, Tensor], odd: tuple[object, ...] = ()
) -> dict[object, object]:
    """A state dict in which something stands that should not, or the same in another spelling."""
    result: dict[object, object] = dict(state)
    key = random.choice(list(state))
    tensor = state[key]
    match random.randrange(10):
        case 0:
            del result[key]
        case 1:
            result[random.choice(("a", "", "a.weight", "\x1b[31m", f"{key}.weight"))] = tensor
        case 2:
            result[key] = torch.full_like(tensor, random.choice((0.0, float("nan"), float("inf"))))
        case 3:
            result[key] = tensor.to(random.choice(DTYPES))
        case 4:
            result[key] = random.choice(
                (tensor[0], tensor.flatten()[0], tensor[:0], tensor.transpose(0, -1))
            )
        case 5:
            result[key] = random.choice((torch.zeros(10**6), torch.zeros(1).expand(1000, 1000)))
        case 6:
            result = {respelled(key): tensor for key, tensor in state.items()}
        case 7:
            result[key] = state[random.choice(list(state))]
        case 8 if odd:
            result[key] = random.choice(odd)
        case 9 if odd:
            result[random.choice((7, None, (1, 2), b"a", 2**70))] = result.pop(key)
    return result


DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64)


def respelled(key: str) -> str:
    """A name in the newer spelling of weight norm."""
    for older, newer in NEWER.items():
        key = key.replace(older, newer)
    return key


def as_safetensors(state: Mapping[object, object]) -> dict[str, Tensor]:
    """A state dict as its format has to have it: each tensor in memory of its own."""
    return {
        str(key): tensor.contiguous().clone()
        for key, tensor in state.items()
        if isinstance(tensor, Tensor) and not tensor.is_complex()
    }


def replaced(random: Random, file: Path) -> None:
    """Something else where a file was."""
    file.unlink()
    match random.randrange(6):
        case 0:
            os.mkfifo(file)
        case 1:
            file.symlink_to("/dev/zero")
        case 2:
            file.symlink_to(file)
        case 3:
            file.mkdir()
        case 4:
            file.write_bytes(b"")
        case 5:
            pass


def write_archive(random: Random, path: Path, records: Mapping[str, bytes]) -> None:
    """A zip archive of records, most often with something that `torch.save` would not do."""
    names = list(records)
    dropped = random.choice((*names, "", "", ""))
    method = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in names:
            if name != dropped:
                archive.writestr(name, records[name])
        match random.randrange(6):
            case 0:
                archive.writestr("other/data.pkl", b".")
            case 1:
                archive.writestr(".data/extern_modules", b"")
            case 2:
                archive.comment = b"comment" * 1000
    if random.random() < 0.2:
        data = bytearray(path.read_bytes())
        entry = data.rindex(b"PK\x01\x02") + random.randrange(46)
        data[entry] = random.randrange(256)
        path.write_bytes(data)


def assert_holds(codec: DAC, raw: Mapping[str, Tensor]) -> None:
    """A codec's weights are those that another reader finds in the file, under published names."""
    state, left = codec.state_dict(), set(codec.state_dict())
    for name, tensor in raw.items():
        for older, newer in NEWER.items():
            name = name.replace(newer, older)
        if name in state:
            assert torch.equal(state[name], tensor.float()), name
            left.discard(name)
        else:
            magnitude, direction = state[f"{name}_g"], state[f"{name}_v"]
            folded = torch._weight_norm(direction, magnitude, 0)
            torch.testing.assert_close(folded, tensor.float(), rtol=1e-5, atol=1e-6)
            left -= {f"{name}_g", f"{name}_v"}
    assert not left


@pytest.mark.parametrize("kind", [safetensors_files, hugging_face_folders, pth_files])
def test_checkpoints(kind: trials.Kind, tmp_path: Path) -> None:
    trials.run(kind, tmp_path, 300)
