"""Print tables of the project's emotion wheels and lexicon, for docs/wheels.md."""

import sys

from veena_lens.emotion import EmotionWheels


def wheels_table(wheels: EmotionWheels) -> str:
    """Return a table of the wheels: sectors, number of words, source."""
    rows = ["| wheel | sectors | words | source |", "|---|---|---|---|"]
    for wheel in wheels.wheels:
        rows.append(f"| {wheel.name} | {', '.join(wheel.sectors)} | {len(wheel.words)} | {wheel.source} |")
    return "\n".join(rows)


def lexicon_table(wheels: EmotionWheels) -> str:
    """Return a table of the basic emotions: number of forms searched for in texts, valence, some base words."""
    rows = ["| basic emotion | forms | valence | some of its base words |", "|---|---|---|---|"]
    for emotion, valence in wheels.words.valence_of.items():
        bases = [base for base, basic in wheels.words.emotion_of.items() if basic == emotion]
        shown = [base for base in bases if base not in wheels.words.unscanned][:6]
        rows.append(f"| {emotion} | {len(wheels.lexicon(emotion))} | {valence} | {', '.join(shown)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print({"wheels": wheels_table, "lexicon": lexicon_table}[sys.argv[1]](EmotionWheels.default()))
