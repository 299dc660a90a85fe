"""Which emotion words of a text a negation removes.

A negator reaches over three words; words of degree, articles, "to", "of" and forms of "to be" are not counted. It does
not reach past a stop, a comma, a word of contrast ("not sad but happy") or an earlier emotion word, unless the two are
joined ("not sad or angry") or stand in a list that "or" closes ("not sad, angry or afraid"). "not only", "no doubt",
"not without" negate nothing. After the word, "is absent" and "isn't" deny it.
"""

from __future__ import annotations

from collections.abc import Sequence

REACH = 3


def words(text: str) -> frozenset[str]:
    """The words of a text as a set."""
    return frozenset(text.split())


MARKS = frozenset(".!?;:,\n()[]\u2013\u2014")

_NEGATORS = words(
    "not no never none neither nor non without hardly barely scarcely rarely seldom cannot nothing nobody lack "
    "lacks lacked lacking absence dont doesnt isnt arent wasnt werent didnt cant wont hasnt havent hadnt wouldnt "
    "couldnt shouldnt aint"
)
_NEGATING_PHRASES = frozenset(
    [("far", "from"), ("free", "of"), ("free", "from"), ("devoid", "of"), ("anything", "but"), ("instead", "of")]
    + [("rather", "than")]
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
    """Whether each match (first token, token after the last), in order, is negated."""
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
    """Whether a negator between `floor` and `start` reaches `start`."""
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
    """Whether what follows denies the match: "anger is absent", "fear isn't there"."""
    first, second = (*tokens[stop : stop + 2], "", "")[:2]
    return first in [f"{be}n't" for be in _BE] or (first in _BE and second in _DENIALS)


def _or_closes(tokens: Sequence[str], spans: Sequence[Span], i: int) -> bool:
    """Whether "or" or "nor" closes the list in which match `i` stands."""
    for j in range(i, len(spans)):
        between = set(tokens[spans[j - 1][1] : spans[j][0]])
        if not between <= _JOINS | {","}:
            return False
        if between & {"or", "nor"}:
            return True
    return False


def _negates(token: str) -> bool:
    return token in _NEGATORS or token.endswith("n't")
