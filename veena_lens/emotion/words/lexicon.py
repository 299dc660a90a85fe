"""Find emotion labels in texts: by the lexicon, or by a judge such as a language model, asked in batches.

An extractor is any function text -> labels (a list, or a list string such as a model answers). One with an attribute
`batch` (texts -> one answer each) is asked for all texts at once; equal texts are asked for once.

The lexicon holds surface forms of emotion words, their base words, and one basic emotion per base word. It is data, not
code: `data/lexicon.json` lists base words with their inflections, nouns, adverbs and phrases, and phrases that hold an
emotion word and name none ("neutral background"). A form marked "!" is known when it comes as a label and never looked
for in texts: it names a cause ("a frightening mask") or a sign ("a smile", which one may describe and yet name a wrong
emotion), or has other everyday senses. A form marked "?" counts in a text only where a feeling is spoken of ("feels
content", not "the content"). `wheels.py` places the words.

Texts are scanned for the longest matches of word tokens, without a model and without chance. Ambiguous forms count only
where a feeling is spoken of, and negated ones do not count. Extraction does not depend on a wheel: mapping labels to
sectors is another function.

A negator reaches over three words; words of degree, articles, "to", "of" and forms of "to be" are not counted. It does
not reach past a stop, a comma, a word of contrast ("not sad but happy") or an earlier emotion word, unless the two are
joined ("not sad or angry") or stand in a list that "or" closes ("not sad, angry or afraid"). "not only", "no doubt",
"not without" negate nothing. After the word, "is absent" and "isn't" deny it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from veena_lens.own_files import require_words
from veena_lens.regular_files import read_json

DATA = Path(__file__).parent / "data"
Valence = Literal["positive", "negative", "neutral"]


def plain(text: str) -> str:
    """Return a text in lower case, with one kind of quotes and dashes and single blanks.

    Two spellings of a label become one."""
    text = unicodedata.normalize("NFKC", text).translate(_QUOTES)
    return " ".join(text.lower().split())


_QUOTES = str.maketrans({c: "'" for c in "\u2018\u2019\u201b\u02bc\u2032\u00b4`"} | {c: "-" for c in "\u2010\u2011"})


@dataclass(frozen=True, eq=False, kw_only=True)
class Lexicon:
    """A lexicon: surface form -> base word -> basic emotion, with the valence of each basic emotion.

    `shadows` are phrases that name no emotion though they hold a word that does; `unscanned` and `guarded` are the
    forms marked "!" and "?"."""

    base_of: Mapping[str, str]
    emotion_of: Mapping[str, str]
    valence_of: Mapping[str, str]
    shadows: tuple[str, ...] = ()
    unscanned: frozenset[str] = frozenset()
    guarded: frozenset[str] = frozenset()
    source: str = ""

    @cached_property
    def phrases(self) -> dict[tuple[str, ...], str]:
        """Return words of a searched form -> the form, "" for a shadow; a hyphen is read as a blank."""
        found = {_words(form): form for form in self.base_of if form not in self.unscanned}
        return found | {_words(shadow): "" for shadow in self.shadows}

    @cached_property
    def longest(self) -> int:
        """Return the number of words in the longest phrase."""
        return max(map(len, self.phrases), default=0)

    @cached_property
    def _by_words(self) -> dict[tuple[str, ...], str]:
        return {_words(form): base for form, base in self.base_of.items()}

    def base(self, label: str) -> str:
        """Return the base word of a label, "" when the lexicon lacks it."""
        label = plain(label)
        return self.base_of.get(label) or self._by_words.get(_words(label), "")

    def basic(self, label: str) -> str:
        """Return the basic emotion of a label, "" when the lexicon lacks it."""
        return self.emotion_of.get(self.base(label), "")

    def forms(self, emotion: str) -> tuple[str, ...]:
        """Return the surface forms of one basic emotion that texts are searched for.

        Raises: ValueError for an emotion that is not one of the basic ones."""
        if emotion not in self.valence_of:
            raise ValueError(f"{emotion!r} is no basic emotion of the lexicon; it has: {', '.join(self.valence_of)}.")
        mine = (form for form, base in self.base_of.items() if self.emotion_of[base] == emotion)
        return tuple(form for form in mine if form not in self.unscanned)

    def __repr__(self) -> str:
        return f"Lexicon({len(self.base_of)} forms of {len(self.emotion_of)} words, {', '.join(self.valence_of)})"


def _words(form: str) -> tuple[str, ...]:
    return tuple(form.replace("-", " ").split())


def read_lexicon(path: str | Path) -> Lexicon:
    """Read the lexicon in a JSON file.

    Raises: ValueError for a form listed twice, naming both places, or a field that is missing or of another type."""
    found = read_json(path)
    require_words(found, {"emotions": {str: dict}, "shadows": [str], "source": str}, str(path))
    for emotion, entry in found["emotions"].items():
        require_words(entry, {"valence": str, "words": {str: [str]}}, f"{path}, emotion {emotion!r}")
    base_of: dict[str, str] = {}
    emotion_of: dict[str, str] = {}
    marked: dict[str, set[str]] = {"!": set(), "?": set()}
    for emotion, entry in found["emotions"].items():
        for base, forms in entry["words"].items():
            bare = base.lstrip("!?")
            emotion_of[bare] = emotion
            for form in (base, *forms):
                word = form.lstrip("!?")
                if not word:
                    raise ValueError(f"{path}: {bare!r} has an empty form; leave it out.")
                if word in base_of:
                    raise ValueError(f"{path}: {word!r} stands under {base_of[word]!r} and {bare!r}; leave one.")
                base_of[word] = bare
                if form != word:
                    marked[form[0]].add(word)
    return Lexicon(
        base_of=base_of,
        emotion_of=emotion_of,
        valence_of={emotion: entry["valence"] for emotion, entry in found["emotions"].items()},
        shadows=tuple(found["shadows"]),
        unscanned=frozenset(marked["!"]),
        guarded=frozenset(marked["?"]),
        source=found["source"],
    )


@cache
def default_lexicon() -> Lexicon:
    """Return the project's lexicon."""
    return read_lexicon(DATA / "lexicon.json")


