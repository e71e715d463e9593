"""`.dac` files: what was written comes back; damage and malice come to one clear line."""

import contextlib
import dataclasses
import io
import os
import pickle
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dac_fast.storage import dac1
from dac_fast.storage.dac2 import HEADER, DACFile, DACFileError, pack, unpack

GOLDEN_FILES = [
    f"file_{model}_{kind}" for model in ("even", "odd") for kind in ("short", "chunked", "stereo")
]


def small(**changes):
    values = {
        "codes": torch.arange(2 * 3 * 7).reshape(2, 3, 7) * 24,
        "chunk_length": 7,
        "original_length": 3500,
        "input_db": -20.5,
        "channels": 2,
        "sample_rate": 44100,
        "gains": np.array([1.5, 0.5], np.float32),
        "codebook_size": 1000,
        "model_sample_rate": 44100,
        "hop_length": 512,
        "model": "tiny",
    }
    return DACFile(**values | changes)


def assert_same(a, b, but=()):
    for field in dataclasses.fields(DACFile):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert field.name in but or np.array_equal(x, y), field.name


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_published_files(golden, tmp_path, name):
    path, stored = golden / f"{name}.dac", np.load(golden / f"{name}.npz")
    file = DACFile.load(path)
    assert np.array_equal(file.codes, stored["codes"])
    assert file.codes.dtype == torch.int64
    assert file.input_db == stored["input_db"][0]
    assert file.sample_rate == stored["sample_rate"]
    assert (file.chunk_length, file.original_length) == (
        stored["chunk_length"],
        stored["original_length"],
    )
    assert (file.padding, file.channels) == (bool(stored["padding"]), stored["audio_in"].shape[1])
    file.save(tmp_path / "a.dac", "dac1")
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        assert (tmp_path / "a.dac").read_bytes() == path.read_bytes()
    assert_same(DACFile.load(tmp_path / "a.dac"), file)


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_pickles_of_other_numpy_versions(protocol, core):
    codes = np.asfortranarray(np.arange(12, dtype=">i4").reshape(1, 3, 4))
    metadata = {
        "input_db": np.float32(-3.5),
        "original_length": np.int64(7),
        "sample_rate": 44100,
        "chunk_length": 4,
    }
    metadata |= {"channels": 1, "padding": True, "dac_version": "1.0.0"}
    outer = np.array({"codes": codes, "metadata": metadata})
    pickled = pickle.dumps(outer, protocol)
    for known in (b"numpy.core.", b"numpy._core."):
        name = core.encode() + b"."
        # A name in protocol 4 follows its length.
        pickled = pickled.replace(
            bytes([len(known) + 10]) + known, bytes([len(name) + 10]) + name
        ).replace(known, name)
    if protocol == 4:
        pickled = pickled[:2] + pickled[11:]  # without the frame, whose length is now another
    loaded = dac1.loads(npy(pickled))
    assert np.array_equal(loaded["codes"], codes)
    assert loaded["input_db"] == -3.5
    assert loaded["original_length"] == 7


@st.composite
def files(draw):
    size = draw(st.sampled_from([1, 2, 3, 500, 1000, 1024, 1025, 65535, 65536]))
    c, n, f = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 40))
    codes = np.random.default_rng(draw(st.integers(0, 99))).integers(0, size, (c, n, f))
    gains = np.array(
        draw(st.lists(st.floats(0.125, 1e6, width=32), min_size=c, max_size=c)), np.float32
    )
    return DACFile(
        codes=draw(st.sampled_from([codes, torch.from_numpy(codes)])),
        chunk_length=draw(st.integers(1, f)),
        original_length=draw(st.integers(1, f * 10)),
        input_db=draw(st.floats(-70, 10, width=32)),
        channels=c,
        sample_rate=draw(st.integers(1000, 192000)),
        padding=draw(st.booleans()),
        gains=draw(st.sampled_from([None, gains])),
        codebook_size=size,
        model_sample_rate=100,
        hop_length=draw(st.integers(1000, 5000)),
        model=draw(st.text(max_size=30).filter(lambda name: name.isprintable())),
    )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(file=files())
