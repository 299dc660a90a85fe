"""Labels in free text: longest match, negation, repeats, quotes; and list strings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veena_lens.emotion.extraction import extract, matches, string_to_list
from veena_lens.emotion.lexicon import default_lexicon, plain
from veena_lens.emotion.wheels import EmotionWheels

WHEELS = EmotionWheels.default()
forms = st.sampled_from(sorted(default_lexicon().base_of))


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("She looks happy and a little surprised.", ["happy", "surprised"]),
        ("He smiles happily, joyfully; happiness everywhere", ["smiling", "happy", "joyful"]),
        ("They are over the moon", ["elated"]),
        ("a grief-stricken, broken hearted man", ["grieving", "heartbroken"]),
        ("ANGRY! Angrily angry", ["angry"]),
        ("the content of the picture", []),
        ("He is content", ["content"]),
        ("an unhappy child", ["unhappy"]),
        ("a person, an open door, a mean attention", []),
        ("", []),
    ],
)
def test_labels_are_base_words_in_order_each_once(text: str, labels: list[str]) -> None:
    assert extract(text) == labels


@pytest.mark.parametrize(
    ("text", "emotions"),
    [
        ("not happy", []),
        ("She isn't at all sad", []),
        ("She isn\u2019t sad", []),
        ("He does not look very angry", []),
        ("It is not the case that she would be sad", ["sad"]),
        ("not only happy but also surprised", ["happy", "surprised"]),
        ("not sad but happy", ["happy"]),
        ("neither happy nor sad, just calm", ["neutral"]),
        ("No. Happy.", ["happy"]),
        ("He never cried; furious", ["angry"]),
        ("far from happy", []),
        ("anything but sad", []),
        ("without any fear", []),
        ("no doubt disgusted", ["disgusted"]),
        ("not happy at first, later happy", ["happy"]),
    ],
)
def test_a_negator_within_three_tokens_removes_a_label(text: str, emotions: list[str]) -> None:
    assert WHEELS.emotions(text) == emotions


@given(forms)
def test_every_form_is_found_alone_and_removed_by_not(form: str) -> None:
    assert WHEELS.emotions(f"She seems {form} today.") == [WHEELS.basic(form)]
    assert extract(f"not {form}") == []


@given(st.lists(forms, max_size=6))
def test_sentences_add_up_to_their_own_labels(found: list[str]) -> None:
    text = ". ".join(found)
    expected = list(dict.fromkeys(default_lexicon().base(form) for form in found))
    assert extract(text) == expected
    assert extract(text.upper()) == expected
    assert extract(text.replace("'", "\u2019")) == expected


@given(st.text(max_size=80))
def test_any_text_gives_known_labels_each_once(text: str) -> None:
    labels = extract(text)
    assert len(labels) == len(set(labels))
    assert all(label in default_lexicon().emotion_of for label in labels)
    assert {match.label for match in matches(text) if not match.negated} == set(labels)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        (None, []),
        ("", []),
        ("[]", []),
        ("[happy, sad]", ["happy", "sad"]),
        ("['Very sad', \"a b\"]", ["Very sad", "a b"]),
        ("happy and sad; calm", ["happy and sad; calm"]),
        ("[[happy, sad]]", ["[happy", "sad]"]),
        (["happy, sad"], ["happy, sad"]),
    ],
)
def test_list_strings_split_on_quotes_and_commas_alone(text: str | list[str] | None, items: list[str]) -> None:
    assert string_to_list(text) == items


def test_plain_makes_quotes_dashes_and_blanks_alike() -> None:
    assert plain("  Isn\u2019t\u00a0GRIEF\u2010stricken ") == "isn't grief-stricken"
