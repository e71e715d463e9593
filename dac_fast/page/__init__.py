"""The pages to hear the codec by. Each is one HTML document that needs nothing beside it.

`listen.html` and what it is put together from is plain HTML, CSS and JavaScript: no build, no
library, nothing from elsewhere.
"""

import json
from collections.abc import Mapping
from importlib import resources

# The later ones use the earlier ones.
_SCRIPTS = ("pictures.js", "player.js", "abx.js", "server.js", "live.js", "page.js")


def listening(report: Mapping[str, object] | None = None) -> str:
    """The page of `dac-fast serve`; or, with a report, a page that needs no server.

    Args:
        report: "model" (its "name" and "sample_rate") and "clips", each with "name", "original" (a
            data URL of audio) and "versions": "codebooks", "kbps", "ratio", "si_sdr",
            "mel_distance" (the last two may be None) and "audio" (a data URL).
    """
    html = _read("listen.html")
    html = html.replace("<!-- style -->", f"<style>\n{_read('listen.css')}</style>")
    if report is not None:
        # No text of a report can end the element that it stands in.
        data = json.dumps(report).replace("<", "\\u003c")
        element = f'<script type="application/json" id="report">{data}</script>'
        html = html.replace("<!-- report -->", element)
    scripts = "\n".join(f"<script>\n{_read(name)}</script>" for name in _SCRIPTS)
    return html.replace("<!-- script -->", scripts)


def reference() -> str:
    """The page that shows a server's endpoints, by its `openapi.json`."""
    html = _read("reference.html")
    return html.replace("<!-- style -->", f"<style>\n{_read('listen.css')}</style>")


def _read(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
