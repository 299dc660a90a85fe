"""The eight classes and the words that name them; every other file reads its vocabulary from here.

Each emotion has a head word, a strong and a mild second word (chosen by the drawn face, not by chance: random
synonyms are noise that nothing can learn) and a noun. No word belongs to two emotions.
"""

from dataclasses import dataclass

__all__ = ["EMOTIONS", "WORDS", "EmotionWords", "named_emotion"]


@dataclass(frozen=True)
class EmotionWords:
    head: str
    strong: str
    mild: str
    noun: str

    @property
    def all(self) -> tuple[str, str, str, str]:
        return self.head, self.strong, self.mild, self.noun


WORDS: dict[str, EmotionWords] = {
    "happy": EmotionWords("happy", "joyful", "cheerful", "joy"),
    "sad": EmotionWords("sad", "sorrowful", "gloomy", "sorrow"),
    "angry": EmotionWords("angry", "furious", "annoyed", "anger"),
    "surprised": EmotionWords("surprised", "astonished", "amazed", "surprise"),
    "afraid": EmotionWords("afraid", "terrified", "anxious", "fear"),
    "disgusted": EmotionWords("disgusted", "revolted", "repelled", "disgust"),
    "loving": EmotionWords("loving", "adoring", "affectionate", "love"),
    "neutral": EmotionWords("neutral", "calm", "composed", "calmness"),
}
EMOTIONS: tuple[str, ...] = tuple(WORDS)
_EMOTION_OF_WORD = {word: emotion for emotion, words in WORDS.items() for word in words.all}


def named_emotion(text: str) -> str | None:
    """The emotion of the first emotion word in `text`, or None."""
    for word in text.lower().replace(",", " ").replace(".", " ").split():
        if word in _EMOTION_OF_WORD:
            return _EMOTION_OF_WORD[word]
    return None
