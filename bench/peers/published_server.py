"""The published package behind FastAPI: python published_server.py CHECKPOINT PORT THREADS.

Nothing of this repository is needed, but FastAPI, uvicorn and websockets beside the package. It
speaks what `bench.serving` asks: `.npy` codes and wav files by HTTP, streams of codes by WebSocket.
Everything is computed one after the other. A stream is decoded with as many frames to either side
as the decoder sees, since the package keeps no state.
"""

import asyncio
import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dac
import numpy as np
import soundfile
import torch
import uvicorn
from fastapi import FastAPI, Request, Response, WebSocket

# Frames to either side of one that its audio depends on.
CONTEXT = 10

app = FastAPI()
model: Any = None
# One thread, so that requests take turns.
turn = ThreadPoolExecutor(1)


async def in_turn(function: Any, *args: Any) -> Any:
    """What the function returns, called when its turn comes."""
    return await asyncio.get_running_loop().run_in_executor(turn, function, *args)


@torch.inference_mode()
def decoded(codes: np.ndarray) -> np.ndarray:
    """Codes [N, F] to samples [F hop]."""
    z = model.quantizer.from_codes(torch.from_numpy(codes.astype(np.int64))[None])[0]
    audio: np.ndarray = model.decode(z)[0, 0].numpy()
    return audio


@torch.inference_mode()
def encoded(wav: bytes) -> bytes:
    """A wav file at the model's rate to a `.npy` file of codes [1, N, F]."""
    audio, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    codes = model.encode(model.preprocess(torch.from_numpy(audio)[None, None], rate))[1]
    body = io.BytesIO()
    np.save(body, codes.numpy().astype(np.uint16))
    return body.getvalue()


def restored(npy: bytes) -> bytes:
    """A `.npy` file of codes [1, N, F] to a wav file."""
    body = io.BytesIO()
    audio = decoded(np.load(io.BytesIO(npy))[0])
    soundfile.write(body, audio, model.sample_rate, "PCM_16", format="WAV")
    return body.getvalue()


@app.get("/readyz")
async def readyz() -> dict[str, bool]:
    """The model is loaded before anything is served."""
    return {"ready": True}


@app.post("/v1/encode")
async def encode(request: Request) -> Response:
    """Audio to codes."""
    return Response(await in_turn(encoded, await request.body()))


@app.post("/v1/decode")
async def decode(request: Request) -> Response:
    """Codes to audio."""
    return Response(await in_turn(restored, await request.body()))


@app.websocket("/v1/decode/stream")
async def decode_stream(socket: WebSocket) -> None:
    """Frames of codes in, samples out."""
    await socket.accept()
    stages = json.loads(await socket.receive_text())["n_quantizers"] or model.n_codebooks
    header = {"sample_rate": model.sample_rate, "hop_length": int(model.hop_length)}
    await socket.send_json(
        header | {"n_quantizers": stages, "look_ahead": CONTEXT * int(model.hop_length)}
    )
    codes, sent = np.zeros((stages, 0), np.uint16), 0
    while (message := await socket.receive())["type"] != "websocket.disconnect":
        data = message.get("bytes")
        if data is not None:
            more = np.frombuffer(data, "<u2").reshape(-1, stages).T
            codes = np.concatenate([codes, more], axis=1)
        until = codes.shape[1] - (CONTEXT if data is not None else 0)
        if until > sent:
            first = max(sent - CONTEXT, 0)
            audio = await in_turn(decoded, codes[:, first : until + CONTEXT])
            hop = int(model.hop_length)
            await socket.send_bytes(audio[(sent - first) * hop : (until - first) * hop].tobytes())
            sent = until
        if data is None:
            await socket.close()
            return


if __name__ == "__main__":
    checkpoint, port, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = dac.DAC.load(checkpoint).eval()
    decoded(np.zeros((model.n_codebooks, 40), np.uint16))
    uvicorn.run(app, port=int(port), log_level="warning", ws_per_message_deflate=False)
