"""Labels in free text: longest match, negation, repeats, quotes; and list strings."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veena_lens.emotion.words.lexicon import (
    default_lexicon,
    extract_emotions,
    matches,
    plain,
    read_lexicon,
    string_to_list,
)
from veena_lens.emotion.words.wheels import EmotionWheels

WHEELS = EmotionWheels.default()
LEXICON = default_lexicon()
forms = st.sampled_from(sorted(set(LEXICON.base_of) - LEXICON.unscanned))


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("She looks happy and a little surprised.", ["happy", "surprised"]),
        ("He smiles happily, joyfully; happiness everywhere", ["happy", "joyful"]),
        ("They are over the moon", ["elated"]),
        ("a grief-stricken, broken hearted man", ["grieving", "heartbroken"]),
        ("ANGRY! Angrily angry", ["angry"]),
        ("the content of the picture", []),
        ("He is content", ["content"]),
        ("happy and content", ["happy", "content"]),
        ("content", ["content"]),
        ("[calm, content]", ["calm", "content"]),
        ("bitter coffee in the low light", []),
        ("a sense of relief", ["relieved"]),
        ("She shows deep interest", ["interested"]),
        ("a frightening mask in an amazing, disgusting scene", []),
        ("a surprisingly calm face", ["calm"]),
        ("tears of joy", ["joyful"]),
        ("a neutral background", []),
        ("Anger's face", ["angry"]),
        ("I would love to help, I'm afraid I cannot see it", []),
        ("the happy-looking boy", ["happy"]),
        ("an unhappy child", ["unhappy"]),
        ("a person, an open door, a mean attention", []),
        ("", []),
    ],
)
def test_labels_are_base_words_in_order_each_once(text: str, labels: list[str]) -> None:
    assert extract_emotions(text) == labels


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
        ("He does not appear to be particularly happy", []),
        ("not sad or angry", []),
        ("not sad, angry or afraid", []),
        ("neither sad, angry, nor afraid, but calm", ["neutral"]),
        ("not sad, angry", ["angry"]),
        ("not angry and looks happy", ["happy"]),
        ("not afraid to show love", ["loving"]),
        ("rather than happy, he is sad", ["sad"]),
        ("not without fear", ["afraid"]),
        ("can't help feeling joy", ["happy"]),
        ("couldn't be happier", ["happy"]),
        ("not happier", []),
        ("shows no emotion", ["neutral"]),
        ("anger is absent and fear isn't there", []),
        ("without a hint of sadness", []),
        ("sad, not happy", ["sad"]),
    ],
)
def test_a_negator_within_three_tokens_removes_a_label(text: str, emotions: list[str]) -> None:
    assert WHEELS.emotions(text) == emotions


@given(forms)
def test_every_form_is_found_alone_and_removed_by_not(form: str) -> None:
    assert WHEELS.emotions(f"She seems {form} today.") == [WHEELS.basic(form)]
    assert extract_emotions(f"not {form}") == []


@given(st.lists(forms, max_size=6))
def test_sentences_add_up_to_their_own_labels(found: list[str]) -> None:
    text = ". ".join(found)
    expected = list(dict.fromkeys(LEXICON.base(form) for form in found))
    assert extract_emotions(text) == expected
    assert extract_emotions(text.upper()) == expected
    assert extract_emotions(text.replace("'", "\u2019")) == expected


@given(st.text(max_size=80))
def test_any_text_gives_known_labels_each_once(text: str) -> None:
    labels = extract_emotions(text)
    assert len(labels) == len(set(labels))
    assert all(label in LEXICON.emotion_of for label in labels)
    assert {match.label for match in matches(text) if not match.negated} == set(labels)
    assert extract_emotions(", ".join(labels)) == labels


NEGATORS = ("not", "never", "isn't", "without", "hardly", "does not look", "is not at all")
FILLERS = ("blue", "table", "today", "quietly")


@given(forms, st.sampled_from(NEGATORS), st.lists(st.sampled_from(FILLERS), max_size=5))
def test_a_negator_reaches_over_two_words_and_no_further(form: str, negator: str, between: list[str]) -> None:
    text = " ".join([negator, *between, "seems", form])  # "seems" is one word more, "look" another
    reached = len(between) + 1 + negator.endswith("look") < 3
    assert extract_emotions(text) == ([] if reached else [LEXICON.base(form)])


@given(st.lists(st.tuples(st.booleans(), forms), min_size=1, max_size=5))
def test_clauses_keep_their_own_signs(clauses: list[tuple[bool, str]]) -> None:
    text = "; ".join(f"he {'is' if said else 'is not'} {form}" for said, form in clauses)
    assert extract_emotions(text) == list(dict.fromkeys(LEXICON.base(form) for said, form in clauses if said))


def test_causes_and_signs_are_known_as_labels_and_not_looked_for() -> None:
    assert WHEELS.basic("frightening") == "afraid"
    assert WHEELS.sector("amazing", "ekman") == "surprised"
    assert WHEELS.basic("smiling") == "happy" and WHEELS.basic("crying") == "sad"
    assert extract_emotions("It is frightening, and the smiling mouth says that he is sad") == ["sad"]
    assert "frightening" not in WHEELS.lexicon("afraid") and "frightened" in WHEELS.lexicon("afraid")


def test_a_lexicon_with_a_form_listed_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lexicon.json"
    entry = {"valence": "positive", "words": {"glad": ["!gladly"], "happy": ["?gladly"]}}
    path.write_text(json.dumps({"source": "", "shadows": [], "emotions": {"happy": entry}}))
    with pytest.raises(ValueError, match="'gladly' stands under 'glad' and 'happy'"):
        read_lexicon(path)


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
