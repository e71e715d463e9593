"""The page of `export --page` in a real browser: its audio and codes are those of Python.

Run by hand, since CI has no npm package: `npm pack onnxruntime-web`, unpack it, and name its folder
in ONNXRUNTIME_WEB.
"""

import functools
import http.server
import io
import os
import shutil
import threading

import numpy as np
import pytest
import soundfile
import torch
from served import noise, small_codec

from dac_fast.cli import commands

CHROMIUM = shutil.which("chromium")
PACKAGE = os.environ.get("ONNXRUNTIME_WEB")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytest.importorskip("onnxscript", reason="needs onnxscript")
if not CHROMIUM:
    pytest.skip("needs chromium on PATH", allow_module_level=True)
if not PACKAGE:
    pytest.skip("needs the npm package onnxruntime-web", allow_module_level=True)
SLOW = 60_000  # ms


@pytest.fixture(scope="module")
def codec():
    return small_codec()


@pytest.fixture(scope="module")
def address(codec, tmp_path_factory):
    """Where the page is served."""
    folder = tmp_path_factory.mktemp("page")
    codec.save(folder / "small.safetensors")
    command = ["export", folder / "site", "-m", folder / "small.safetensors"]
    command += ["--format", "onnx-streaming", "--page", PACKAGE]
    commands.app([str(part) for part in command], standalone_mode=False)
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(folder / "site")
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def tab(address):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1000, "height": 800})
        tab.goto(address)
        playwright.expect(tab.locator("#choose")).to_be_enabled(timeout=SLOW)
        yield tab
        browser.close()


def give(tab, name, data):
    payload = {"name": name, "mimeType": "application/octet-stream", "buffer": data}
    tab.locator("#file").set_input_files(payload)
    playwright.expect(tab.locator("#status")).to_have_text(name, timeout=SLOW)


def test_files_in_the_browser(tab, codec):
    samples = noise(1.3, channels=2)
    file = codec.compress((samples, 8000))
    give(tab, "noise.dac", file.to_bytes())
    heard = np.array(tab.evaluate("last.channels.map((channel) => Array.from(channel))"))
    np.testing.assert_allclose(heard, codec.decompress(file)[0], rtol=0, atol=1e-5)

    wav = io.BytesIO()
    soundfile.write(wav, samples.T, 8000, format="WAV", subtype="FLOAT")
    give(tab, "noise.wav", wav.getvalue())
    playwright.expect(tab.locator("#kbps")).to_have_text("24.00 kbit/s")
    codes = np.array(tab.evaluate("Array.from(last.codes.data, Number)"))
    expected = codec.encode(torch.from_numpy(samples)[:, None]).codes
    assert np.array_equal(codes.reshape(expected.shape), expected)
    heard = np.array(tab.evaluate("last.channels.map((channel) => Array.from(channel))"))
    restored = codec.decode_codes(expected)[:, 0, : samples.shape[1]]
    np.testing.assert_allclose(heard, restored.detach(), rtol=0, atol=1e-5)
    if folder := os.environ.get("SHOTS"):
        tab.screenshot(path=f"{folder}/browser.png")

    other = bytearray(file.to_bytes())
    other[70] ^= 1
    tab.locator("#file").set_input_files(
        {"name": "bad.dac", "mimeType": "application/octet-stream", "buffer": bytes(other)}
    )
    playwright.expect(tab.locator("#message")).to_have_text(
        "bad.dac cannot be decoded here: it is damaged."
    )
