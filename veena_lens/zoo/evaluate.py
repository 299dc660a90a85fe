"""Evaluate a checkpoint and write its model card: `python -m veena_lens.zoo.evaluate`.

With `--split development` it prints only the main figures, for use during development; the test identities, the
held-out styles and the emoji are used only for the card.
"""

import argparse
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from veena_lens.circuits.statistics import share
from veena_lens.zoo.captions import EMOTION_TASKS
from veena_lens.zoo.card import write_card
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
from veena_lens.zoo.samples import TRAINING_STYLES

__all__ = ["HELD_OUT_STYLES", "judge", "main"]

HELD_OUT_STYLES = ("open-peeps", "micah")


def _told(asker: Asker, items: list[Item], max_new_tokens: int = 8) -> list[str | None]:
    answers = asker.answers([item.query for item in items], max_new_tokens)
    return [named_emotion(answer) for answer in answers]


def _groups(items: list[Item]) -> list[int]:
    return [item.face.identity for item in items]


def _emotion_table(items: list[Item], told: list[str | None]) -> dict[str, Any]:
    """Return the accuracy overall, per emotion and for clear and subtle faces, and the confusion counts."""
    right = [answer == item.truth for answer, item in zip(told, items, strict=True)]

    def part(chosen: list[bool]) -> dict[str, Any] | None:
        rows = [i for i, keep in enumerate(chosen) if keep]
        if not rows:
            return None
        return asdict(share([right[i] for i in rows], [items[i].face.identity for i in rows]))

    return {
        "all": asdict(share(right, _groups(items))),
        "by emotion": {e: part([item.truth == e for item in items]) for e in EMOTIONS if e in {i.truth for i in items}},
        "clear": part([item.face.clear for item in items]),
        "subtle": part([not item.face.clear for item in items]),
        "confusion": confusion([item.truth for item in items], told),
    }


def judge_alone(asker: Asker, draws: list[list[Item]]) -> dict[str, Any]:
    told = [_told(asker, items) for items in draws]
    table = _emotion_table(sum(draws, []), sum(told, []))
    table["by draw"] = [
        statistics.mean(answer == item.truth for answer, item in zip(row, items, strict=True))
        for row, items in zip(told, draws, strict=True)
    ]
    return table


def judge_contexts(asker: Asker, draws: list[list[Item]]) -> dict[str, Any]:
    """Return the shares of answers that follow image and text, pooled over draws, and their deviation between draws."""
    tables = {}
    for kind, strength, held_out, every in CONTEXT_TABLES:
        asked = draws if every else draws[:2]
        rows = [with_context(items, draw, kind, strength, held_out) for draw, items in enumerate(asked)]
        told = [_told(asker, items) for items in rows]
        pairs = [list(zip(ts, xs, strict=True)) for ts, xs in zip(told, rows, strict=True)]
        picture = [[answer == item.truth for answer, item in draw] for draw in pairs]
        text = [[answer == item.context_emotion for answer, item in draw] for draw in pairs]
        groups = sum((_groups(items) for items in rows), [])
        by_draw = [statistics.mean(row) for row in text]
        tables[rows[0][0].kind] = {
            "picture": asdict(share(sum(picture, []), groups)),
            "text": asdict(share(sum(text, []), groups)),
            "text by draw": by_draw,
            "text deviation": statistics.stdev(by_draw) if len(by_draw) > 1 else None,
        }
    return tables


def judge_attributes(asker: Asker, items: list[Item]) -> dict[str, Any]:
    answers = asker.answers([item.query for item in items], 8)
    right = [item.truth in answer.rstrip(".").split() for answer, item in zip(answers, items, strict=True)]
    table = {"all": asdict(share(right, _groups(items)))}
    for name in dict.fromkeys(item.kind for item in items):
        rows = [i for i, item in enumerate(items) if item.kind == name]
        table[name] = asdict(share([right[i] for i in rows], [items[i].face.identity for i in rows]))
    return table


def judge_captions(asker: Asker, items: list[Item]) -> dict[str, Any]:
    """Return how often the first emotion is right and only one is named, and the lengths in tokens."""
    answers = asker.answers([item.query for item in items], 48)
    first = [named_emotion(answer) == item.truth for answer, item in zip(answers, items, strict=True)]
    kinds = [{named_emotion(word) for word in answer.split()} - {None} for answer in answers]
    lengths = [len(asker.processor.tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers]
    return {
        "emotion right": asdict(share(first, _groups(items))),
        "one emotion throughout": asdict(share([len(kind) == 1 for kind in kinds], _groups(items))),
        "tokens": [min(lengths), statistics.median(lengths), max(lengths)],
        "examples": answers[:3],
    }


def judge(folder: Path, split: str, cache: Path, draws: int = 5, count: int | None = None) -> dict[str, Any]:
    """Return all figures of a split; for "test" also those of the other styles and the emoji."""
    asker = Asker(folder)
    bank = sharp_bank(split, cache, count)
    drawn = [face_items(bank, draw) for draw in range(draws)]
    results: dict[str, Any] = {"split": split, "identities": len(bank.numbers), "draws": draws}
    results["parameters"] = sum(p.numel() for p in asker.model.parameters())
    results["bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    results["picture alone"] = judge_alone(asker, drawn)
    results["contexts"] = judge_contexts(asker, drawn)
    results["attributes"] = judge_attributes(asker, attribute_items(drawn[0], 0))
    results["tasks"] = {task: judge_captions(asker, face_items(bank, 0, task)) for task in EMOTION_TASKS[1:]}
    plain = with_context(drawn[0][:48], 0, "conflict", "plain")
    results["attention to the picture"] = {
        "picture alone": asker.picture_attention([item.query for item in drawn[0][:48]]),
        "conflict, plain": asker.picture_attention([item.query for item in plain]),
    }
    if split == "test":
        results["styles"] = {}
        for name in STYLES:
            if name != "avataaars":
                items = style_items(name, "all" if name in HELD_OUT_STYLES else "test")
                results["styles"][name] = _emotion_table(items, _told(asker, items))
                results["styles"][name]["held out"] = name not in TRAINING_STYLES
        items = emoji_items()
        results["emoji"] = _emotion_table(items, _told(asker, items))
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m veena_lens.zoo.evaluate", description=__doc__)
    parser.add_argument("--checkpoint", default="tiny-llava-emotion", help="an embedded checkpoint, or a folder")
    parser.add_argument("--split", choices=("development", "test"), default="test")
    parser.add_argument("--cache", type=Path, default=Path(".cache/zoo/drawings"))
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--identities", type=int, help="use only this many identities (default: all)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--card-only", action="store_true", help="rewrite README.md from results.json")
    options = parser.parse_args(arguments)
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    folder = checkpoint_folder(options.checkpoint)
    if options.card_only:
        write_card(folder, json.loads((folder / "results.json").read_text()))
        return
    results = judge(folder, options.split, options.cache, options.draws, options.identities)
    if options.split == "development":
        print(json.dumps(results, indent=1))
        return
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write_card(folder, results)
    print(f"Wrote {folder / 'README.md'} and results.json.")


if __name__ == "__main__":
    main()


def confusion(truth: Sequence[str], told: Sequence[str | None]) -> dict[str, dict[str, int]]:
    """Return counts by truth, then by the emotion that the answer names ("none" where no emotion word came)."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for true, answer in zip(truth, told, strict=True):
        table[true][answer or "none"] += 1
    return {true: dict(row) for true, row in table.items()}
