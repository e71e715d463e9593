"""The server's application on a cluster, as a Ray Serve deployment.

In a Serve configuration (docs/serving.md has one), `import_path` is
`dac_fast.serving.deployment:build`, and `args` are `Arguments`. Ray's proxy listens in place of
`dac-fast serve`: it has the limits of connections, and lets a replica finish what it has accepted.
"""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from dac_fast.serving.app import create_app
from dac_fast.serving.service import prepared
from dac_fast.serving.settings import Settings


class Arguments(BaseModel):
    """What a deployment is made from. A value out of range raises a ValueError that names it."""

    model_config = ConfigDict(extra="forbid")

    # A preset, or the path of a checkpoint that every node has.
    model: str = "tiny"
    # "encoder" or "decoder": that half alone.
    parts: str | None = None
    # "cuda" where a replica has a GPU.
    device: str = "cpu"
    precision: str | None = None
    # Items and frames, see `DAC.optimize`.
    shapes: list[tuple[int, int]] = []
    # Of the model on a CPU.
    threads: int = 1
    settings: Settings = Settings()


def build(arguments: dict[str, Any]) -> Application:
    """The application of Ray Serve, whose one deployment is called "codec"."""
    checked = Arguments(**arguments)
    settings = checked.settings
    deploy = serve.deployment(
        name="codec",
        # What a replica refuses for itself does not wait in Ray's queue.
        max_ongoing_requests=settings.max_requests + 2 * settings.slots + 16,
        graceful_shutdown_timeout_s=settings.grace_seconds,
    )
    application: Application = deploy(serve.ingress(_application(checked))()).bind()
    return application


def _application(arguments: Arguments) -> Callable[[], ASGIApp]:
    def application() -> ASGIApp:
        """Called in every replica."""
        torch.set_num_threads(arguments.threads)
        device = torch.device(arguments.device)
        codec = prepared(
            arguments.model, device, arguments.precision, arguments.shapes, arguments.parts
        )
        return create_app(codec, arguments.settings)

    return application
