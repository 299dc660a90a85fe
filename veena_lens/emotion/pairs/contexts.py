"""Put contexts before questions: a sentence that speaks of an emotion, the image's or another.

An event fits one emotion and is stated in three strengths. `context_conditions` puts the same images under no context,
a consistent one and conflicting ones, so that rescue and harm are seen together. Two events of each emotion are held
out from the training of the embedded models; their words are all known from other sentences.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from veena_lens.emotion.pairs.loading import Example

__all__ = ["EVENTS", "HELD_OUT_EVENTS", "STRENGTHS", "context_conditions", "context_sentence"]

STRENGTHS = ("weak", "plain", "strong")

EVENTS: dict[str, tuple[str, ...]] = {
    "happy": (
        "the person just won the lottery", "the person got a new job today", "the person won the big game",
        "the person passed the hard exam", "the person got a wonderful present",
        "the person has a birthday party today", "the person came home after a long holiday",
    ),
    "sad": (
        "the person lost a good friend", "the dog of the person ran away", "the person failed the hard exam",
        "the person said goodbye to the family", "the grandmother of the person died", "the person lost the job today",
        "the person has to spend the birthday alone",
    ),
    "angry": (
        "someone stole the bike of the person", "the neighbour broke the window on purpose",
        "someone lied to the person again", "someone scratched the new car of the person",
        "the boss shouted at the person", "the person was cheated in a game", "someone pushed the person in the queue",
    ),
    "surprised": (
        "the person heard some news that nobody expected", "an old friend came home without warning",
        "the person found money in an old coat", "a magician showed the person a trick",
        "the person saw a rabbit in the office", "everyone shouted in the dark at the party",
        "the person opened a strange present",
    ),
    "afraid": (
        "a big dog chased the person", "the person heard steps in the dark house", "the person stood near a wild bear",
        "the person saw a snake in the garden", "the person is about to fall from a high wall",
        "a loud storm shook the house at night", "the person is lost in the dark forest",
    ),
    "disgusted": (
        "the person drank sour milk", "the person found a worm in the soup", "the person stepped in rotten food",
        "the person smelled the old garbage", "there was a dead fly in the drink of the person",
        "the person touched some slimy food", "the kitchen was full of rotten fish",
    ),
    "loving": (
        "the person holds a newborn baby", "the person just got married", "the person thinks of the dear partner",
        "the partner sent the person a long letter", "the person cuddles a little kitten",
        "the person hugs the little daughter",
        "the partner of the person came home with roses",
    ),
    "neutral": (
        "nothing special happened to the person today", "the person waits for the bus", "the person reads a timetable",
        "the person had an ordinary morning", "the person sits in the office as usual", "the person sorts some papers",
        "the person stands in the queue as usual",
    ),
}  # fmt: skip

HELD_OUT_EVENTS: dict[str, tuple[str, ...]] = {
    "happy": ("the person won a wonderful holiday", "the family of the person has a big party today"),
    "sad": ("the dog of the person died", "the person has to spend the holiday alone"),
    "angry": ("someone broke the new bike on purpose", "the neighbour lied to the person again"),
    "surprised": ("the person found a rabbit in an old coat", "the magician came home without warning"),
    "afraid": ("a wild bear chased the person", "the person heard a snake in the dark"),
    "disgusted": ("the person drank milk with a dead fly", "there was a rotten worm in the food"),
    "loving": ("the person hugs the dear partner", "the person cuddles a newborn kitten"),
    "neutral": ("the person sits in the bus as usual", "the person had an ordinary day in the office"),
}


def context_sentence(event: str, strength: str) -> str:
    """Return an event as a sentence of the given strength.

    Args:
        event: a clause without a full stop, such as those of `EVENTS`.
        strength: "weak" ("maybe ..."), "strong" ("everybody knows that ..."), or "plain".
    """
    if strength == "weak":
        return f"maybe {event}."
    if strength == "strong":
        return f"everybody knows that {event}."
    return f"{event}."


def context_conditions(
    examples: Iterable[Example],
    *,
    seed: int = 0,
    held_out: bool = True,
    strengths: Sequence[str] = STRENGTHS,
    events: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, list[Example]]:
    """Return the same images under every condition.

    Conditions are "alone", "consistent", and "conflict, <strength>" for each strength. Every list has the examples in
    their order. The sentence of a conflict speaks of an emotion drawn among the others of the set; one event serves all
    strengths, so that they differ in nothing else. A consistent sentence is stated plainly. Draws depend on the seed
    and the example alone, not on its neighbours or on where its image lies.

    Args:
        examples: images with their questions; contexts that they already have are dropped.
        seed: of the draws.
        held_out: True takes events that the embedded models were not trained on, False the others.
        strengths: of the conflicts, some of `STRENGTHS`; by default all.
        events: your sentences by emotion, without a full stop, as `EVENTS` has them; None follows `held_out`.

    Raises: ValueError for no examples, fewer than two emotions, an unknown strength, or emotions without sentences.
    """
    examples = [example.without_context() for example in examples]
    told = (HELD_OUT_EVENTS if held_out else EVENTS) if events is None else events
    emotions = list(dict.fromkeys(example.emotion for example in examples))
    unknown = [strength for strength in strengths if strength not in STRENGTHS]
    if unknown or not strengths:
        raise ValueError(f"conditions: strengths={list(strengths)} must be some of {', '.join(STRENGTHS)}.")
    if len(emotions) < 2:
        raise ValueError(
            f"conditions: the examples show {emotions or 'nothing'}; a conflict needs two emotions or more."
        )
    silent = [emotion for emotion in emotions if not told.get(emotion)]
    if silent:
        raise ValueError(
            f"conditions: no sentences for {', '.join(map(repr, silent))}; there are some for "
            f"{', '.join(map(repr, told))}. Give your own as events={{{silent[0]!r}: ['the person ...'], ...}}."
        )
    found: dict[str, list[Example]] = {"alone": examples, "consistent": []}
    found |= {f"conflict, {strength}": [] for strength in strengths}
    met: Counter[str] = Counter()
    for example in examples:
        name = f"{example.style} {example.identity} {example.pair} {example.emotion} {example.question}"
        rng = random.Random(f"conditions {seed} {name} {met[name]}")
        met[name] += 1
        other = rng.choice(sorted(set(emotions) - {example.emotion}))
        conflict, own = rng.choice(list(told[other])), rng.choice(list(told[example.emotion]))
        found["consistent"].append(example.with_context(context_sentence(own, "plain"), example.emotion, "plain"))
        for strength in strengths:
            sentence = context_sentence(conflict, strength)
            found[f"conflict, {strength}"].append(example.with_context(sentence, other, strength))
    return found
