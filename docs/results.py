"""Print the embedded checkpoint's results as a table, from the file that its evaluation wrote beside the card."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "veena_lens/checkpoints/bundled/tiny-llava-emotion/results.json"
Row = tuple[str, dict[str, Any]]


def rows(results: dict[str, Any]) -> Iterator[Row]:
    """What was asked, and the share of right answers with its interval."""
    alone = results["picture alone"]
    weakest = min(alone["by emotion"], key=lambda emotion: alone["by emotion"][emotion]["value"])
    yield "names the emotion, people never seen", alone["all"]
    yield "the same, clear expressions", alone["clear"]
    yield "the same, subtle expressions", alone["subtle"]
    yield f"the same, weakest emotion ({weakest})", alone["by emotion"][weakest]
    yield "hair, glasses, beard, background, parts of the face", results["attributes"]["all"]
    yield "caption names the emotion", results["tasks"]["caption"]["emotion right"]
    for how in ("weak", "plain", "strong", "plain, held-out sentences"):
        table = results["contexts"][f"conflict, {how}"]
        yield f"sentence against the picture ({how}): follows the picture", table["picture"]
    for name, table in results.get("styles", {}).items():
        yield f"drawn in the style {name}{', never seen' if table['held out'] else ''}", table["all"]
    if "emoji" in results:
        yield "emoji, never seen", results["emoji"]["all"]


def main() -> None:
    if not RESULTS.exists():
        print("(no results yet: `python -m veena_lens.zoo.evaluate` writes them)")
        return
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    print("| asked of test pictures | right | 95 % interval | answers |\n|---|---|---|---|")
    for what, share in rows(results):
        value, low, high = (f"{100 * share[key]:.1f} %" for key in ("value", "low", "high"))
        print(f"| {what} | {value} | {low} to {high} | {share['count']} |")
    text = results["contexts"]["conflict, plain"]
    print(
        f"\nIn plain conflicts the answer follows the sentence in {100 * text['text']['value']:.1f} % "
        f"(standard deviation over {results['draws']} draws: {100 * text['text deviation']:.1f} points). "
        f"{results['identities']} identities, none of them seen in training."
    )


if __name__ == "__main__":
    main()
