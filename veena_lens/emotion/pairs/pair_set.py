"""Hold counterfactual pairs as data: an image with its question, twins of one person and scene, and sets of pairs.

The images stay on disk (or are PIL images that the user holds); a set of ten thousand pairs is a list of paths. One
image may stand in several examples, asked with different contexts."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image

from veena_lens.images.files import open_image
from veena_lens.scores import Scores

NEUTRAL = "neutral"
CONDITIONS = ("none", "consistent", "conflict")
GROUPS = ("split", "style", "condition", "strength", "identity")
Choice = str | Sequence[str | None] | None


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image with the emotion that it shows and the question asked of it.

    `picture`: a path, or a PIL image. `pair` names the scene that a neutral twin shares; `context` is a sentence put
    before the question, which speaks of `context_emotion` in one of several strengths."""

    picture: Any = field(hash=False)
    emotion: str
    question: str
    identity: str = ""
    pair: str | None = None
    style: str = ""
    split: str = ""
    file: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    context: str | None = None
    context_emotion: str | None = None
    context_strength: str | None = None

    @property
    def prompt(self) -> str:
        """Return the context, where there is one, and the question."""
        return f"{self.context} {self.question}" if self.context else self.question

    @property
    def is_neutral(self) -> bool:
        """Say whether the image's emotion is neutral."""
        return self.emotion == NEUTRAL

    @property
    def condition(self) -> str:
        """Return "none" without a context, else "consistent" or "conflict" by what the context speaks of."""
        if self.context is None:
            return "none"
        return "consistent" if self.context_emotion == self.emotion else "conflict"

    @property
    def strength(self) -> str:
        """Return the strength of the context, "none" without one."""
        return "none" if self.context is None else str(self.context_strength)

    @property
    def key(self) -> str:
        """Return what tells this example from the others of a set: the file, and a hash of the words asked."""
        words = f"{self.question}\n{self.context}\n{self.emotion}"
        return f"{self.file or self.picture}#{hashlib.sha256(words.encode()).hexdigest()[:12]}"

    def with_context(self, sentence: str, emotion: str, strength: str | None = None) -> Example:
        """Return the same image and question after a sentence that speaks of `emotion`."""
        return replace(self, context=sentence, context_emotion=emotion, context_strength=strength)

    def without_context(self) -> Example:
        """Return the same image and question without a context."""
        return replace(self, context=None, context_emotion=None, context_strength=None)

    def asked(self, question: str) -> Example:
        """Return the same image and context with another question."""
        return replace(self, question=question)

    def open(self) -> Image.Image:
        """Open the image in RGB. Raises: as `open_image`."""
        return open_image(self.picture)

    def record(self) -> dict[str, Any]:
        """Return the example as a line of a manifest."""
        names = "file emotion pair identity style attributes split question context context_emotion context_strength"
        return {name: getattr(self, name) for name in names.split()} | {"attributes": dict(self.attributes)}

    def fingerprint(self) -> str:
        """Return what tells a question about an image from any other: the image's content and the prompt.

        It does not depend on where the image lies. Raises: FileNotFoundError for an image that is gone."""
        return f"{picture_hash(self.picture)[:24]} {self.prompt}"

    def __repr__(self) -> str:
        told = "" if self.context is None else f", told {self.context_emotion} ({self.context_strength})"
        return f"Example({self.file or self.picture}: {self.emotion}{told}; {self.prompt!r})"


@dataclass(frozen=True)
class Pair:
    """An emotional image and its neutral twin, asked the same."""

    emotional: Example
    neutral: Example

    @property
    def emotion(self) -> str:
        """Return the emotion of the emotional image."""
        return self.emotional.emotion

    @property
    def identity(self) -> str:
        """Return the person of the emotional image."""
        return self.emotional.identity

    @property
    def key(self) -> str:
        """Return the key of the emotional image's example."""
        return self.emotional.key

    def without_context(self) -> Pair:
        """Return both twins without a context."""
        return Pair(self.emotional.without_context(), self.neutral.without_context())

    def with_context(self, sentence: str, emotion: str, strength: str | None = None) -> Pair:
        """Return both twins after the same sentence, which speaks of `emotion`."""
        return Pair(*(side.with_context(sentence, emotion, strength) for side in (self.emotional, self.neutral)))

    def asked(self, question: str) -> Pair:
        """Return both twins with another question."""
        return Pair(self.emotional.asked(question), self.neutral.asked(question))

    def fingerprint(self) -> str:
        """Return what tells a pair from any other: its emotion and both twins."""
        return f"{self.emotion} {self.emotional.fingerprint()} {self.neutral.fingerprint()}"

    def swapped(self) -> Pair:
        """Return the twins in each other's place; the emotion stays the emotional image's."""
        return Pair(replace(self.neutral, emotion=self.emotion), replace(self.emotional, emotion=NEUTRAL))


