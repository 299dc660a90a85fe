"""Refill the generated parts of README.md and docs/*.md with the output of their commands.

A part is enclosed by `<!-- fill: COMMAND -->` and `<!-- /fill -->`; `python COMMAND` prints it, so that a reader sees
where a table comes from and can reproduce it. `--check` changes nothing and fails if a part is stale.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PART = re.compile(r"(<!-- fill: (?P<command>[^\n]*?) -->\n)(?P<text>.*?)(<!-- /fill -->)", re.DOTALL)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """Return `text` with every generated part refilled."""

    def fill(part: re.Match[str]) -> str:
        command = [sys.executable, *shlex.split(part["command"])]
        output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        return f"{part[1]}\n{output.strip()}\n\n{part[4]}"

    return PART.sub(fill, text)


def main() -> int:
    old = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            old.append(page.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv:
                page.write_text(new, encoding="utf-8")
    if old:
        print(("stale: " if "--check" in sys.argv else "refilled: ") + ", ".join(old))
    return int(bool(old) and "--check" in sys.argv)


if __name__ == "__main__":
    raise SystemExit(main())
