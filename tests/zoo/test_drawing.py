"""Drawn faces: identity and expression are separate, splits do not meet, styles draw what their tables say."""

import random

import pytest
import torch

from veena_lens.zoo.drawing import draw_style_face, style_identities
from veena_lens.zoo.faces import AVATAAARS, STYLES, combinations
from veena_lens.zoo.people import EMOTIONS, SPLITS, identity, identity_numbers
from veena_lens.zoo.pictures import Bank, Face, compose, recolour


@pytest.fixture(scope="module")
def bank() -> Bank:
    from veena_lens.zoo.drawing import draw_identity

    numbers = identity_numbers("development", 2)
    layers = [draw_identity(identity(number)) for number in numbers]
    return Bank(numbers, torch.stack([x[0] for x in layers]), torch.stack([x[1] for x in layers]))


def drawn(bank: Bank, emotion: str) -> torch.Tensor:
    face, layers = bank.draw(random.Random(0), emotion, 0)
    same_ground = Face(**{**vars(face), "background": "blue"})
    return compose([(same_ground, layers)])[0]


def test_twins_differ_in_the_face_only(bank: Bank) -> None:
    neutral = drawn(bank, "neutral")
    for emotion in EMOTIONS[:-1]:
        changed = (drawn(bank, emotion) != neutral).any(0)
        assert changed.any()
        rows, columns = changed.nonzero().unbind(1)
        assert columns.min() > 10 and columns.max() < 86 and rows.min() > 15


def test_splits_share_no_identity() -> None:
    numbers = [set(split) for split in SPLITS.values()]
    assert not numbers[0] & numbers[1] and not numbers[0] & numbers[2] and not numbers[1] & numbers[2]
    for style in ("adventurer", "toon-head", "big-smile"):
        train, development, test = (set(style_identities(style, s)) for s in ("train", "development", "test"))
        assert not train & development and not train & test and not development & test


def test_no_two_emotions_share_a_combination() -> None:
    for style in STYLES.values():
        owner: dict[tuple[str, ...], str] = {}
        for emotion, (clear, subtle) in combinations(style).items():
            for combination in clear + subtle:
                assert owner.setdefault(combination.variants, emotion) == emotion


def test_main_style_draws_every_emotion() -> None:
    assert set(combinations(AVATAAARS)) == set(EMOTIONS)


@pytest.mark.parametrize("name", [name for name in STYLES if name != "avataaars"])
def test_every_combination_of_a_style_can_be_drawn(name: str) -> None:
    style = STYLES[name]
    pictures = [draw_style_face(style, 0, (clear + subtle)[0], 32) for clear, subtle in combinations(style).values()]
    assert len({tuple(picture.flatten().tolist()) for picture in pictures}) == len(pictures)


def test_augmentation_is_a_function_of_its_generator(bank: Bank) -> None:
    faces = [bank.draw(random.Random(i)) for i in range(4)]
    first, again, other = (compose(faces, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_recolouring_changes_its_share_and_keeps_the_rest(bank: Bank) -> None:
    pictures = compose([bank.draw(random.Random(i)) for i in range(8)])
    found, changed = recolour(pictures, 0.5, torch.Generator().manual_seed(0))
    assert 0 < int(changed.sum()) < 8 and found.min() >= 0 and found.max() <= 1
    for before, after, other in zip(pictures, found, changed.tolist(), strict=True):
        assert torch.equal(before, after) is not other