@dataclass(frozen=True, eq=False)
class PairSet(Sequence[Pair]):
    """A sequence of pairs, the neutral images as separate examples, and `singles` that have no neutral twin.

    Indexing and iteration give pairs; `examples` gives every example once, whatever it belongs to. `skipped`: why
    images were left out on loading."""

    pairs: tuple[Pair, ...]
    neutrals: tuple[Example, ...] = ()
    singles: tuple[Example, ...] = ()
    source: str = ""
    skipped: tuple[str, ...] = ()

    @property
    def examples(self) -> tuple[Example, ...]:
        """Return the emotional images of the pairs, the neutral ones, and those without a twin."""
        return (*(pair.emotional for pair in self.pairs), *self.neutrals, *self.singles)

    @property
    def emotions(self) -> list[str]:
        """Return the emotions of the pairs, in the order in which they first come."""
        return list(dict.fromkeys(pair.emotion for pair in self.pairs))

    @property
    def identities(self) -> list[str]:
        """Return the persons of all examples, in the order in which they first come."""
        return list(dict.fromkeys(example.identity for example in self.examples))

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> PairSet: ...
    def __getitem__(self, index: int | slice) -> Pair | PairSet:
        if isinstance(index, slice):
            return self.of(self.pairs[index])
        return self.pairs[index]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def of(self, pairs: Sequence[Pair]) -> PairSet:
        """Return these pairs of the set with the neutral images of their scenes; singles are left out."""
        scenes = {pair.emotional.pair for pair in pairs}
        return replace(
            self, pairs=tuple(pairs), neutrals=tuple(n for n in self.neutrals if n.pair in scenes), singles=()
        )

    def select(
        self,
        *,
        split: Choice = None,
        emotion: Choice = None,
        style: Choice = None,
        identity: Choice = None,
        condition: Choice = None,
        strength: Choice = None,
    ) -> PairSet:
        """Return what fits every choice: pairs by their emotional image, neutral images and singles by themselves.

        A choice is a label or several; None takes all. A pair keeps its twin whatever becomes of the neutral image's
        examples.
        Raises: ValueError for a label that the set does not have, naming those it has."""
        given = dict(split=split, emotion=emotion, style=style, identity=identity)
        given |= dict(condition=condition, strength=strength)
        wanted = {name: {value} if isinstance(value, str) else set(value) for name, value in given.items() if value}
        for name, labels in wanted.items():
            known = {getattr(example, name) for example in self.examples}
            for label in sorted(labels - known, key=str):
                raise ValueError(
                    f"select({name}={label!r}): no example has it; there are {', '.join(sorted(map(repr, known)))}."
                )

        def fits(example: Example) -> bool:
            return all(getattr(example, name) in labels for name, labels in wanted.items())

        return replace(
            self,
            pairs=tuple(pair for pair in self.pairs if fits(pair.emotional)),
            neutrals=tuple(filter(fits, self.neutrals)),
            singles=tuple(filter(fits, self.singles)),
        )

    def without_context(self) -> PairSet:
        """Return every image once, asked without a context."""

        def once(items: Sequence[Any]) -> tuple[Any, ...]:
            return tuple({item.key: item for item in (item.without_context() for item in items)}.values())

        return replace(self, pairs=once(self.pairs), neutrals=once(self.neutrals), singles=once(self.singles))

    def asked(self, question: str) -> PairSet:
        """Return the same images and contexts with one question for all."""
        pairs, neutrals, singles = (
            tuple(item.asked(question) for item in items) for items in (self.pairs, self.neutrals, self.singles)
        )
        return replace(self, pairs=pairs, neutrals=neutrals, singles=singles)

    def split(self, fractions: Sequence[float | int] = (2, 1), seed: int = 0) -> tuple[PairSet, ...]:
        """Return parts with about these shares of the identities; no identity is in two parts.

        fractions: two or more positive shares, of any sum. Identities are drawn by `seed` within each style, so that
        every part has every style where numbers allow.
        Raises: ValueError for fewer than two shares, one that is not positive, or a part that stays empty."""
        if len(fractions) < 2 or min(fractions) <= 0:
            raise ValueError(f"split: {list(fractions)} must be two or more positive shares, such as (2, 1).")
        styles = {example.identity: example.style for example in reversed(self.examples)}
        order: list[tuple[float, str]] = []  # styles interleaved, so that every cut meets all of them
        for style in sorted(set(styles.values())):
            mine = sorted(name for name, of in styles.items() if of == style)
            random.Random(f"split {seed} {style}").shuffle(mine)
            order += [((place + 0.5) / len(mine), name) for place, name in enumerate(mine)]
        bounds = [sum(fractions[: i + 1]) / sum(fractions) for i in range(len(fractions))]
        part_of = {
            name: next(part for part, bound in enumerate(bounds) if place < round(bound * len(order)))
            for place, (_, name) in enumerate(sorted(order))
        }
        parts = tuple(
            replace(
                self,
                pairs=tuple(p for p in self.pairs if part_of[p.identity] == part),
                neutrals=tuple(n for n in self.neutrals if part_of[n.identity] == part),
                singles=tuple(s for s in self.singles if part_of[s.identity] == part),
            )
            for part in range(len(fractions))
        )
        if any(not part.examples for part in parts):
            sizes = [len(part.identities) for part in parts]
            raise ValueError(
                f"split: {len(styles)} identities in shares of {list(fractions)} give parts of {sizes}; none may be "
                "empty. Use more identities or fewer parts."
            )
        return parts

    def divide(self, parts: Mapping[str, float | int], seed: int = 0) -> dict[str, PairSet]:
        """Return the parts of `split` by name.

        `{"directions": 2, "validation": 1}` gives two thirds of the identities to the first. Raises: as `split`."""
        return dict(zip(parts, self.split(list(parts.values()), seed), strict=True))

    def sample(self, n: int, seed: int = 0) -> PairSet:
        """Return `n` pairs, emotions as equally often as their numbers allow, with the neutral images of their scenes.

        Raises: ValueError for more pairs than there are, or fewer than one."""
        if not 1 <= n <= len(self):
            raise ValueError(f"sample({n}): the set has {len(self)} pairs; ask for 1 to {len(self)}.")
        piles = {emotion: [i for i, p in enumerate(self.pairs) if p.emotion == emotion] for emotion in self.emotions}
        for emotion, pile in piles.items():
            random.Random(f"sample {seed} {emotion}").shuffle(pile)
        order = list(piles)
        random.Random(f"sample {seed}").shuffle(order)  # whose turn is left when n runs out
        chosen: list[int] = []
        while len(chosen) < n:
            for emotion in order:
                if piles[emotion] and len(chosen) < n:
                    chosen.append(piles[emotion].pop())
        return self.of([self.pairs[i] for i in sorted(chosen)])

    def counts(self, by: str = "split") -> Scores:
        """Return the number of examples, axes (emotion, `by`); the row of "neutral" counts neutral images.

        by: split, style, condition, strength or identity. Raises: ValueError for an unknown way of grouping."""
        if by not in GROUPS:
            raise ValueError(f"counts(by={by!r}) must be one of {', '.join(GROUPS)}.")
        rows = list(dict.fromkeys(example.emotion for example in self.examples))
        columns = list(dict.fromkeys(getattr(example, by) for example in self.examples))
        table = torch.zeros(len(rows), len(columns), dtype=torch.long)
        for example in self.examples:
            table[rows.index(example.emotion), columns.index(getattr(example, by))] += 1
        return Scores(table, ("emotion", by), {"emotion": rows, by: columns}, "examples", "number")

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of every line and of every image's content, the same wherever the set lies.

        Raises: FileNotFoundError for an image that is gone."""
        known: dict[Any, str] = {}

        def line(example: Example) -> list[Any]:
            name = example.picture if isinstance(example.picture, (str, Path)) else id(example.picture)
            if name not in known:
                known[name] = picture_hash(example.picture)
            record = example.record()
            return [known[name], *(record[name] for name in sorted(record) if name != "file")]

        parts = {
            "pairs": [[line(pair.emotional), line(pair.neutral)] for pair in self.pairs],
            "neutrals": [line(example) for example in self.neutrals],
            "singles": [line(example) for example in self.singles],
        }
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        """Say how many pairs of which emotion there are, and where they come from."""
        each = {emotion: sum(p.emotion == emotion for p in self.pairs) for emotion in self.emotions}
        rows = [
            f"PairSet: {len(self)} pairs of {len({p.identity for p in self.pairs})} identities"
            + (f", {len(self.neutrals)} neutral" if self.neutrals else "")
            + (f", {len(self.singles)} without a twin" if self.singles else "")
        ]
        if each:
            rows.append("  " + ", ".join(f"{emotion} {count}" for emotion, count in each.items()))
        for name in ("split", "style", "condition"):
            labels = [str(getattr(example, name)) for example in self.examples]
            found = {label: labels.count(label) for label in dict.fromkeys(labels)}
            if found and list(found) not in ([""], ["none"]):
                rows.append(f"  {name}: " + ", ".join(f"{label or '-'} {count}" for label, count in found.items()))
        if self.skipped:
            rows.append(f"  {len(self.skipped)} images skipped (.skipped says why)")
        if self.source:
            rows.append(f"  from {self.source}")
        return "\n".join(rows)


def picture_hash(picture: Any) -> str:
    """Return a hash of an image's content: of a file its bytes, of a PIL image its mode, size and pixels.

    Raises: FileNotFoundError for a file that is gone."""
    if isinstance(picture, (str, Path)):
        path = Path(picture).expanduser()
        about = path.stat()
        return _file_hash(path, about.st_mtime_ns, about.st_size)
    return hashlib.sha256(repr((picture.mode, picture.size)).encode() + picture.tobytes()).hexdigest()


@lru_cache(maxsize=65536)
def _file_hash(path: Path, changed: int, size: int) -> str:
    """Return the hash of a file as it was at that time; it is read once, however many questions are asked of it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
