"""What a server counts, as Prometheus reads it at `/metrics`."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Seconds: a stream's step takes milliseconds, a long request minutes.
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Telemetry:
    """The metrics of one server, in a registry of their own.

    The label `direction` is "encode" or "decode".
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        direction = ("direction",)
        self.requests = Counter(
            "dac_requests", "Requests that were answered.", ("route", "status"), registry=registry
        )
        self.request_seconds = Histogram(
            "dac_request_seconds",
            "From a request's beginning to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.phase_seconds = Histogram(
            "dac_phase_seconds",
            "Parts of a request: its body's arrival (receive), each call's wait for the model "
            "(wait), and its time in the model (model).",
            ("phase",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_items = Histogram(
            "dac_batch_items", "Calls in a batch.", direction, buckets=_ITEMS, registry=registry
        )
        self.audio_seconds = Counter(
            "dac_audio_seconds", "Audio that requests had computed.", direction, registry=registry
        )
        self.streams = Gauge("dac_streams", "Streams now.", direction, registry=registry)
        self.streams_ended = Counter(
            "dac_streams_ended",
            "Streams by the code that closed them.",
            ("direction", "code"),
            registry=registry,
        )
        self.step_streams = Histogram(
            "dac_step_streams", "Streams in a step.", direction, buckets=_ITEMS, registry=registry
        )
        self.step_seconds = Histogram(
            "dac_step_seconds",
            "Time in the model of one step of all streams that had something ready.",
            direction,
            buckets=_SECONDS,
            registry=registry,
        )
        self.stream_seconds = Histogram(
            "dac_stream_seconds",
            "From the arrival of a stream's frames to what came of them.",
            direction,
            buckets=_SECONDS,
            registry=registry,
        )

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A gauge whose value is asked for whenever the metrics are read."""
        Gauge(name, about, registry=self.registry).set_function(value)

    def exposition(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self.registry)
