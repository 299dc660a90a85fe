"""The comparison of both models: paired differences, and tables with enough answers."""

from typing import Any

import pytest
from PIL import Image

from veena_lens.circuits.statistics import paired_difference
from veena_lens.zoo.compare import Asked, compare, verdict
from veena_lens.zoo.exam import Asker, Item, Query, emoji_items, style_items
from veena_lens.zoo.pictures import Face

FACE = Face(style="avataaars", identity=0, emotion="happy", clear=True, background="blue", attributes={})


class Parrot(Asker):
    """Answers every question alike."""

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def answers(self, queries: list[Query], max_new_tokens: int = 8, batch: int = 64) -> list[str]:
        return [self.answer] * len(queries)


def items(count: int) -> list[Item]:
    faces = [Face(**{**vars(FACE), "identity": number}) for number in range(count)]
    picture = Image.new("RGB", (8, 8))
    return [Item(kind="alone", face=face, query=Query(picture, "?"), truth="happy") for face in faces]


def test_equal_answers_differ_by_nothing_and_more_identities_say_it_surer() -> None:
    few, many = (paired_difference([True] * n, [True] * n, list(range(n))) for n in (10, 1000))
    assert few.value == many.value == 0.0
    assert few.low < many.low < 0 < many.high < few.high


def test_pairing_is_narrower_than_shares_apart() -> None:
    first = [n % 2 == 0 for n in range(400)]
    second = [n % 2 == 0 and n % 40 != 0 for n in range(400)]
    found = paired_difference(first, second, list(range(400)))
    assert found.value == pytest.approx(0.025) and 0.01 < found.low < found.value < found.high < 0.045


@pytest.mark.parametrize(
    ("low", "high", "told"), [(-0.1, -0.031, "below"), (-0.1, -0.03, "within"), (0.031, 0.1, "above")]
)
def test_verdict_looks_at_the_near_end(low: float, high: float, told: str) -> None:
    assert verdict(low, high) == told


def test_rows_tell_each_part_and_measure() -> None:
    right: Any = lambda answer, item: answer == item.truth  # noqa: E731
    parts: Any = {"all": lambda item: True, "first": lambda item: item.face.identity == 0}
    asked = Asked(table="t", items=items(3), measures={"right": right, "wrong": lambda *x: not right(*x)}, parts=parts)
    rows = compare(Parrot("happy"), Parrot("sad"), iter([asked]))
    assert [(row["part"], row["measure"], row["answers"], row["difference"]) for row in rows] == [
        ("all", "right", 3, 1.0),
        ("all", "wrong", 3, -1.0),
        ("first", "right", 1, 1.0),
        ("first", "wrong", 1, -1.0),
    ]


def test_draws_of_other_art_differ() -> None:
    first, again, other = (style_items("micah", "all", limit=2, draw=draw) for draw in (0, 0, 1))
    pictures = [[item.query.picture.tobytes() for item in row] for row in (first, again, other)]
    assert pictures[0] == pictures[1] != pictures[2]
    assert {item.query.text for item in emoji_items(0)} != {item.query.text for item in emoji_items(1)}
