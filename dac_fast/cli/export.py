"""`export`: encoder and decoder for other runtimes, and a page that runs them in a browser."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from dac_fast import DAC, inference, load
from dac_fast.cli.jobs import Existing, to_write
from dac_fast.cli.options import Codebooks, Model, Parts, Program, ProgramPrecision, WhenExisting
from dac_fast.cli.terminal import out
from dac_fast.cli.weights import fetch_if_published
from dac_fast.files import make_folder, write_folder
from dac_fast.inference.parts import MODULES, Part
from dac_fast.model.halves import PARTS
from dac_fast.page import browser
from dac_fast.streaming.export import STEPS, Step


class Format(NamedTuple):
    """What `--format` names.

    Attributes:
        suffix: the end of the files' names.
        modules: by part, what makes its module of a codec.
        write: writes a module to a path.
    """

    suffix: str
    modules: Mapping[str, Callable[..., Part]]
    write: Callable[[Part, Path], None]


FORMATS = {
    Program.onnx: Format(".onnx", MODULES, inference.write_onnx),
    Program.onnx_streaming: Format("_step.onnx", STEPS, inference.write_onnx),
    Program.pt2: Format(".pt2", MODULES, inference.write_pt2),
    Program.aoti: Format(".aoti.pt2", MODULES, inference.write_aoti),
}
# Of onnxruntime-web's dist: the loader, and the runtime for processors.
RUNTIME = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
)


def export(
    folder: Annotated[
        Path,
        typer.Argument(help="Where encoder and decoder are written; made where it is missing."),
    ],
    model: Model = "tiny",
    n_quantizers: Codebooks = None,
    parts: Parts = None,
    format: Annotated[
        Program,
        typer.Option(
            help="onnx-streaming: one step, state in and out. pt2: torch.export's. aoti: compiled "
            "for this processor by AOTInductor."
        ),
    ] = Program.onnx,
    precision: Annotated[
        ProgramPrecision, typer.Option(help="Of encoder and decoder; audio stays float32.")
    ] = ProgramPrecision.fp32,
    page: Annotated[
        Path | None,
        typer.Option(
            help="Of onnx-streaming: the folder of the npm package onnxruntime-web. A page that "
            "runs the models in a browser is written too."
        ),
    ] = None,
    existing: WhenExisting = Existing.error,
) -> None:
    """Write encoder (audio to codes) and decoder (codes to audio) for other runtimes.

    Both take any batch and length.
    """
    suffix, modules, write = FORMATS[format]
    paths = {part: folder / f"{part}{suffix}" for part in ([parts.value] if parts else PARTS)}
    index = folder / "index.html"
    runtime = runtime_of(page, format) if page else {}
    wanted = to_write(existing, *paths.values(), *([index] if page else []))
    if not wanted:
        return
    make_folder(folder)
    fetch_if_published(model)
    codec = load(model, parts=parts and parts.value)
    if page and (codec.config.continuous or codec.config.channels > 1):
        raise ValueError(f"--page with {model}; accepted: mono models with codebooks")
    there = {}
    for part, path in paths.items():
        there[path] = modules[part](codec, n_quantizers, precision.value)
        if path in wanted:
            write(there[path], path)
    if written := [str(path) for path in there if path in wanted]:
        out.print(f"wrote {' and '.join(written)}")
    if index in wanted:
        html = browser(described(codec, there))
        # The page comes last: it is there only if what it needs is.
        write_folder(folder, {**runtime, index.name: html.encode()})
        out.print(f"wrote {index}; python -m http.server -d {folder} shows it")


def described(codec: DAC, written: Mapping[Path, Part]) -> dict[str, object]:
    """What the page must know of the models that were written."""
    numbers: dict[str, object] = {
        "name": codec.name,
        "sample_rate": codec.sample_rate,
        "hop_length": codec.hop_length,
        "codebook_size": codec.config.codebook_size,
    }
    for path, step in written.items():
        assert isinstance(step, Step)
        numbers |= {
            "n_codebooks": step.kept.shape[1],
            step.part: {"file": path.name, **step.described()},
        }
    return numbers


def runtime_of(package: Path, format: Program) -> dict[str, bytes]:
    """The files of ONNX Runtime that the page of `export` needs, by their names."""
    if format is not Program.onnx_streaming:
        raise ValueError(f"--page with --format {format.value}; accepted: onnx-streaming")
    missing = [name for name in RUNTIME if not (package / "dist" / name).is_file()]
    if missing:
        raise ValueError(
            f"--page {package}: no dist/{missing[0]} in it; "
            "accepted: what `npm pack onnxruntime-web` gives, unpacked"
        )
    return {name: (package / "dist" / name).read_bytes() for name in RUNTIME}
