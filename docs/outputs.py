"""Keep what the code of a page prints, and the pictures that it saves, beside the code: `python docs/outputs.py`.

On the pages named here a block of text right after a block of Python is what that block prints, and a picture of the
page that its code saves under the same name is that one. The tests compare both with what they get.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
PAGES = ("quickstart.md", "recipes.md")
# A block of Python, and the block of text that says what it prints.
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?P<shown>\n```text\n(?P<text>.*?)^```\n)?", re.DOTALL | re.MULTILINE
)
PICTURE = re.compile(r"!\[[^\]]+\]\(([\w-]+\.png)\)")
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


def differences(kept: str, now: str, relative: float = 0.01, absolute: float = 0.005) -> list[str]:
    """Return the lines that differ: in words, or in a number by more than the tolerances allow."""
    old, new = kept.rstrip().splitlines(), now.rstrip().splitlines()
    if len(old) != len(new):
        return [f"{len(old)} lines are kept, {len(new)} are printed now"]

    def same(a: str, b: str) -> bool:
        if [word.split() for word in NUMBER.split(a)] != [word.split() for word in NUMBER.split(b)]:
            return False
        pairs = zip(*([float(x.replace(",", "")) for x in NUMBER.findall(line)] for line in (a, b)), strict=True)
        return all(abs(x - y) <= max(absolute, relative * abs(x)) for x, y in pairs)

    return [f"kept {a!r}, now {b!r}" for a, b in zip(old, new, strict=True) if not same(a, b)]


def run(page: Path) -> list[str]:
    """Run the code of a page from top to bottom in the current folder, and return what each block prints."""
    text, names, printed = page.read_text("utf-8"), {"__name__": "__page__"}, []
    for block in BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 1
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("\n" * line + block["code"], str(page), "exec"), names)  # line numbers as in the page
        printed.append("".join(f"{part.rstrip()}\n" for part in out.getvalue().splitlines()))
    return printed


def filled(text: str, printed: list[str]) -> str:
    """Return the text of a page with what its blocks print."""
    kept = iter(printed)

    def fill(block: re.Match[str]) -> str:
        said = next(kept)
        return f"```python\n{block['code']}```\n" + (f"\n```text\n{said}```\n" if said.strip() else "")

    return BLOCK.sub(fill, text)


def refresh(page: Path) -> list[Path]:
    """Renew one page and its pictures, and return what was written."""
    text, before = page.read_text("utf-8"), Path.cwd()
    with tempfile.TemporaryDirectory() as away:
        os.chdir(away)
        try:
            page.write_text(filled(text, run(page)), encoding="utf-8")
        finally:
            os.chdir(before)
        made = [Path(away) / name for name in PICTURE.findall(text)]
        return [page, *(Path(shutil.copy(path, FOLDER)) for path in made if path.exists())]


if __name__ == "__main__":
    for name in PAGES:
        print(*refresh(FOLDER / name), sep="\n")
