"""What the documentation site shows that lies outside of docs/, and the links to it.

Pages link to files of the repository, as GitHub wants it. Here these links become the site's own.
"""

import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Files of the repository, and their places in the site.
PLACES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "NOTICE": "NOTICE.txt",
} | {
    f"bench/results/{path.name}": f"benchmarks/{path.name}"
    for path in (ROOT / "bench/results").iterdir()
    if path.suffix in (".md", ".png")
}
ORIGINS = {place: origin for origin, place in PLACES.items()}
# Prints all help texts as a page.
COMMAND_LINE = ("typer", "dac_fast.cli.commands", "utils", "docs", "--name", "dac-fast")


class Sections(griffe.Extension):
    """Parts the sections of docstrings by empty lines, without which they are not found."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object that has been read."""
        if obj.docstring:
            heading = r"\n(Args|Attributes|Returns|Raises):\n"
            obj.docstring.value = re.sub(heading, r"\n\n\1:\n", obj.docstring.value)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs: adds the files that lie elsewhere."""
    for origin, place in PLACES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / origin)))
    help_texts = subprocess.run(
        [sys.executable, "-m", *COMMAND_LINE], capture_output=True, text=True, check=True
    ).stdout
    files.append(File.generated(config, "reference/cli.md", content=help_texts))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Called by mkdocs: turns links between files of the repository into links between pages."""
    here = page.file.src_uri
    folder = posixpath.dirname(ORIGINS.get(here, f"docs/{here}"))

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        place = PLACES.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(place, posixpath.dirname(here) or '.')}"

    return re.sub(r"\]\((?!\w+:)([^)#]+)", link, markdown)
