"""`dac-fast serve`: the codec by HTTP and WebSocket."""

from typing import Annotated

import typer

from dac_fast.cli.options import Device, Model, Parts, Precision
from dac_fast.cli.weights import fetch_if_published
from dac_fast.ops.device import checked_device
from dac_fast.processors import processors


def serve(
    model: Model = "tiny",
    parts: Parts = None,
    device: Device = "auto",
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0: all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="DAC_FAST_TOKEN",
            help="Ask for 'Authorization: Bearer TOKEN'. The variable keeps it out of `ps`.",
        ),
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="Of encoder and decoder. Default: as of `DAC.optimize`."),
    ] = None,
    shapes: Annotated[
        str,
        typer.Option(
            help="On a GPU, items × frames of batches to time layers at and capture as CUDA "
            "graphs before serving, as 1x87,16x87. Takes minutes."
        ),
    ] = "",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the model on a CPU. Default: the cores but one, left to the network."
        ),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Streams at once in each direction.")] = 64,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Requests accepted at once; others get 429.")
    ] = 64,
    max_body_mib: Annotated[float, typer.Option(min=0.001, help="Of a request's body.")] = 64.0,
    max_seconds: Annotated[float, typer.Option(min=0.001, help="Of a request's audio.")] = 600.0,
    max_channels: Annotated[int, typer.Option(min=1, help="Of a request's audio.")] = 8,
    max_connections: Annotated[int, typer.Option(min=1, help="At once.")] = 1000,
    idle_seconds: Annotated[
        float, typer.Option(min=0.001, help="Drop who neither sends nor takes for that long.")
    ] = 30.0,
    total_seconds: Annotated[float, typer.Option(min=0.001, help="For a request.")] = 300.0,
    stream_seconds: Annotated[float, typer.Option(min=0.001, help="For a stream.")] = 3600.0,
    grace_seconds: Annotated[
        float, typer.Option(min=0, help="After SIGTERM, for what was accepted.")
    ] = 30.0,
    max_wait_ms: Annotated[
        float, typer.Option(min=0, help="A request waits that long for others to share a batch.")
    ] = 2.0,
    max_batch_seconds: Annotated[
        float | None,
        typer.Option(
            min=0, help="Audio of a batch; 0: no batches. Default: 2 on a CPU, 60 on a GPU."
        ),
    ] = None,
    step_frames: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Frames of all streams computed at once; 1: no batches. Default: 64 on a CPU, all "
            "of them on a GPU.",
        ),
    ] = None,
    chunk_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Of a long request, computed at once: streams wait for it. Default: 1 on a CPU, "
            "10 on a GPU.",
        ),
    ] = None,
) -> None:
    """Serve a model by HTTP and WebSocket, with a page to hear it at /."""
    import torch

    try:
        from dac_fast.serving.app import create_app
        from dac_fast.serving.server import listen, run
        from dac_fast.serving.service import prepared
        from dac_fast.serving.settings import Settings
    except ImportError as error:
        raise ValueError(
            f"serving needs {error.name}, which is not here: pip install 'dac-fast[serve]'"
        ) from error

    place = checked_device(device, "--device")
    settings = Settings(
        token=token,
        slots=slots,
        max_requests=max_requests,
        max_body_mib=max_body_mib,
        max_seconds=max_seconds,
        max_channels=max_channels,
        max_connections=max_connections,
        idle_seconds=idle_seconds,
        total_seconds=total_seconds,
        stream_seconds=stream_seconds,
        grace_seconds=grace_seconds,
        max_wait_ms=max_wait_ms,
        max_batch_seconds=max_batch_seconds,
        step_frames=step_frames,
        chunk_seconds=chunk_seconds,
    )
    torch.set_num_threads(threads or max(processors() - 1, 1))
    listener = listen(host, port)
    half = parts and parts.value
    fetch_if_published(model)
    codec = prepared(model, place, precision and precision.value, _shapes(shapes), half)
    address = f"http://{host}:{listener.getsockname()[1]}"
    typer.echo(f"serving {half + ' of ' if half else ''}{model} on {place} at {address}")
    if token is None and host not in ("127.0.0.1", "::1", "localhost"):
        typer.echo(f"whoever reaches {host} may use it; --token asks for one", err=True)
    run(create_app(codec, settings), listener)


def _shapes(text: str) -> list[tuple[int, int]]:
    """The pairs (items, frames) of "1x87,16x87"."""
    try:
        pairs = [part.lower().split("x") for part in text.split(",") if part]
        return [(int(items), int(frames)) for items, frames in pairs]
    except ValueError as error:
        accepted = "items x frames, as 1x87,16x87"
        raise ValueError(f"--shapes is {text!r}; accepted: {accepted}") from error
