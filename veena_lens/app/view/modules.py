"""Several ES modules as one: what a page, a notebook and a server hand out is a single text without imports.

The modules import each other by name, so a browser, an editor or `node --check` reads them as they lie. Joined, each
follows those that it imports, imports between them fall away, and only the entry's exports stay.
"""

from __future__ import annotations

import re
from pathlib import Path

IMPORT = re.compile(r'^import \{([^}]*)\} from "\./([\w.-]+)";\n', re.MULTILINE)
KINDS = "(?:async )?(?:function|class|const|let)"
EXPORT = re.compile(rf"^export (?={KINDS} )", re.MULTILINE)
EXPORTED = re.compile(rf"^export {KINDS} ([\w$]+)", re.MULTILINE)
TOP_LEVEL = re.compile(rf"^(?:export )?{KINDS} ([\w$]+)", re.MULTILINE)


def joined(folder: Path, entry: str) -> str:
    """The text of `entry` behind that of every module that it needs.

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
