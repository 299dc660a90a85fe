"""Add to the site what its pages need beside themselves; mkdocs calls this during a build.

The colours of code come from Pygments, and the search index is written as a script, which works from disk as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Pygments' style per colour mode of the theme.
STYLES = {"light": "xcode", "dark": "github-dark"}


def on_files(files: Any, config: Any) -> Any:
    """Add the style sheets for code."""
    from mkdocs.structure.files import File
    from pygments.formatters import HtmlFormatter

    for mode, style in STYLES.items():
        sheet = HtmlFormatter(style=style).get_style_defs(".highlight")
        files.append(File.generated(config, f"css/code-{mode}.css", content=sheet))
    return files


def on_post_build(config: Any) -> None:
    """Write the search index as search/index.js: the sections, each with the title of its page."""
    folder = Path(config.site_dir) / "search"
    entries = json.loads((folder / "search_index.json").read_text("utf-8"))["docs"]
    titles = {entry["location"]: entry["title"] for entry in entries if "#" not in entry["location"]}
    sections = [e | {"page": titles[e["location"].split("#")[0]]} for e in entries if "#" in e["location"]]
    (folder / "index.js").write_text(f"window.search_sections = {json.dumps(sections)};\n", encoding="utf-8")
    (folder / "search_index.json").unlink()
