"""Ask both small models the same questions and write how they differ: `python -m veena_lens.zoo.compare`.

Each row of the card's tables has at least 600 answers per model, drawn with varying identities, combinations,
backgrounds or questions. A difference is paired, answer by answer; its interval comes from resampling identities.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veena_lens.circuits.statistics import paired_difference
from veena_lens.zoo.captions import EMOTION_TASKS
from veena_lens.zoo.card import write_card
from veena_lens.zoo.evaluate import HELD_OUT_STYLES
from veena_lens.zoo.exam import (
    CONTEXT_TABLES,
    Asker,
    Item,
    attribute_items,
    emoji_items,
    face_items,
    sharp_bank,
    style_items,
    with_context,
)
from veena_lens.zoo.faces import STYLES
from veena_lens.zoo.model import checkpoint_folder
from veena_lens.zoo.people import EMOTIONS, named_emotion

__all__ = ["Asked", "compare", "main", "tables"]

LEAST = 600
# A difference is small if its interval comes within this distance of zero.
MARGIN = 0.03

Measure = Callable[[str, Item], bool]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Hold the questions of one table, the measures of their answers, and the rows that select a part of them."""

    table: str
    items: list[Item]
    measures: Mapping[str, Measure]
    parts: Mapping[str, Callable[[Item], bool]] = field(default_factory=lambda: {"all": lambda item: True})
    max_new_tokens: int = 8


def _tells_the_picture(answer: str, item: Item) -> bool:
    return named_emotion(answer) == item.truth


def _tells_the_text(answer: str, item: Item) -> bool:
    return named_emotion(answer) == item.context_emotion


def _tells_the_attribute(answer: str, item: Item) -> bool:
    return item.truth in answer.rstrip(".").split()


def _one_emotion(answer: str, item: Item) -> bool:
    return len({named_emotion(word) for word in answer.split()} - {None}) == 1


_RIGHT: dict[str, Measure] = {"right": _tells_the_picture}


def _draws(least: int, per_draw: int, draw: Callable[[int], list[Item]]) -> list[Item]:
    """Return enough draws for at least this many questions."""
    return [item for number in range(-(-least // per_draw)) for item in draw(number)]


def tables(split: str, cache: Path, least: int = LEAST, count: int | None = None) -> Iterator[Asked]:
    """Return the questions of every table of the card; held-out styles and emoji are used only for "test"."""
    bank = sharp_bank(split, cache, count)
    size = len(bank.numbers)
    drawn = [face_items(bank, draw) for draw in range(-(-least // (size // len(EMOTIONS))))]
    emotions = {e: (lambda item, e=e: item.truth == e) for e in EMOTIONS}
    yield Asked(
        table="picture alone",
        items=sum(drawn, []),
        measures=_RIGHT,
        parts={
            "all": lambda item: True,
            **emotions,
            "clear faces": lambda item: item.face.clear,
            "subtle faces": lambda item: not item.face.clear,
        },
    )
    for kind, strength, held_out, _ in CONTEXT_TABLES:
        items = _draws(least, size, lambda n, c=(kind, strength, held_out): with_context(drawn[n], n, *c))
        followed = {"picture followed": _tells_the_picture, "text followed": _tells_the_text}
        yield Asked(table=items[0].kind, items=items, measures=followed if kind == "conflict" else _RIGHT)
    items = _draws(least, size, lambda n: attribute_items(drawn[n], n))
    names = {name: (lambda item, name=name: item.kind == name) for name in dict.fromkeys(i.kind for i in items)}
    everything = {"all": lambda item: True}
    yield Asked(table="attributes", items=items, measures={"right": _tells_the_attribute}, parts=everything | names)
    for task in EMOTION_TASKS[1:]:
        items = _draws(least, size, lambda n, task=task: face_items(bank, n, task))
        measures = _RIGHT | {"one emotion throughout": _one_emotion}
        yield Asked(table=task, items=items, measures=measures, max_new_tokens=48)
    for name in STYLES:
        if name == "avataaars" or (name in HELD_OUT_STYLES and split != "test"):
            continue
        chosen = "all" if name in HELD_OUT_STYLES else split
        per_draw = len(style_items(name, chosen))
        items = _draws(least, per_draw, lambda n, c=(name, chosen): style_items(*c, draw=n))
        yield Asked(table=name, items=items, measures=_RIGHT)
    if split == "test":
        yield Asked(table="emoji", items=_draws(least, len(emoji_items()), emoji_items), measures=_RIGHT)


def compare(
    twin: Asker, sibling: Asker, asked: Iterator[Asked], report: Callable[[dict[str, Any]], None] = lambda row: None
) -> list[dict[str, Any]]:
    """Return a row per measure and part: both shares, their paired difference and whether it is small."""
    rows = []
    for each in asked:
        queries = [item.query for item in each.items]
        told = [asker.answers(queries, each.max_new_tokens) for asker in (twin, sibling)]
        for part, belongs in each.parts.items():
            chosen = [i for i, item in enumerate(each.items) if belongs(item)]
            groups = [each.items[i].face.identity for i in chosen]
            for measure, counts in each.measures.items():
                ours, theirs = ([counts(answers[i], each.items[i]) for i in chosen] for answers in told)
                found = paired_difference(ours, theirs, groups)
                row = {
                    "table": each.table,
                    "part": part,
                    "measure": measure,
                    "answers": len(chosen),
                    "twin": sum(ours) / len(ours),
                    "sibling": sum(theirs) / len(theirs),
                    "difference": found.value,
                    "low": found.low,
                    "high": found.high,
                    "verdict": verdict(found.low, found.high),
                }
                report(row)
                rows.append(row)
    return rows


def verdict(low: float, high: float) -> str:
    """Return whether the interval comes within the margin of zero, or else on which side it lies."""
    return "above" if low > MARGIN else "below" if high < -MARGIN else "within"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m veena_lens.zoo.compare", description=__doc__)
    parser.add_argument("--checkpoint", default="tiny-qwen2vl-emotion", help="name or folder")
    parser.add_argument("--sibling", default="tiny-llava-emotion", help="name or folder")
    parser.add_argument("--split", choices=("development", "test"), default="test")
    parser.add_argument("--least", type=int, default=LEAST, help="smallest number of answers per row")
    parser.add_argument("--identities", type=int, help="use only this many identities (default: all)")
    parser.add_argument("--cache", type=Path, default=Path(".cache/zoo/drawings"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    options = parser.parse_args(arguments)
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    folder, sibling = checkpoint_folder(options.checkpoint), checkpoint_folder(options.sibling)
    rows = compare(
        Asker(folder),
        Asker(sibling),
        tables(options.split, options.cache, options.least, options.identities),
        lambda row: print(json.dumps(row), flush=True),
    )
    if options.split == "test":
        kept = {"sibling": sibling.name, "margin": MARGIN, "rows": rows}
        (folder / "comparison.json").write_text(json.dumps(kept, indent=1) + "\n")
        write_card(folder, json.loads((folder / "results.json").read_text()))
        print(f"Wrote {folder / 'comparison.json'} and README.md.")


if __name__ == "__main__":
    main()
