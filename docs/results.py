"""Print the embedded checkpoints' results in one table, from the files that their evaluation wrote beside the cards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUNDLED = Path(__file__).parent.parent / "veena_lens/checkpoints/bundled"
Row = tuple[str, dict[str, Any]]


def rows(results: dict[str, Any]) -> Iterator[Row]:
    """What was asked, and the share of right answers with its interval."""
    alone = results["picture alone"]
    yield "names the emotion, people never seen", alone["all"]
    yield "the same, clear expressions", alone["clear"]
    yield "the same, subtle expressions", alone["subtle"]
    yield "the same, weakest emotion", alone["by emotion"][weakest(results)]
    yield "hair, glasses, beard, background, parts of the face", results["attributes"]["all"]
    yield "caption names the emotion", results["tasks"]["caption"]["emotion right"]
    for how in ("weak", "plain", "strong", "plain, held-out sentences"):
        table = results["contexts"][f"conflict, {how}"]
        yield f"sentence against the picture ({how}): follows the picture", table["picture"]
    for name, table in results.get("styles", {}).items():
        yield f"drawn in the style {name}{', never seen' if table['held out'] else ''}", table["all"]
    if "emoji" in results:
        yield "emoji, never seen", results["emoji"]["all"]


def weakest(results: dict[str, Any]) -> str:
    """The emotion told least often from the picture alone."""
    by_emotion = results["picture alone"]["by emotion"]
    return min(by_emotion, key=lambda emotion: by_emotion[emotion]["value"])


def cell(share: dict[str, Any]) -> str:
    value, low, high = (f"{100 * share[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} % ({low} to {high})"


def conflicts(name: str, results: dict[str, Any]) -> str:
    """In plain conflicts, how often the text wins, and how much that varies between draws."""
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
        print("(no results yet: `python -m veena_lens.zoo.evaluate` writes them)")
        return
    print(f"| asked of test pictures | {' | '.join(f'`{name}`' for name in found)} | answers |")
    print(f"|---|{'---|' * len(found)}---|")
    for row in zip(*(rows(results) for results in found.values()), strict=True):
        print(f"| {row[0][0]} | {' | '.join(cell(share) for _, share in row)} | {row[0][1]['count']} |")
    people = next(iter(found.values()))["identities"]
    print(f"\nRight answers with their 95 % interval; {people} identities, none of them seen in training.")
    print(" ".join(conflicts(name, results) for name, results in found.items()))


if __name__ == "__main__":
    main()
