"""The page around a view: script, style and data in one file that loads nothing.

A page, a notebook and a server hand out the ES modules as one text without imports. The modules import each other by
name, so a browser, an editor or `node --check` reads them separately. Joined, each follows those that it imports,
imports between them fall away, and only the entry's exports stay.
"""

from __future__ import annotations

import base64
import re
import zlib
from functools import cache
from html import escape
from pathlib import Path

IMPORT = re.compile(r'^import \{([^}]*)\} from "\./([\w.-]+)";\n', re.MULTILINE)
KINDS = "(?:async )?(?:function|class|const|let)"
EXPORT = re.compile(rf"^export (?={KINDS} )", re.MULTILINE)
EXPORTED = re.compile(rf"^export {KINDS} ([\w$]+)", re.MULTILINE)
TOP_LEVEL = re.compile(rf"^(?:export )?{KINDS} ([\w$]+)", re.MULTILINE)


def joined(folder: Path, entry: str) -> str:
    """Return the text of `entry` behind that of every module that it needs.

    Raises: ValueError for modules that import each other in a circle, an import of what a module does not export, a
    form of import that is not read here, or a name that two modules define."""
    texts: dict[str, str] = {}
    waiting: list[str] = []

    def take(name: str) -> None:
        if name in texts:
            return
        if name in waiting:
            raise ValueError(f"{' -> '.join([*waiting[waiting.index(name) :], name])}: modules import each other.")
        waiting.append(name)
        text = (folder / name).read_text(encoding="utf-8")
        for names, other in IMPORT.findall(text):
            take(other)
            for wanted in filter(None, (part.strip() for part in names.split(","))):
                if wanted not in EXPORTED.findall(texts[other]):
                    raise ValueError(f"{name} imports {wanted!r}, which {other} does not export by that name.")
        body = IMPORT.sub("", text)
        if re.search(r"^import\b", body, re.MULTILINE):
            raise ValueError(f'{name}: only imports of the form `import {{ a, b }} from "./other.js";` are joined.')
        waiting.pop()
        texts[name] = body

    take(entry)
    owner: dict[str, str] = {}
    for name, text in texts.items():
        for defined in TOP_LEVEL.findall(text):
            if owner.setdefault(defined, name) != name:
                raise ValueError(f"{defined!r} is defined in {owner[defined]} and in {name}; joined they would clash.")
    parts = [text if name == entry else EXPORT.sub("", text) for name, text in texts.items()]
    return "\n".join(part.strip() + "\n" for part in parts)


MODULES = Path(__file__).with_name("js")
ENTRY = "hosts.js"
STYLE = Path(__file__).with_name("view.css")
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


@cache
def script() -> str:
    """Return the view's modules as one."""
    return joined(MODULES, ENTRY)


@cache
def style() -> str:
    """Return its style sheet."""
    return STYLE.read_text(encoding="utf-8")


def page_of(payload: bytes, title: str) -> str:
    """Return a whole page; the data are compressed (zlib) and read by the browser's own decompressor."""
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
<noscript>This page draws its maps with an embedded script; allow scripts to see them.</noscript>
<script type="text/plain" id="data">{data}</script>
<script type="module">{script}
openPage(document.getElementById("view"), document.getElementById("data").textContent);
</script>
</body>
</html>
"""
