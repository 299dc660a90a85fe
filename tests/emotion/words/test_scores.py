"""Hit rates, set scores and sentiment scores: by hand, as properties, and equal to the original's golden cases."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.emotion.wheel_data import golden, needs_original, original
from veena_lens.emotion import hit_rate, open_vocabulary_score, sample_hit, sentiment_score, token_hit_rate
from veena_lens.emotion.words.lexicon import default_lexicon
from veena_lens.emotion.words.wheel import Wheel
from veena_lens.emotion.words.wheels import EmotionWheels

WHEELS = EmotionWheels.default()
# Two wheels by hand: "odd" lacks anger and puts surprise with fear.
BY_HAND = EmotionWheels(
    wheels=(
        Wheel("plain", {"joy": {"glad": ["merry"]}, "rage": {"cross": []}, "fear": {"shy": []}, "wonder": {"awe": []}}),
        Wheel("odd", {"joy": {"glad": []}, "fear": {"shy": ["awe"]}}),
    ),
    forms={word: (word,) for word in ("joy", "glad", "merry", "rage", "cross", "fear", "shy", "awe")},
    synonyms={word: (word,) for word in ("joy", "glad", "merry", "rage", "cross", "fear", "shy", "awe")},
    words=default_lexicon(),
)
forms = st.sampled_from(sorted(default_lexicon().base_of))
label_sets = st.lists(forms, max_size=4)
samples = st.dictionaries(st.text(min_size=1, max_size=3), st.tuples(label_sets, label_sets), min_size=1, max_size=6)


def test_hit_rate_by_hand_has_its_own_denominator_on_every_wheel() -> None:
    truths = {"a": "glad", "b": "cross", "c": "awe", "d": "neutral"}
    predictions = {"a": "[merry, shy]", "b": "rage", "c": ["fear"], "d": "joy", "extra": "joy"}
    # plain: a hit, b hit, c miss of 3; odd ("merry" and "cross" are not on it): a miss, c hit of 2.
    assert hit_rate(truths, predictions, BY_HAND) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert BY_HAND.hit_rate(truths, predictions) == hit_rate(truths, predictions, BY_HAND)


def test_only_the_official_hit_rate_counts_two_hits_in_one_sample() -> None:
    truths, predictions = {"a": "joy, fear"}, {"a": "[glad, shy]"}
    assert hit_rate(truths, predictions, BY_HAND, mapping="official") == 2.0
    assert hit_rate(truths, predictions, BY_HAND, mapping="direct") == 1.0


def test_open_vocabulary_score_is_f_of_the_means_by_hand() -> None:
    truths = {"a": ["glad", "cross"], "b": ["shy"]}
    predictions = {"a": ["joy"], "b": []}
    score = open_vocabulary_score(truths, predictions, BY_HAND)
    plain, odd = score.per_wheel
    # plain: precision (1 + 0)/2, recall (1/2 + 0)/2; odd: a's truth is joy alone.
    assert (plain.precision, plain.recall, plain.counted) == (0.5, 0.25, 2)
    assert plain.f_score == pytest.approx(1 / 3)
    assert (odd.precision, odd.recall, odd.f_score) == (0.5, 0.5, 0.5)
    assert score.f_score == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert (score.precision, score.recall) == (0.5, 0.375)


def test_a_wheel_without_any_of_the_truths_has_no_say() -> None:
    assert hit_rate({"a": "cross"}, {"a": "rage"}, BY_HAND) == 1.0
    assert open_vocabulary_score({"a": "cross"}, {"a": "[rage, shy]"}, BY_HAND).precision == 0.5
    assert hit_rate({"a": "loving"}, {"a": "adoring"}) == 1.0  # Ekman's wheel has no love
    assert hit_rate({"a": "neutral"}, {"a": "neutral"}, mapping="official") == 0.0
    assert hit_rate({"a": "neutral", "b": "sad"}, {"a": "calm", "b": "calm"}) == 0.5


@needs_original
def test_the_direct_map_tells_fear_from_joy_and_leaves_surprise_near_fear_on_one_wheel() -> None:
    def hit(truth: str, guess: str, mapping: str) -> float:
        return original().hit_rate({"a": truth}, {"a": guess}, mapping=mapping)

    assert hit("fear", "happy", "official") == pytest.approx(0.4)
    assert hit("fear", "happy", "direct") == 0.0
    assert hit("happy", "joy", "direct") == 1.0
    assert hit("fear", "surprise", "direct") == pytest.approx(0.2)
    assert hit("surprise", "fear", "direct") == pytest.approx(0.25)  # off wheel 5
    assert sample_hit(["fear"], "surprise", original()) == pytest.approx(0.25)


@given(samples, st.sampled_from(["official", "direct"]))
def test_scores_equal_their_plain_formulas(drawn: dict[str, tuple[list[str], list[str]]], mapping: str) -> None:
    hits, fs = [], []
    for wheel in WHEELS.wheels:
        hit, precision, recall, n = 0.0, 0.0, 0.0, 0
        for truth, guess in drawn.values():
            y = {WHEELS.sector(word, wheel.name, mapping=mapping) for word in truth if word} - {""}
            p = {WHEELS.sector(word, wheel.name, mapping=mapping) for word in guess if word} - {""}
            if y:
                both = len([sector for sector in y if sector in p])
                n += 1
                hit += both if mapping == "official" else both > 0
                precision += both / len(p) if p else 0
                recall += both / len(y)
        if n:
            hits.append(hit / n)
            fs.append(2 * precision * recall / (precision + recall) / n if precision + recall else 0.0)
    truths = {name: truth for name, (truth, _) in drawn.items()}
    guesses = {name: guess for name, (_, guess) in drawn.items()}
    assert hit_rate(truths, guesses, mapping=mapping) == pytest.approx(sum(hits) / len(hits) if hits else 0.0)
    score = open_vocabulary_score(truths, guesses, mapping=mapping)
    assert score.f_score == pytest.approx(sum(fs) / len(fs) if fs else 0.0)


def test_nothing_over_nothing_is_zero() -> None:
    score = open_vocabulary_score({"a": "cross"}, {"a": "zzz"}, BY_HAND)
    assert (score.f_score, score.precision, score.recall) == (0.0, 0.0, 0.0)
    assert [wheel.counted for wheel in score.per_wheel] == [1, 0]


def test_sentiment_score_by_hand() -> None:
    truths = {"a": 1.0, "b": 0.2, "c": -3.0, "d": -0.1, "e": 0.0}
    predictions = {"a": "positive", "b": "neutral", "c": "mixed", "d": "positive", "e": "positive"}
    score = sentiment_score(truths, predictions)
    # right: a, c. F1 of both classes: 2 * 1 / (2 + 2).
    assert (score.accuracy, score.waf, score.counted) == (0.5, 0.5, 4)
    assert sentiment_score({"a": 1.0, "b": 2.0}, {"a": "positive", "b": "Positive"}).waf == pytest.approx(2 / 3)
    assert sentiment_score({"a": 1.0}, {"a": "negative"}).waf == 0.0


@given(st.lists(st.tuples(st.sampled_from([-1.0, 0.5]), st.sampled_from(["positive", "negative", "odd"])), min_size=1))
def test_weighted_f_score_equals_its_formula(pairs: list[tuple[float, str]]) -> None:
    truths = {str(i): value for i, (value, _) in enumerate(pairs)}
    guesses = {str(i): guess for i, (_, guess) in enumerate(pairs)}
    waf = 0.0
    for kind in (True, False):
        true = [(v > 0) == kind for v, _ in pairs]
        said = [(g == "positive") == kind for _, g in pairs]
        both = sum(a and b for a, b in zip(true, said))
        precision = both / sum(said) if any(said) else 0.0
        recall = both / sum(true) if any(true) else 0.0
        f1 = 2 * precision * recall / (precision + recall) if both else 0.0
        waf += f1 * sum(true) / len(pairs)
    assert sentiment_score(truths, guesses).waf == pytest.approx(waf)


def test_a_truth_without_prediction_is_named_or_scored_as_empty() -> None:
    truths = {"one": "joy", "two": "fear"}
    with pytest.raises(ValueError, match=r"1 of 2 samples have no prediction: 'two'.*missing=\"empty\""):
        hit_rate(truths, {"one": "joy"}, BY_HAND)
    assert hit_rate(truths, {"one": "joy"}, BY_HAND, missing="empty") == 0.5
    with pytest.raises(ValueError, match="'b'"):
        sentiment_score({"a": 1.0, "b": -1.0}, {"a": "positive"})
    assert sentiment_score({"a": 1.0, "b": -1.0}, {"a": "positive"}, missing="empty").accuracy == 1.0
    with pytest.raises(ValueError, match="missing='drop'"):
        hit_rate(truths, truths, BY_HAND, missing="drop")
    with pytest.raises(ValueError, match="No truths"):
        hit_rate({}, {}, BY_HAND)


def test_sentiment_without_a_scorable_truth_is_refused() -> None:
    with pytest.raises(ValueError, match="Every sentiment truth is 0"):
        sentiment_score({"a": 0.0}, {"a": "positive"})
    with pytest.raises(ValueError, match="finite.*'a'"):
        sentiment_score({"a": float("nan")}, {"a": "positive"})


def test_an_extractor_turns_texts_into_labels() -> None:
    truths = {"a": "happy", "b": "sad"}
    texts = {"a": "She is not sad, she beams with joy", "b": "He isn't sad"}
    assert hit_rate(truths, texts, extractor=WHEELS.extract) == 0.5
    assert hit_rate(truths, texts, extractor=lambda text: ["happy", "sad"]) == 1.0
    assert sample_hit("whatever", "sad", extractor=lambda text: ["gloomy"]) == 1.0


def test_sample_hit_is_the_share_of_wheels_that_agree() -> None:
    assert sample_hit(["awe"], "fear", BY_HAND) == 0.5
    assert sample_hit(["merry"], "joy", BY_HAND) == 0.5
    assert sample_hit(["cross"], "rage", BY_HAND) == 1.0
    assert sample_hit("a text of nothing", "joy", BY_HAND) == 0.0
    # No wheel of these shows neutral; words of it count all the same.
    assert sample_hit("He looks composed.", "neutral", BY_HAND) == 1.0
    assert sample_hit("He looks gloomy.", "neutral", BY_HAND) == 0.0


def test_sample_hit_refuses_a_truth_on_no_wheel() -> None:
    with pytest.raises(ValueError, match="'hapy'.*near: happy"):
        sample_hit("happy", "hapy")
    with pytest.raises(ValueError, match="'neutral' lies on no wheel under mapping='official'"):
        sample_hit("happy", "neutral", mapping="official")


def test_token_hit_rate_counts_repeats_and_no_negated_word() -> None:
    assert token_hit_rate("happy, happy and sad", "joy") == pytest.approx(2 / 3)
    assert token_hit_rate("happy, not sad", "happy") == 1.0
    assert token_hit_rate("a table", "happy") == 0.0
    with pytest.raises(ValueError, match="'table'.*happy, sad"):
        token_hit_rate("a table", "table")


@given(samples, st.sampled_from(["official", "direct"]), st.sampled_from(["level1", "level2"]))
def test_scores_stay_in_bounds_and_ignore_order_and_repeats(
    drawn: dict[str, tuple[list[str], list[str]]], mapping: str, level: str
) -> None:
    truths = {name: truth for name, (truth, _) in drawn.items()}
    guesses = {name: guess for name, (_, guess) in drawn.items()}
    score = open_vocabulary_score(truths, guesses, mapping=mapping, level=level)
    turned = {name: [*reversed(guess), *guess] for name, guess in guesses.items()}
    assert open_vocabulary_score(truths, turned, mapping=mapping, level=level) == score
    for value in (score.f_score, score.precision, score.recall, hit_rate(truths, guesses)):
        assert 0.0 <= value <= 1.0
    for wheel in score.per_wheel:
        assert min(wheel.precision, wheel.recall) - 1e-12 <= wheel.f_score <= max(wheel.precision, wheel.recall) + 1e-12
    perfect = open_vocabulary_score(truths, truths, mapping=mapping, level=level)
    assert all(wheel.f_score == pytest.approx(1.0) for wheel in perfect.per_wheel if wheel.counted)


@needs_original
@pytest.mark.parametrize("number", range(33))
def test_golden_cases_of_the_original_metric(number: int) -> None:
    wheels, case = original(), golden()["cases"][number]
    if case["kind"] != "open_vocabulary":
        assert wheels.hit_rate(case["gt"], case["pred"], mapping="official") == pytest.approx(
            case["hit_rate"], abs=1e-9
        )
        return
    for level in ("level1", "level2"):
        wanted = case[level]
        score = wheels.open_vocabulary_score(case["gt"], case["pred"], level=level, mapping="official")
        for wheel, (precision, recall) in zip(score.per_wheel, wanted["per_wheel_precision_recall"], strict=True):
            assert wheel.precision == pytest.approx(precision, abs=1e-9)
            assert wheel.recall == pytest.approx(recall, abs=1e-9)
        assert score.precision == pytest.approx(wanted["precision_s"], abs=1e-9)
        assert score.recall == pytest.approx(wanted["recall_s"], abs=1e-9)
        # None marks 0/0, which counts 0 here and NaN there.
        if wanted["F_s"] is not None:
            assert score.f_score == pytest.approx(wanted["F_s"], abs=1e-9)


@needs_original
def test_every_list_string_of_the_original_is_split_alike() -> None:
    for text, items in golden()["string_to_list"]:
        assert EmotionWheels.string_to_list(text) == items


@needs_original
def test_the_direct_mapping_parts_fear_from_happy_and_the_official_one_does_not() -> None:
    wheels = original()
    assert wheels.hit_rate({"a": "fear"}, {"a": "happy"}, mapping="official") == pytest.approx(0.4)
    assert wheels.hit_rate({"a": "fear"}, {"a": "happy"}, mapping="direct") == 0.0
    assert wheels.hit_rate({"a": "happy"}, {"a": "joy"}, mapping="direct") == 1.0
    # Wheel 4 files surprise under fear, whatever the mapping.
    assert sample_hit(["surprise"], "fear", wheels) == pytest.approx(0.2)
    assert sample_hit(["fear"], "surprise", wheels) == pytest.approx(0.25)
    assert wheels.hit_rate({"a": "neutral"}, {"a": "neutral"}, mapping="official") == 0.0


@pytest.mark.parametrize("odd", [float("nan"), 3, ["sad", float("nan")], [None]])
def test_answer_that_is_no_text_is_named(odd: object) -> None:
    """A table has NaN where an answer is missing."""
    truths, answers = {"a": "happy", "b": "sad"}, {"a": "happy", "b": odd}
    for score in (hit_rate, open_vocabulary_score):
        with pytest.raises(ValueError, match="Predictions must be texts or lists of labels.* not so: 'b': "):
            score(truths, answers)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="Truths must be texts or lists of labels.* not so: 'b': "):
            score(answers, truths)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Predictions .* not so: 'b'"):
        sentiment_score({"a": 1.0, "b": -1.0}, answers)  # type: ignore[arg-type]
    assert hit_rate(truths, {"a": "happy", "b": None}) == hit_rate(truths, {"a": "happy", "b": ""})  # type: ignore[dict-item]
