"""Add to the site what its pages need beside themselves; mkdocs calls this during a build.

The colours of code come from Pygments, the notebooks are converted with their kept outputs, and the search index is
written as a script, which works from disk as well.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

# Pygments' style per colour mode of the theme.
STYLES = {"light": "xcode", "dark": "github-dark"}
NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
NOTEBOOK_LINK = re.compile(r"\]\(\.\./notebooks/(\w+)\.ipynb\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the style sheets for code, and a page with figures per notebook."""
    from mkdocs.structure.files import File
    from nbconvert import MarkdownExporter
    from pygments.formatters import HtmlFormatter

    for mode, style in STYLES.items():
        sheet = HtmlFormatter(style=style).get_style_defs(".highlight")
        files.append(File.generated(config, f"css/code-{mode}.css", content=sheet))
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        text, resources = MarkdownExporter().from_filename(str(path), resources={"unique_key": path.stem})
        text = re.sub(r"\n{4,}", "\n\n", text.replace("![png]", "![Figure]"))
        title, rest = text.split("\n\n", 1)
        text = f"{title}\n\n*The notebook `notebooks/{path.name}`, with what it shows when it is run.*\n\n{rest}"
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, figure in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=figure))
    return files


def on_page_markdown(markdown: str, **event: object) -> str:
    """Let a link to a notebook lead to its page."""
    return NOTEBOOK_LINK.sub(r"](notebooks/\1.md)", markdown)


def on_post_build(config: Any) -> None:
    """Write the search index as search/index.js: the sections, each with the title of its page."""
    folder = Path(config.site_dir) / "search"
    entries = json.loads((folder / "search_index.json").read_text("utf-8"))["docs"]
    titles = {entry["location"]: entry["title"] for entry in entries if "#" not in entry["location"]}
    sections = [e | {"page": titles[e["location"].split("#")[0]]} for e in entries if "#" in e["location"]]
    (folder / "index.js").write_text(f"window.search_sections = {json.dumps(sections)};\n", encoding="utf-8")
    (folder / "search_index.json").unlink()
