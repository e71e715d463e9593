"""The codec as a service (`dac-fast serve`), and its client.

HTTP requests are in `endpoints`, WebSocket streams in `sockets`; both hand their work to the thread
of `worker`, which owns the codec and computes in batches (`batching`, `streams`). `limits` is the
gate that requests pass, `server` the process, `deployment` the same on a Ray cluster.
"""

from dac_fast.serving.client import AsyncClient, Client, ServerError, Stream

__all__ = ["AsyncClient", "Client", "ServerError", "Stream"]
