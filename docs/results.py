"""Print the results of the embedded checkpoints in one table, from the files next to their model cards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUNDLED = Path(__file__).parent.parent / "veena_lens/checkpoints/bundled"
Row = tuple[str, dict[str, Any]]


def rows(results: dict[str, Any]) -> Iterator[Row]:
    """Yield each question and the share of correct answers with its interval."""
    alone = results["picture alone"]
    yield "names the emotion, unseen people", alone["all"]
    yield "the same, clear expressions", alone["clear"]
    yield "the same, subtle expressions", alone["subtle"]
    yield "the same, weakest emotion", alone["by emotion"][weakest(results)]
    yield "hair, glasses, beard, background, parts of the face", results["attributes"]["all"]
    yield "caption names the emotion", results["tasks"]["caption"]["emotion right"]
    for how in ("weak", "plain", "strong", "plain, held-out sentences"):
        table = results["contexts"][f"conflict, {how}"]
        yield f"sentence contradicts the image ({how}): answer follows the image", table["picture"]
    for name, table in results.get("styles", {}).items():
        yield f"drawn in the style {name}{', unseen' if table['held out'] else ''}", table["all"]
    if "emoji" in results:
        yield "emoji, unseen", results["emoji"]["all"]


def weakest(results: dict[str, Any]) -> str:
    """Return the emotion recognised least often from the image alone."""
    by_emotion = results["picture alone"]["by emotion"]
    return min(by_emotion, key=lambda emotion: by_emotion[emotion]["value"])


def cell(share: dict[str, Any]) -> str:
    value, low, high = (f"{100 * share[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} % ({low} to {high})"


def conflicts(name: str, results: dict[str, Any]) -> str:
    """Describe how often the text wins in plain conflicts, and how much that varies between draws."""
    plain = results["contexts"]["conflict, plain"]
    return (
        f"`{name}` follows the sentence in {100 * plain['text']['value']:.1f} % of plain conflicts "
        f"(standard deviation over {results['draws']} draws: {100 * plain['text deviation']:.1f} points); "
        f"its weakest emotion is {weakest(results)}."
    )


def main() -> None:
    found = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(BUNDLED.glob("*/results.json"))
    }
    if not found:
        print("(no results yet: run `python -m veena_lens.zoo.evaluate`)")
        return
    print(f"| question about test images | {' | '.join(f'`{name}`' for name in found)} | answers |")
    print(f"|---|{'---|' * len(found)}---|")
    for row in zip(*(rows(results) for results in found.values()), strict=True):
        print(f"| {row[0][0]} | {' | '.join(cell(share) for _, share in row)} | {row[0][1]['count']} |")
    people = next(iter(found.values()))["identities"]
    print(f"\nShares of correct answers with 95 % intervals; {people} identities, none of them seen in training.")
    print(" ".join(conflicts(name, results) for name, results in found.items()))


if __name__ == "__main__":
    main()
