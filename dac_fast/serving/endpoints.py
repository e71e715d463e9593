"""The endpoints that compute: encode, decode, reconstruct."""

import contextlib
import json
import tempfile
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import anyio
import numpy as np
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response, StreamingResponse

from dac_fast.audio.reading import AudioError, Recording, read
from dac_fast.metrics import quality
from dac_fast.model.halves import require
from dac_fast.recordings.compress import compress, decompressed_blocks
from dac_fast.serving.batching import batched
from dac_fast.serving.formats import (
    AUDIO_TYPES,
    CODE_TYPES,
    audio_to_bytes,
    codes_from_bytes,
    codes_to_bytes,
    wav_size,
)
from dac_fast.serving.service import Service, service_of
from dac_fast.storage.dac2 import DACFile

# The longest clip of `/v1/reconstruct`, whose distances hold all of its spectrograms.
CLIP_SECONDS = 60.0

_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_AUDIO_BODY = {
    "requestBody": {
        "description": "An audio file: wav, flac, ogg, mp3 or what else libsndfile reads.",
        "content": _BINARY,
        "required": True,
    }
}
_CODES_BODY = {
    "requestBody": {
        "description": "A .dac file of either format; codes [C, N, F] as .npy or JSON; or what "
        "/v1/encode gives as JSON.",
        "content": _BINARY,
        "required": True,
    }
}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The body is damaged, or not what is accepted; `detail` says why."},
    401: {"description": "The token is missing or wrong."},
    408: {"description": "The body stopped coming."},
    413: {"description": "The body, its length or its channels are more than accepted."},
    429: {"description": "Too many requests are in progress; Retry-After says when to try again."},
    501: {"description": "The server has the other half of the model alone."},
    503: {"description": "The server ends."},
    504: {"description": "The request took too long."},
}

router = APIRouter(default_response_class=Response)
TheService = Annotated[Service, Depends(service_of)]
Codebooks = Annotated[int | None, Query(description="The first that many codebooks, or all.")]


class TooMuchError(ValueError):
    """Audio that is longer, or has more channels, than is accepted."""


@router.post("/v1/encode", openapi_extra=_AUDIO_BODY, responses=_REFUSALS)
async def encode(
    request: Request,
    service: TheService,
    n_quantizers: Codebooks = None,
    format: Literal["dac2", "dac1", "npy", "json"] = "dac2",
    normalize_db: Annotated[
        float | Literal["none"], Query(description="Loudness to encode at, in LUFS.")
    ] = -16.0,
) -> Response:
    """Audio to codes: a .dac file, ours (dac2) or the published package's (dac1), .npy or JSON."""
    require(service.codec, "encoder")
    job, level = service.worker.job(), None if normalize_db == "none" else normalize_db
    codec = batched(service.codec, job)

    def work() -> bytes:
        _check_recording(upload.name, service, service.settings.max_seconds)
        file = compress(codec, upload.name, service.chunk_seconds, n_quantizers, level)
        return codes_to_bytes(file, format)

    async with _uploaded(request) as upload:
        body = await job.in_thread(work)
    return Response(body, media_type=CODE_TYPES[format])


@router.post("/v1/decode", openapi_extra=_CODES_BODY, responses=_REFUSALS)
async def decode(
    request: Request,
    service: TheService,
    n_quantizers: Codebooks = None,
    format: Literal["wav", "flac", "ogg"] = "wav",
) -> Response:
    """Codes to audio of the recording's length, rate and level, sent while it is made."""
    require(service.codec, "decoder")
    job = service.worker.job()

    def parse() -> DACFile:
        file = codes_from_bytes(Path(upload.name).read_bytes(), service.codec)
        _check_file(file, service)
        return file if n_quantizers is None else _first_codebooks(file, n_quantizers)

    async with _uploaded(request) as upload:
        file = await anyio.to_thread.run_sync(
            parse, limiter=service.parsers, abandon_on_cancel=True
        )
    blocks = decompressed_blocks(
        batched(service.codec, job), file, chunk_seconds=service.chunk_seconds
    )
    rate = file.sample_rate
    channels = file.channels
    samples = file.original_length
    pieces = audio_to_bytes(blocks, format, rate, channels, samples)
    # What is wrong with the file shows before the answer begins.
    first = await job.in_thread(lambda: next(pieces, None))

    async def answer() -> AsyncIterator[bytes]:
        piece = first
        while piece is not None:
            if piece:
                yield piece
            piece = await job.in_thread(lambda: next(pieces, None))

    headers = {"Content-Length": str(wav_size(channels, samples))} if format == "wav" else {}
    return StreamingResponse(answer(), headers=headers, media_type=AUDIO_TYPES[format])


