"""The application that serves a codec by HTTP and WebSocket: `create_app`."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response

import dac_fast
from dac_fast import page
from dac_fast.codec import DAC
from dac_fast.model.halves import MissingPartError
from dac_fast.serving import endpoints, sockets
from dac_fast.serving.limits import Gate
from dac_fast.serving.service import Service, service_of
from dac_fast.serving.settings import Settings
from dac_fast.version import __version__

# The pages bring their own scripts and styles, and talk to this server alone.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline' blob:; "
    "style-src 'unsafe-inline'; img-src data:; media-src data: blob:; connect-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}

EXAMPLE = Path(dac_fast.__file__).parent / "assets" / "tabla_cc0.flac"

router = APIRouter()


def create_app(codec: DAC, settings: Settings | None = None) -> FastAPI:
    """The application; its `state.service` is the `Service`.

    Args:
        codec: the `DAC`, in eval mode, folded or optimized; nobody else uses it from now on.
        settings: limits and batches.
    """
    service = Service(codec, settings or Settings())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        service.draining = True
        await anyio.to_thread.run_sync(service.worker.stop)

    app = FastAPI(
        title="dac-fast",
        version=__version__,
        description=sockets.__doc__ or "",
        lifespan=lifespan,
        # FastAPI's own pages load scripts from elsewhere; `/docs` here does not.
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(Gate, service=service)
    app.add_exception_handler(ValueError, _bad_input)
    app.add_exception_handler(RequestValidationError, _bad_option)
    for routes in (router, endpoints.router, sockets.router):
        app.include_router(routes)
    return app


async def _bad_input(request: Request, error: Exception) -> JSONResponse:
    statuses: dict[type[Exception], int] = {endpoints.TooMuchError: 413, MissingPartError: 501}
    status = statuses.get(type(error), 400)
    return JSONResponse({"detail": " ".join(str(error).split())}, status)


async def _bad_option(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    refused = [f"{one['loc'][-1]} is {one['input']!r}: {one['msg']}" for one in error.errors()]
    return JSONResponse({"detail": "; ".join(refused)}, 422)


@router.get("/v1/models")
async def models(service: Annotated[Service, Depends(service_of)]) -> dict[str, Any]:
    """The model that is served, and the limits."""
    codec, settings = service.codec, service.settings
    model = {
        "name": codec.name or "custom",
        "sample_rate": codec.sample_rate,
        "hop_length": codec.hop_length,
        "n_codebooks": codec.config.n_codebooks,
        "codebook_size": codec.config.codebook_size,
        "kbps": codec.config.bitrate / 1000,
        "parts": codec.parts,
        "device": str(next(codec.parameters()).device),
        "precision": codec.engine.precision if codec.engine else "fp32",
        "look_ahead": {
            direction: pool.look_ahead for direction, pool in service.worker.pools.items()
        },
    }
    limits = settings.model_dump(exclude={"token"}) | {"clip_seconds": endpoints.CLIP_SECONDS}
    return {"models": [model], "limits": limits}


@router.get("/healthz")
async def healthz(service: Annotated[Service, Depends(service_of)]) -> JSONResponse:
    """Whether the process is as it should be."""
    alive = service.worker.alive
    return JSONResponse({"alive": alive}, 200 if alive else 503)


@router.get("/readyz")
async def readyz(service: Annotated[Service, Depends(service_of)]) -> JSONResponse:
    """Whether new work is welcome, which it is not while the server ends."""
    return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)


@router.get("/metrics", response_class=Response)
async def metrics(service: Annotated[Service, Depends(service_of)]) -> Response:
    """Counts and times in Prometheus's text format."""
    return Response(service.telemetry.exposition(), media_type="text/plain; version=0.0.4")


@router.get("/", include_in_schema=False)
async def listen() -> HTMLResponse:
    """The page to hear the codec by."""
    return HTMLResponse(page.listening(), headers=_PAGE_HEADERS)


@router.get("/example.flac", include_in_schema=False)
async def example() -> FileResponse:
    """A recording that the page offers."""
    return FileResponse(EXAMPLE, media_type="audio/flac")


@router.get("/docs", include_in_schema=False)
async def docs() -> HTMLResponse:
    """The page that shows `/openapi.json`."""
    return HTMLResponse(page.reference(), headers=_PAGE_HEADERS)
