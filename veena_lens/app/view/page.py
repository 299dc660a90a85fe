"""The page around a view: script, style and data in one file that loads nothing."""

from __future__ import annotations

import base64
import zlib
from functools import cache
from html import escape
from pathlib import Path

from veena_lens.app.view.modules import joined

MODULES = Path(__file__).with_name("js")
ENTRY = "hosts.js"
STYLE = Path(__file__).with_name("view.css")
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


@cache
def script() -> str:
    """The view's modules as one."""
    return joined(MODULES, ENTRY)


@cache
def style() -> str:
    """Its style sheet."""
    return STYLE.read_text(encoding="utf-8")


def page_of(payload: bytes, title: str) -> str:
    """A whole page; the data are compressed (zlib) and read by the browser's own decompressor."""
    data = base64.b64encode(zlib.compress(payload, 6)).decode("ascii")
    return PAGE.format(title=escape(title), policy=POLICY, style=style(), script=script(), data=data)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body class="veena-page">
<main id="view" aria-label="{title}"></main>
<noscript>This page draws its maps with a script that lies inside it; allow scripts to see them.</noscript>
<script type="text/plain" id="data">{data}</script>
<script type="module">{script}
openPage(document.getElementById("view"), document.getElementById("data").textContent);
</script>
</body>
</html>
"""
