"""The codec outside this package: `torch.export` programs, AOTInductor packages and ONNX models.

See `dac_fast.inference.parts` for what goes in and comes out.
"""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from dac_fast.files import atomic_path, make_folder, write_bytes
from dac_fast.inference.parts import MODULES, Part
from dac_fast.model.halves import PARTS
from dac_fast.model.interface import Codec

FilePath = str | os.PathLike[str]


def export(
    codec: Codec, part: str, n_quantizers: int | None = None, precision: str = "fp32"
) -> torch.export.ExportedProgram:
    """One part as a program for any batch and length, on the codec's device.

    PyTorch guards a program against the single frame, which it could lay out in memory otherwise:
    run that by `program.module(check_guards=False)`.

    Args:
        codec: the `DAC`; it stays as it is.
        part: "encoder" (audio to codes) or "decoder" (codes to audio).
        n_quantizers: codebooks N; None: all.
        precision: "fp32", or "fp16" for weights and activations of encoder and decoder.
    Raises:
        ValueError: an argument is out of range, or the part was not loaded.
    """
    if part not in MODULES:
        raise ValueError(f"part is {part!r}; accepted: {' or '.join(MODULES)}")
    return MODULES[part](codec, n_quantizers, precision).traced()


def export_onnx(
    codec: Codec, folder: FilePath, n_quantizers: int | None = None, precision: str = "fp32"
) -> list[Path]:
    """Write encoder.onnx (audio to codes) and decoder.onnx (codes to audio).

    Of half a codec, it writes the one. They take any batch and length, and have the codec's
    sample_rate and hop_length as metadata.

    Args:
        codec: the `DAC`; it stays as it is.
        folder: is made where it is missing.
        n_quantizers: codebooks N; None: all.
        precision: "fp32", or "fp16" for weights and activations of encoder and decoder.
    Returns:
        the paths.
    Raises:
        ValueError: an argument is out of range, or the packages are not installed.
        OSError: the folder cannot be written.
    """
    make_folder(Path(folder))
    paths = [Path(folder) / f"{part}.onnx" for part in ([codec.parts] if codec.parts else PARTS)]
    for path in paths:
        write_onnx(MODULES[path.stem](codec, n_quantizers, precision), path)
    return paths


def write_pt2(part: Part, path: FilePath) -> None:
    """Write a program for `torch.export.load`.

    Raises:
        OSError: the file cannot be written.
    """
    # Into a file, PyTorch's writer would turn a full disk into a RuntimeError.
    data = io.BytesIO()
    torch.export.save(part.traced(), data)
    write_bytes(path, data.getvalue())


def write_aoti(part: Part, path: FilePath) -> None:
    """Compile a part for this machine's processor, for `torch._inductor.aoti_load_package`.

    Args:
        part: on the device that is to run it.
        path: ends in ".pt2", which PyTorch wants.
    Raises:
        ValueError: there is no C++ compiler.
        OSError: the file cannot be written.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "a package needs a C++ compiler, as g++, or the one that CXX names"
        ) from error
    data = io.BytesIO()
    torch._inductor.aoti_compile_and_package(part.traced(), package_path=data)
    write_bytes(path, data.getvalue())


def write_onnx(part: Part, path: FilePath) -> None:
    """Write a part as an ONNX model, with the part's numbers as metadata.

    Raises:
        ValueError: the packages are not installed.
        OSError: the file cannot be written.
    """
    try:
        from onnxscript import ir
    except ImportError as error:
        raise ValueError(
            "ONNX models need onnx and onnxscript: pip install 'dac-fast[onnx]'"
        ) from error
    with _quiet():
        program = torch.onnx.export(
            part.cpu().traced(),
            input_names=[port.name for port in part.inputs],
            output_names=[port.name for port in part.outputs],
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    graph = program.model.graph
    for value, port in zip(
        [*graph.inputs, *graph.outputs], [*part.inputs, *part.outputs], strict=True
    ):
        value.shape = ir.Shape(port.shape)
    program.model.metadata_props.update(
        {name: str(number) for name, number in part.numbers.items()}
    )
    with atomic_path(path) as temporary:
        program.save(temporary)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch.onnx on packages that these models do not need, and on its deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
