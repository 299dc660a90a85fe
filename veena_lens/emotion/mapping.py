"""From a label to a sector of a wheel: MER-UniBench's own map and a direct one.

Three levels: surface form -> base words -> wheel words -> sector. Both maps take one of the wheel words that a form
leads to. The official map takes the alphabetically first, which sends "fear" over "fearless" to joy on four of five
wheels; the direct map takes the nearest word. Source: Lian et al. 2025, AffectGPT (ICML), for the official map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from veena_lens.emotion.lexicon import plain

Level = Literal["level1", "level2"]
Mapped = Literal["official", "direct"]
LEVELS: tuple[Level, ...] = ("level1", "level2")
MAPPINGS: tuple[Mapped, ...] = ("official", "direct")


@dataclass(frozen=True, eq=False)
class Wheel:
    """One emotion wheel: sector -> second-level word -> fine words, and the sector of every word per level.

    A word listed twice goes to its last place. At level 2 a sector's own name goes to the alphabetically first of its
    second-level words."""

    name: str
    sectors: Mapping[str, Mapping[str, Sequence[str]]]
    source: str = ""
    basics: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, str]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        first: dict[str, str] = {}
        second: dict[str, str] = {}
        for sector, children in self.sectors.items():
            for child, fine in children.items():
                first |= dict.fromkeys((sector, child, *fine), sector)
                second |= dict.fromkeys((child, *fine), child)
        for sector, children in self.sectors.items():
            # A sector whose name is also one of the second-level words stays a sector's name.
            second[sector] = min(children)
        object.__setattr__(self, "tables", {"level1": first, "level2": second})

    @property
    def words(self) -> frozenset[str]:
        """Every word on the wheel."""
        return frozenset(self.tables["level1"])

    def __repr__(self) -> str:
        return f"Wheel({self.name!r}: {', '.join(self.sectors)}; {len(self.words)} words)"


def official_sector(
    label: str, wheel: Wheel, level: str, forms: Mapping[str, Sequence[str]], synonyms: Mapping[str, Sequence[str]]
) -> str:
    """The sector of the alphabetically first wheel word that the label leads to, "" when none lies on the wheel."""
    table = wheel.tables[level]
    candidates = {word for base in forms.get(plain(label), ()) for word in synonyms.get(base, ())}
    return next((table[word] for word in sorted(candidates) if word in table), "")


def direct_sector(
    label: str, wheel: Wheel, level: str, forms: Mapping[str, Sequence[str]], synonyms: Mapping[str, Sequence[str]]
) -> str:
    """The sector of the label itself or else of the nearest wheel word it leads to, "" when none lies on the wheel.

    Nearest: the least (base is not the label, difference of their lengths, base, wheel word is no sector's name, wheel
    word is not the base, wheel word)."""
    table, word = wheel.tables[level], plain(label)
    if word in table:
        return table[word]
    candidates = [
        (base != word, abs(len(base) - len(word)), base, near not in wheel.sectors, near != base, near)
        for base in forms.get(word, ())
        for near in synonyms.get(base, ())
        if near in table
    ]
    return table[min(candidates)[-1]] if candidates else ""
