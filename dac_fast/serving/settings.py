"""How a server behaves: its limits, its batches, its streams."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Bytes of a message of a stream.
MOST_BYTES = 1 << 18


class Settings(BaseModel):
    """The limits of a server. A value out of range raises a ValueError that names it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # What clients must send as `Authorization: Bearer TOKEN`; None: nothing.
    token: Annotated[str | None, Field(min_length=1, repr=False)] = None

    # Requests that are accepted at once, waiting ones included; others get 429.
    max_requests: Annotated[int, Field(ge=1)] = 64
    # The body of a request; more gets 413.
    max_body_mib: Annotated[float, Field(gt=0)] = 64.0
    # Audio of one request, per channel, and its channels; more gets 413.
    max_seconds: Annotated[float, Field(gt=0)] = 600.0
    max_channels: Annotated[int, Field(ge=1)] = 8
    # Streams at once in each direction; others are closed with code 1013.
    slots: Annotated[int, Field(ge=1)] = 64
    # Connections at once; others get 503.
    max_connections: Annotated[int, Field(ge=1)] = 1000

    # A client that neither sends nor takes anything for that long is dropped.
    idle_seconds: Annotated[float, Field(gt=0)] = 30.0
    # For a request, from its first byte to the last one of its answer.
    total_seconds: Annotated[float, Field(gt=0)] = 300.0
    # For a stream, from its beginning to its end.
    stream_seconds: Annotated[float, Field(gt=0)] = 3600.0
    # After SIGTERM, for what has been accepted.
    grace_seconds: Annotated[float, Field(ge=0)] = 30.0

    # A call that could share a batch waits that long for others.
    max_wait_ms: Annotated[float, Field(ge=0)] = 2.0
    # Audio of one batch, padding included; a longer call runs by itself. Default: 2 on a CPU, where
    # only short calls gain by company, 60 on a GPU.
    max_batch_seconds: Annotated[float | None, Field(ge=0)] = None
    # Frames of all streams that a step computes, added up; 1: each stream by itself. Default: 64 on
    # a CPU, where more at once are no quicker, all of them on a GPU.
    step_frames: Annotated[int | None, Field(ge=1)] = None
    # Audio of a long request that is computed at once. Default: 1 on a CPU, where a stream's next
    # step waits no longer than that takes, 10 on a GPU.
    chunk_seconds: Annotated[float | None, Field(gt=0)] = None
