"""The pages to hear the codec by. Each is one HTML document.

`listen.html` and what it is put together from is plain HTML, CSS and JavaScript: no build, no
library, nothing from elsewhere.
"""

import json
from collections.abc import Iterable, Mapping
from importlib import resources

# The later ones use the earlier ones.
_LISTENING = ("pictures.js", "player.js", "abx.js", "wav.js", "server.js", "live.js", "page.js")
_BROWSER = ("pictures.js", "wav.js", "dac2.js", "stream.js", "browser.js")


def listening(report: Mapping[str, object] | None = None) -> str:
    """The page of `dac-fast serve`; or, with a report, a page that needs no server or other file.

    Args:
        report: "model" (its "name" and "sample_rate") and "clips", each with "name", "original" (a
            data URL of audio) and "versions": "codebooks", "kbps", "ratio", "si_sdr",
            "mel_distance" (the last two may be None) and "audio" (a data URL).
    """
    html = _put_together("listen.html", _LISTENING)
    return html if report is None else html.replace("<!-- report -->", _data("report", report))


def browser(model: Mapping[str, object]) -> str:
    """The page that runs the codec by itself, with the models and ONNX Runtime beside it.

    Args:
        model: "name", "sample_rate", "hop_length", "n_codebooks", "codebook_size", and for
            "encoder" and "decoder" what `stream.js` wants to know, with the model's "file".
    """
    html = _put_together("browser.html", _BROWSER)
    return html.replace("<!-- model -->", _data("model", model))


def reference() -> str:
    """The page that shows a server's endpoints, by its `openapi.json`."""
    return _put_together("reference.html", ())


def _put_together(name: str, scripts: Iterable[str]) -> str:
    html = _read(name).replace("<!-- style -->", f"<style>\n{_read('listen.css')}</style>")
    elements = "\n".join(f"<script>\n{_read(script)}</script>" for script in scripts)
    return html.replace("<!-- script -->", elements)


def _data(name: str, content: Mapping[str, object]) -> str:
    # No text of the content can end the element that it stands in.
    data = json.dumps(content).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{data}</script>'


def _read(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
