"""Who reads labels from texts: the lexicon, or a judge of your own such as a language model, asked in batches.

An extractor is any function text -> labels (a list, or a list string such as a model answers). One with an attribute
`batch` (texts -> one answer each) is asked for all texts at once; equal texts are asked for once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from veena_lens.emotion.extraction import string_to_list

Extractor = Callable[[str], "str | Sequence[str]"]

# A model may repeat the last words of its instruction before the list.
_LEAD = re.compile(r"^\s*(?:in-?puts?|out-?puts?)\s*[:\uff1a]\s*", re.IGNORECASE)
_ASK = (
    "Below is a description of a person. Name the emotions of that person which the description states clearly, and no "
    "others. Answer with a list in square brackets, its items parted by commas, or with [] when there is none.\n"
    "Description: {text}\nList:"
)


@dataclass(frozen=True)
class Judge:
    """An extractor from a function that answers many prompts at once, such as a language model's generation.

    `ask` turns a text into a prompt. Decode greedily, or fix the seed, for scores that can be repeated:
    `Judge(lambda prompts: model.generate(model.prepare(text=prompts)))`."""

    generate: Callable[[list[str]], Sequence[str]]
    ask: Callable[[str], str] = lambda text: _ASK.format(text=text)

    def batch(self, texts: Sequence[str]) -> list[list[str]]:
        """The labels of each text. Raises: ValueError where `generate` gives another number of answers."""
        answers = list(self.generate([self.ask(text) for text in texts]))
        _require_one_each(len(answers), len(texts))
        return [answer_to_list(answer) for answer in answers]

    def __call__(self, text: str) -> list[str]:
        """The labels of one text."""
        return self.batch([text])[0]


def answer_to_list(answer: str) -> list[str]:
    """The items of the list in a model's answer: line ends and a leading "Output:" go first, then as a list string."""
    return string_to_list(_LEAD.sub("", answer.replace("\n", "")))


def read_labels(texts: Sequence[str], extractor: Extractor) -> list[list[str]]:
    """The labels of each text by an extractor, every different text asked for once.

    Raises: ValueError where a batch comes back with another length."""
    distinct = list(dict.fromkeys(texts))
    batch: Any = getattr(extractor, "batch", None)
    answers = [extractor(text) for text in distinct] if batch is None else list(batch(distinct))
    _require_one_each(len(answers), len(distinct))
    read = {text: answer_to_list(a) if isinstance(a, str) else list(a) for text, a in zip(distinct, answers)}
    return [list(read[text]) for text in texts]


def _require_one_each(found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(f"The judge gave {found} answers to {wanted} texts; it must give one for each, in order.")