REACH = 3


def words(text: str) -> frozenset[str]:
    """Return the words of a text as a set."""
    return frozenset(text.split())


MARKS = frozenset(".!?;:,\n()[]\u2013\u2014")

_NEGATORS = words(
    "not no never none neither nor non without hardly barely scarcely rarely seldom cannot nothing nobody lack "
    "lacks lacked lacking absence dont doesnt isnt arent wasnt werent didnt cant wont hasnt havent hadnt wouldnt "
    "couldnt shouldnt aint"
)
_NEGATING_PHRASES = frozenset(
    [
        ("far", "from"),
        ("free", "of"),
        ("free", "from"),
        ("devoid", "of"),
        ("anything", "but"),
        ("instead", "of"),
        ("rather", "than"),
    ]
)
# "not only happy", "no doubt angry", "cannot help smiling": these turn a negation into a statement.
_STATING = words("only just merely simply solely doubt help")
_CONTRASTS = words("but yet although though however instead whereas while because since despite")
DEGREES = words(
    "very really so too quite rather pretty fairly somewhat slightly mildly deeply extremely incredibly truly "
    "highly utterly completely totally absolutely visibly clearly particularly especially overly much more most "
    "bit little even genuinely intensely entirely exactly necessarily strong strongly"
)
LINKS = words(
    "be is are was were am been being feel feels feeling felt look looks looking looked seem seems seemed seeming "
    "appear appears appeared appearing become becomes became remain remains stay stays"
)
_LIGHT = DEGREES | words("to a an the at all of as any in be is are was were am been being")
_JOINS = DEGREES | words("and or nor a an the any")
_DENIALS = words("not absent missing lacking")
_BE = ("is", "are", "was", "were")

Span = tuple[int, int]