def test_round_trip(tmp_path, file):
    path = tmp_path / "a.dac"
    file.save(path)
    assert_same(DACFile.load(path), file)
    bits = file.codes.numel() * file.bits_per_code
    extra = (
        HEADER.size
        + len(file.model.encode())
        + (0 if file.gains is None else 4 * file.channels)
        + 4
    )
    assert path.stat().st_size == -(-bits // 8) + extra
    assert file.bitrate == pytest.approx(bits * file.sample_rate / file.original_length)
    file.save(path, "dac1")
    unknown = ("gains", "codebook_size", "model_sample_rate", "hop_length", "model")
    assert_same(DACFile.load(path), file, but=unknown)


def test_packing_is_as_documented():
    assert pack(np.array([1, 2, 1023]), 10) == bytes(
        [0b00000000, 0b01000000, 0b00101111, 0b11111100]
    )
    codes = np.random.default_rng(0).integers(0, 1000, 150_001)
    assert np.array_equal(unpack(pack(codes, 10), 10, codes.shape), codes)


def test_truncation_and_flipped_bits(tmp_path):
    path = tmp_path / "a.dac"
    for format in ("dac2", "dac1"):
        small().save(path, format)
        data = path.read_bytes()
        for length in range(len(data)):
            path.write_bytes(data[:length])
            with pytest.raises(DACFileError):
                DACFile.load(path)
        path.write_bytes(data + b"\0")
        with pytest.raises(DACFileError):
            DACFile.load(path)
    small().save(path)
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        path.write_bytes(flipped(data, bit))
        with pytest.raises(DACFileError):
            DACFile.load(path)


def test_flipped_bits_of_published_files_never_crash(golden, tmp_path):
    """They have no checksum: a flip is noticed, or makes another valid file."""
    data = (golden / "file_even_short.dac").read_bytes()
    path = tmp_path / "a.dac"
    for bit in range(8 * 80, 8 * len(data), 11):
        path.write_bytes(flipped(data, bit))
        with contextlib.suppress(DACFileError):
            assert DACFile.load(path).codes.shape == (1, 5, 63)


def flipped(data, bit):
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def test_wrong_files(tmp_path):
    path = tmp_path / "a.dac"
    for content, reason in [
        (b"", "neither format's magic"),
        (b"RIFF" * 50, "neither format's magic"),
        (dac2_with(version=3), r"newer dac_fast: version is 3; accepted: 2"),
        (dac2_with(version=1), "version is 1; accepted: 2"),
        (dac2_with(c=65535, n=65535, f=2**63), "cut short"),
        (
            npy(b"", header=b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }"),
            "not a .dac file",
        ),
        (published(dac_version="0.0.1"), "dac_version is '0.0.1'; accepted: '1.0.0'"),
        (published(original_length="7"), "original_length is no single number"),
        (published(original_length=-1), "original_length is -1"),
        (published(channels=2), "channels is 2; accepted: 1"),
        (published(padding=1), "padding is 1; accepted: True or False"),
        (published(input_db=np.array([np.nan], np.float32)), "input_db is nan"),
        (published(codes=np.zeros((1, 2, 3), np.float32)), "dtype of codes is torch.float32"),
        (published(codes=np.array([[["text"]]], object)), "dtype is not one of integers or floats"),
        (published(codes=[1, 2]), "codes are list; accepted: an array"),
        (published(surplus=1), "metadata are not those"),
        (published(input_db=1 << 60), r"input_db is 1.152\d+e\+18; accepted: a loudness"),
        (published(input_db=1 << 2000), "a number of more than 64 bits"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DACFileError, match=f"a.dac: .*{reason}") as raised:
            DACFile.load(path)
        assert "\n" not in str(raised.value)
    with pytest.raises(DACFileError, match="no such file"):
        DACFile.load(tmp_path / "missing.dac")
    with pytest.raises(DACFileError, match="not a file"):
        DACFile.load(tmp_path)


def test_wrong_values(tmp_path):
    for changes, reason in [
        ({"codes": torch.zeros(3, 7, dtype=torch.int64)}, r"shape of codes is \[3, 7\]"),
        ({"codes": torch.zeros(2, 3, 7)}, "dtype of codes is torch.float32; accepted: integers"),
        ({"codes": torch.full((2, 3, 7), 1000)}, "a code is 1000; accepted: 0 to 999"),
        ({"codes": torch.full((2, 3, 7), -1)}, "a code is -1"),
        ({"chunk_length": 8}, "chunk_length is 8; accepted: a whole number from 1 to 7"),
        ({"original_length": 9000}, "original_length is 9000; accepted: .* 1 to 4097"),
        ({"sample_rate": 0}, "sample_rate is 0"),
        ({"gains": np.array([1.0, np.inf])}, "gains is"),
        ({"gains": np.array([1.0])}, "accepted: 2 positive numbers"),
        ({"codebook_size": 65537}, "codebook_size is 65537"),
        ({"gains": np.array([1.0, 1e-30])}, "gains is"),
        ({"model": "m" * 256}, "model is 'mmm"),
    ]:
        with pytest.raises(DACFileError, match=reason):
            small(**changes)
    with pytest.raises(DACFileError, match="format is 'mp3'; accepted: dac2, dac1"):
        small().save(tmp_path / "a.dac", "mp3")
    with pytest.raises(DACFileError, match="codebook_size is None; format 'dac2' needs it"):
        small(codebook_size=None).save(tmp_path / "a.dac")
    assert os.listdir(tmp_path) == []


def test_a_file_has_one_form(tmp_path):
    """Filler bits that are not zeros, and names that are not UTF-8, with a right checksum."""
    path = tmp_path / "a.dac"
    file = small(
        codes=np.zeros((1, 1, 3), np.int64),
        chunk_length=3,
        channels=1,
        gains=None,
        original_length=9,
    )
    file.save(path)
    data = path.read_bytes()
    for position, reason in ((-5, "after the last code are not zeros"), (61, "accepted: UTF-8")):
        changed = bytearray(data)
        changed[position] |= 0x81
        changed[-4:] = zlib.crc32(changed[:-4]).to_bytes(4, "little")
        path.write_bytes(changed)
        with pytest.raises(DACFileError, match=reason):
            DACFile.load(path)


def test_large_files_are_refused_unread(tmp_path):
    """Sparse files: none of these could be read into memory."""
    path = tmp_path / "a.dac"
    codes = 1 << 36
    whole = dac2_with(f=codes)[: HEADER.size]
    for head, size, reason in [
        (b"", 1 << 42, "neither format's magic"),
        (npy(b""), 1 << 42, "4398046511104 bytes; accepted: up to"),
        (dac2_with(), 1 << 42, "too long"),
        (whole, HEADER.size + codes * 10 // 8 + 4, "the number of codes is 68719476736"),
    ]:
        path.write_bytes(head)
        os.truncate(path, size)
        with pytest.raises(DACFileError, match=reason):
            DACFile.load(path)


def test_long_numbers_in_a_pickle():
    """The product of a shape of many such numbers would take minutes."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n)R"
    dtype = b"cnumpy\ndtype\n(\x8c\x02u2tR"
    for number, reason in [
        (b"\x8a\xff" + b"\x7f" * 255, "a number of more than 64 bits"),
        (b"J" + b"\x7f" * 4, "an array of no shape"),
    ]:
        shape = b"(" + number + b"q\x00" + b"h\x00" * 10**5 + b"t"
        state = b"(K\x01" + shape + dtype + b"\x89C\x00tb"
        with pytest.raises(ValueError, match=reason):
            dac1.loads(npy(b"\x80\x04" + array + state + b"."))


class Call:
    """Pickles as a call of that function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_hostile_pickles(tmp_path):
    """Nothing is called, and neither memory nor time goes to what a few bytes ask for."""
    mark = tmp_path / "executed"
    path = tmp_path / "a.dac"
    call = Call(os.system, f"touch {mark}")
    within = np.empty(1, object)
    within[0] = call
    nested = b"".join(
        b"h%ch%c\x86\x94" % (i, i) for i in range(100)
    )  # tuples of two of the one before
    hostile = [
        *(npy(pickle.dumps(call, protocol)) for protocol in range(6)),
        published(codes=call),
        published(codes=within),
        published(original_length=call),
        npy(pickle.dumps(Call(eval, f"open({str(mark)!r}, 'w')"))),
        npy(pickle.dumps(Call(np.ndarray, (10**12,)))),
        npy(pickle.dumps(Call(bytearray, 10**12))),
        npy(b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.data\x93."),
        npy(b"\x80\x04cnumpy\nload\n."),
        npy(b"\x80\x04]r\xff\xff\xff\x7f."),  # memo entry two billion
        npy(b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"."),  # a terabyte of bytes
        npy(b"\x80\x04)\x94" + nested + b"}hd}s."),  # as a dict's key
        npy(b"\x80\x04" + b"(" * 10**5 + b"."),
        npy(b"\x80\x04" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."),
        npy(b"\x80\x04P1\n."),
        npy(b"\x80\x04."),
    ]
    for content in hostile:
        path.write_bytes(content)
        with pytest.raises(DACFileError) as raised:
            DACFile.load(path)
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 300 + len(str(path))
        assert not mark.exists()
    # The calls would have worked.
    os.system(f"touch {mark}")
    assert mark.exists()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX limits")
def test_a_full_disk_leaves_nothing(tmp_path):
    program = """if True:
        import resource, signal, sys
        import numpy as np
        from dac_fast.storage.dac2 import DACFile
        from dac_fast.files import OutputError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            DACFile(np.zeros((1, 9, 999), np.int64), 9, 9, 0.0, 1, 44100).save(sys.argv[1], "dac1")
        except OutputError:
            sys.exit(3)
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "a.dac"], env=os.environ | {"PYTHONPATH": paths}
    )
    assert run.returncode == 3
    assert os.listdir(tmp_path) == []


def npy(pickled, header=dac1.NPY_HEADER):
    header = header.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickled


def published(**changes):
    """A published file with other contents."""
    metadata = {
        "input_db": np.zeros(1, np.float32),
        "original_length": 7,
        "sample_rate": 44100,
        "chunk_length": 3,
    }
    metadata |= {"channels": 1, "padding": True, "dac_version": "1.0.0"}
    codes = changes.pop("codes", np.zeros((1, 2, 3), np.uint16))
    file = io.BytesIO()
    np.save(file, {"codes": codes, "metadata": metadata | changes}, allow_pickle=True)
    return file.getvalue()


def dac2_with(version=2, c=1, n=1, f=1):
    return HEADER.pack(
        b"\x89DAC\r\n\x1a\n", version, 1, 1024, 44100, 512, 44100, c, n, f, 1, 1, 0.0, 0
    ) + bytes(100)
