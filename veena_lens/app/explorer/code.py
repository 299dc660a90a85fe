"""The Python behind a figure: what the page shows beside it, to copy. It runs as it stands."""

from __future__ import annotations

from collections.abc import Sequence

from veena_lens.app.explorer.pictures import Shown

SAMPLE = """from veena_lens.checkpoints.bundle import bundled_pictures


def sample(file):
    return next(p for p in bundled_pictures() if p.file == file).open()
"""


def program(imports: Sequence[str], body: Sequence[str], pictures: Sequence[Shown] = ()) -> str:
    """Imports, the helper that opens sample pictures where some are used, and the lines."""
    lines = sorted(imports)
    text = "\n".join(lines) + "\n"
    if any(p.is_sample for p in pictures):
        head, helper = SAMPLE.split("\n", 1)
        text = "\n".join(sorted([*lines, head])) + "\n" + helper
    return text + "\n" + "\n".join(body) + "\n"


def listed(pictures: Sequence[Shown]) -> str:
    """One picture's expression, or a list of them."""
    return pictures[0].code if len(pictures) == 1 else "[" + ", ".join(p.code for p in pictures) + "]"