def negated(tokens: Sequence[str], spans: Sequence[Span]) -> list[bool]:
    """Say for each match (first token, token after the last), in order, whether it is negated."""
    signs: list[bool] = []
    for i, (start, stop) in enumerate(spans):
        floor = spans[i - 1][1] if i else 0
        sign = _reached(tokens, floor, start) or _denied(tokens, stop)
        if not sign and i and signs[-1]:
            between = set(tokens[floor:start])
            sign = bool(between) and between <= _JOINS | {","} and ("," not in between or _or_closes(tokens, spans, i))
        signs.append(sign)
    return signs


def _reached(tokens: Sequence[str], floor: int, start: int) -> bool:
    """Say whether a negator between `floor` and `start` reaches `start`."""
    counted = 0
    for at in range(start - 1, floor - 1, -1):
        token = tokens[at]
        after = tokens[at + 1] if at + 1 < start else ""
        if counted >= REACH or token in MARKS:
            return False
        if (token, after) in _NEGATING_PHRASES:
            return True
        if _negates(token):
            doubled = token in ("not", "without") and at > floor and _negates(tokens[at - 1])
            return after not in _STATING and not doubled
        if token in _CONTRASTS and (at == floor or tokens[at - 1] != "anything"):
            return False
        counted += token not in _LIGHT
    return False


def _denied(tokens: Sequence[str], stop: int) -> bool:
    """Say whether what follows denies the match: "anger is absent", "fear isn't there"."""
    first, second = (*tokens[stop : stop + 2], "", "")[:2]
    return first in [f"{be}n't" for be in _BE] or (first in _BE and second in _DENIALS)


def _or_closes(tokens: Sequence[str], spans: Sequence[Span], i: int) -> bool:
    """Say whether "or" or "nor" closes the list in which match `i` stands."""
    for j in range(i, len(spans)):
        between = set(tokens[spans[j - 1][1] : spans[j][0]])
        if not between <= _JOINS | {","}:
            return False
        if between & {"or", "nor"}:
            return True
    return False


def _negates(token: str) -> bool:
    return token in _NEGATORS or token.endswith("n't")


# A word with its inner apostrophes, or a mark that ends the reach of a negation.
_TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+|[.!?;:,\n()\[\]\u2013\u2014]")
_ARTICLES = words("a an the his her their deep great keen genuine intense mild slight")
_SHOWING = words(
    "show shows showing shown showed express expresses expressing expressed display displays displaying convey "
    "conveys conveying suggest suggests suggesting indicate indicates indicating register registers in with"
)
# "a sense of relief", "full of hope": nouns and adjectives before "of" or "with" that make what follows a feeling.
_HOLDERS = words(
    "sense look feeling feelings expression mix mixture blend air full filled sign signs hint state wave moment "
    "face emotion emotions smile overcome combination lot level touch glimmer"
)


@dataclass(frozen=True, kw_only=True)
class Match:
    """A lexicon form found in a text: its base word, its words, and whether a negation removes it."""

    label: str
    words: tuple[str, ...]
    negated: bool


def string_to_list(labels: str | Sequence[str] | None) -> list[str]:
    """Return the items of a bracketed list string, as MER-UniBench reads it.

    A list stays unchanged; None or "" gives []. One leading "[" and one trailing "]" are removed, quotes and commas
    separate the items, and blanks around items and empty items are removed. Case is kept.
    Source: Lian et al. 2025, AffectGPT (ICML)."""
    if labels is None:
        return []
    if not isinstance(labels, str):
        return [str(item) for item in labels]
    inner = labels.strip().removeprefix("[").removesuffix("]")
    return [item.strip() for item in re.split("['\",]", inner) if item.strip()]


def extract_emotions(text: str, lexicon: Lexicon | None = None) -> list[str]:
    """Return the base words of the emotions that a text names, in order, each once; negated ones are left out.

    "She isn't sad, she is over the moon and quite calm" -> `["elated", "calm"]`. lexicon: None is the project's."""
    found = (match.label for match in matches(text, lexicon) if not match.negated)
    return list(dict.fromkeys(found))