@router.post("/v1/reconstruct", openapi_extra=_AUDIO_BODY, responses=_REFUSALS)
async def reconstruct(
    request: Request, service: TheService, n_quantizers: Codebooks = None
) -> Response:
    """A clip of up to 60 s through the codec and back, as wav.

    The header X-Dac-Report says, as JSON, what it cost and how near it came: kbps (all channels),
    ratio (to 16-bit PCM), si_sdr (dB) and mel_distance, null where there is none.
    """
    require(service.codec, "encoder", "decoder")
    job = service.worker.job()
    codec = batched(service.codec, job)

    def work() -> tuple[bytes, str]:
        _check_recording(upload.name, service, min(CLIP_SECONDS, service.settings.max_seconds))
        audio, rate = read(upload.name)
        file = compress(codec, (audio, rate), service.chunk_seconds, n_quantizers)
        blocks = decompressed_blocks(codec, file, chunk_seconds=service.chunk_seconds)
        restored = np.concatenate(list(blocks), axis=1)
        wav = b"".join(audio_to_bytes(iter([restored]), "wav", rate, *audio.shape))
        return wav, json.dumps(asdict(quality(file, audio, restored)))

    async with _uploaded(request) as upload:
        body, report = await job.in_thread(work)
    return Response(body, headers={"X-Dac-Report": report}, media_type=AUDIO_TYPES["wav"])


@contextlib.asynccontextmanager
async def _uploaded(request: Request) -> AsyncIterator[IO[bytes]]:
    """The request's body as a file that is gone afterwards; errors name it "audio"."""
    with tempfile.NamedTemporaryFile(prefix="dac-fast-serve-") as file:
        async for piece in request.stream():
            file.write(piece)
        file.flush()
        try:
            yield file
        except AudioError as error:
            raise AudioError(str(error).replace(file.name, "audio")) from error


def _check_recording(path: str, service: Service, most_seconds: float) -> None:
    recording = Recording(path)
    seconds = recording.frames / recording.sample_rate
    if not recording.frames:
        # The file does not say, so it is read as far as is accepted.
        for block in recording.blocks():
            seconds += block.shape[1] / recording.sample_rate
            if seconds > most_seconds + 1:
                break
    _check_size(seconds, recording.channels, service, most_seconds)


def _check_file(file: DACFile, service: Service) -> None:
    codec = service.codec
    seconds = max(file.duration, file.n_frames * codec.hop_length / codec.sample_rate)
    _check_size(seconds, file.channels, service, service.settings.max_seconds)


def _check_size(seconds: float, channels: int, service: Service, most_seconds: float) -> None:
    if seconds > most_seconds + 1:
        raise TooMuchError(f"{seconds:.1f} s of audio; accepted: up to {most_seconds:g} s")
    most = service.settings.max_channels
    if channels > most:
        raise TooMuchError(f"{channels} channels; accepted: up to {most}")


def _first_codebooks(file: DACFile, n_quantizers: int) -> DACFile:
    if not 1 <= n_quantizers <= file.n_codebooks:
        raise ValueError(f"{n_quantizers} codebooks; accepted: 1 to {file.n_codebooks}")
    return replace(file, codes=file.codes[:, :n_quantizers])