def matches(text: str, lexicon: Lexicon | None = None) -> Iterator[Match]:
    """Yield every emotion word of a text in order, repeated and negated ones too; lexicon: None is the project's."""
    lexicon = default_lexicon() if lexicon is None else lexicon
    tokens = words_of(text)
    spans = list(_spans(tokens, lexicon))
    for (start, stop, form), removed in zip(spans, negated(tokens, [span[:2] for span in spans])):
        yield Match(label=lexicon.base_of[form], words=tuple(tokens[start:stop]), negated=removed)


def words_of(text: str) -> list[str]:
    """Return the lower-case word tokens of a text and the marks that end a negation's reach, without possessive 's."""
    # Line ends are marks too; `plain` would turn them into blanks.
    tokens = _TOKEN.findall("\n".join(plain(line) for line in text.splitlines()))
    return [token.removesuffix("'s") if token != "'s" else token for token in tokens]


def _spans(tokens: Sequence[str], lexicon: Lexicon) -> Iterator[tuple[int, int, str]]:
    """Yield (first token, token after the last, form) of the longest matches, left to right."""
    start = before = 0  # `before`: where the last match ended
    while start < len(tokens):
        step = 1
        for size in range(min(lexicon.longest, len(tokens) - start), 0, -1):
            form = lexicon.phrases.get(tuple(tokens[start : start + size]))
            if form is None or (form in lexicon.guarded and not _is_felt(tokens, start, start + size, before)):
                continue
            step = size
            if form:
                before = start + size
                yield start, before, form
            break
        start += step


def _is_felt(tokens: Sequence[str], start: int, stop: int, before: int) -> bool:
    """Say whether an ambiguous form stands where a feeling is named; `before` is where the last match ended."""
    at = start - 1
    alone = (at < 0 or tokens[at] in MARKS) and (stop >= len(tokens) or tokens[stop] in MARKS)
    if alone:
        return True  # an item of a list, or the whole answer
    while at >= 0 and (tokens[at] in DEGREES or tokens[at] in _ARTICLES):
        at -= 1
    if at < 0:
        return False
    last = tokens[at]
    if last in LINKS or last in _SHOWING:
        return at == start - 1 or tokens[start - 1] not in ("the", "his", "her", "their")
    if last == "of":
        return at > 0 and tokens[at - 1] in _HOLDERS
    return last in ("and", "or", "nor", ",") and at == before and before > 0


Extractor = Callable[[str], "str | Sequence[str]"]

# A model may repeat the last words of its instruction before the list.
_LEAD = re.compile(r"^\s*(?:in-?puts?|out-?puts?)\s*[:\uff1a]\s*", re.IGNORECASE)
_ASK = (
    "Below is a description of a person. Name the emotions of that person which the description states clearly, and no "
    "others. Answer with a list in square brackets, its items parted by commas, or with [] when there is none.\n"
    "Description: {text}\nList:"
)


@dataclass(frozen=True)
class LabelExtractor:
    """An extractor from a function that answers many prompts at once, such as a language model's generation.

    `ask` turns a text into a prompt. Decode greedily, or fix the seed, for scores that can be repeated:
    `LabelExtractor(lambda prompts: model.generate(model.prepare(text=prompts)))`."""

    generate: Callable[[list[str]], Sequence[str]]
    ask: Callable[[str], str] = lambda text: _ASK.format(text=text)

    def batch(self, texts: Sequence[str]) -> list[list[str]]:
        """Return the labels of each text. Raises: ValueError where `generate` gives another number of answers."""
        answers = list(self.generate([self.ask(text) for text in texts]))
        _require_one_each(len(answers), len(texts))
        return [answer_to_list(answer) for answer in answers]

    def __call__(self, text: str) -> list[str]:
        """Return the labels of one text."""
        return self.batch([text])[0]


def answer_to_list(answer: str) -> list[str]:
    """Return the items of the list in a model's answer.

    Line ends and a leading "Output:" are removed first; the rest is read as a list string."""
    return string_to_list(_LEAD.sub("", answer.replace("\n", "")))


def read_labels(texts: Sequence[str], extractor: Extractor) -> list[list[str]]:
    """Return the labels of each text by an extractor, every different text asked for once.

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
