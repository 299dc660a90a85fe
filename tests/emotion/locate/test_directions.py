"""Directions: sums by hand, streamed against all at once, stops and restarts, controls, and steering with them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from veena_lens import HookedVLM
from veena_lens.emotion import study
from veena_lens.emotion.locate import pair_states
from veena_lens.emotion.locate.directions import (
    Directions,
    Selected,
    TooFewPairs,
    directions_from,
    extract_directions,
    noise_directions,
    person_directions,
    select_pairs,
    shuffled_directions,
    swapped_directions,
)
from veena_lens.emotion.locate.pair_states import PairHits, halves_of
from veena_lens.emotion.methods import generate_answers, prepared
from veena_lens.emotion.pairs.loading import Example, Pair, PairSet, load_pairs
from veena_lens.emotion.words.wheels import sample_hit

QUESTION = "name the emotions of the person in the picture."
EMOTIONS = ["happy", "angry"]


# --- sums, on states made up ----------------------------------------------------------------------------


def made_up(
    labels: list[str],
    emotional: Float[Tensor, "pair layer d_model"],
    neutral: Float[Tensor, "pair layer d_model"],
    size: int,
) -> Selected:
    """Pairs with given states, in batches of `size`; each pair is a person of its own."""
    pairs = []
    for i, label in enumerate(labels):
        one = Example(picture=Image.new("RGB", (2, 2)), emotion=label, question="how?", identity=f"p{i}", pair=f"{i}")
        pairs.append(Pair(one, Example(picture=one.picture, emotion="neutral", question="how?", identity=f"p{i}")))
    n = len(pairs)
    ones = torch.ones(n, dtype=torch.float64)
    hits = PairHits(pairs=pairs, emotional=ones, neutral=ones * 0, said=[("", "")] * n)
    batches = [list(range(i, min(i + size, n))) for i in range(0, n, size)]
    _, layers, width = emotional.shape
    return Selected(
        model=SimpleNamespace(cfg=SimpleNamespace(n_layers=layers, d_model=width, model_name="made up")),
        hits=hits,
        chosen=list(range(n)),
        states=[(mine, emotional[mine], neutral[mine]) for mine in batches],
        settings={},
    )


def by_hand() -> Selected:
    s = torch.tensor([[2.0, 0], [4, 0], [0, 3]])[:, None]
    neutral = torch.tensor([[1.0, 1], [1, 1], [4, 0]])[:, None]
    return made_up(["happy", "happy", "sad"], neutral + s, neutral, 2)


def test_directions_by_hand() -> None:
    found = directions_from(by_hand())
    assert found.counts == {"happy": 2, "sad": 1}
    torch.testing.assert_close(found.of("happy"), torch.tensor([[3.0, 0]], dtype=torch.float64))
    torch.testing.assert_close(found.of("sad"), torch.tensor([[0.0, 3]], dtype=torch.float64))
    torch.testing.assert_close(found.overall, torch.tensor([[1.5, 1.5]], dtype=torch.float64))
    torch.testing.assert_close(found.measured["plain"], torch.tensor([[2.0, 1]], dtype=torch.float64))
    torch.testing.assert_close(found.contrast("happy"), torch.tensor([[1.5, -1.5]], dtype=torch.float64))
    torch.testing.assert_close(found.neutral_mean, torch.tensor([[2.5, 0.5]], dtype=torch.float64))
    torch.testing.assert_close(found.emotional_mean - found.neutral_mean, found.overall)
    norms = [2**0.5, 2**0.5, 4.0, 10**0.5, 26**0.5, 5.0]
    assert found.norms.item() == pytest.approx(sum(norms) / 6)


def test_quality_by_hand() -> None:
    found = directions_from(by_hand())
    spread = found.spread().values.flatten()
    assert spread[0].item() == pytest.approx(1 / 3)  # differences 2 and 4 around 3
    assert spread[1].item() == 0
    assert spread[2].item() == pytest.approx((29 / 3 - 5) ** 0.5 / 5**0.5)
    agreement = found.agreement()
    assert agreement.select(direction="happy").values.item() == pytest.approx(1)
    assert agreement.select(direction="overall").values.item() == pytest.approx(1 / 3)
    assert not bool(agreement.exists[1].any())  # one pair agrees with nobody
    assert found.cosines().select(emotion="happy", other="sad").values.item() == pytest.approx(0)
    assert found.massive().tolist() == [[0]]
    assert found.cosines(trimmed=True).select(emotion="happy", other="happy").values.item() == pytest.approx(0)
    assert found.strength().select(direction="sad").values.item() == pytest.approx(3 / found.norms.item())


@given(n=st.integers(8, 20), size=st.integers(1, 20), seed=st.integers(0, 100))
def test_streamed_sums_equal_all_at_once(n: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    emotional, neutral = (torch.randn(n, 2, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    labels = [EMOTIONS[i % 2] for i in range(n)]
    found = directions_from(made_up(labels, emotional, neutral, size), seed=seed)
    s = emotional - neutral
    mine = torch.tensor([label == "happy" for label in labels])
    close: Callable[..., None] = torch.testing.assert_close
    each = torch.stack([s[mine].mean(0), s[~mine].mean(0)])
    close(found.per_emotion, each, rtol=1e-12, atol=1e-12)
    close(found.overall, each.mean(0), rtol=1e-12, atol=1e-12)
    close(found.neutral_mean, (neutral[mine].mean(0) + neutral[~mine].mean(0)) / 2, rtol=1e-12, atol=1e-12)
    close(found.norms, torch.cat([emotional, neutral]).norm(dim=-1).mean(0), rtol=1e-12, atol=1e-12)
    rms = (s[mine] - each[0]).square().sum(-1).mean(0).sqrt() / each[0].norm(dim=-1)
    close(found.spread().values[0], rms, rtol=1e-10, atol=1e-10)
    unit = s / s.norm(dim=-1, keepdim=True)
    cosines = torch.einsum("ild, jld -> lij", unit, unit)
    close(found.agreement().values[-1], (cosines.sum((1, 2)) - n) / (n * (n - 1)), rtol=1e-10, atol=1e-10)
    cosines = []
    for half in halves_of([f"p{i}" for i in range(n)], 50, seed):
        if not 0 < int((half & mine).sum()) < int(mine.sum()) or not 0 < int((half & ~mine).sum()) < int((~mine).sum()):
            continue
        a, b = ((s[side & mine].mean(0) + s[side & ~mine].mean(0)) / 2 for side in (half, ~half))
        cosines.append(torch.cosine_similarity(a, b, dim=-1))
    r = torch.stack(cosines).mean(0)
    close(found.split_half().values[-1], 2 * r / (1 + r.abs()), rtol=1e-9, atol=1e-9)


def test_no_more_than_two_batches_are_held_however_many_there_are() -> None:
    zero = torch.zeros(40, 2, 3, dtype=torch.float64)
    selected = made_up(["happy"] * 40, zero + 1, zero, 2)
    held: list[weakref.ref[Tensor]] = []
    most = 0

    def batches() -> Iterator[Any]:
        nonlocal most
        for mine, emotional, neutral in selected.states:
            one = emotional.clone()
            held.append(weakref.ref(one))
            most = max(most, sum(ref() is not None for ref in held))
            yield mine, one, neutral
            del one

    found = directions_from(replace(selected, states=batches()))
    assert found.counts == {"happy": 40}
    assert len(held) == 20
    assert most <= 2


def test_halves_never_part_a_person_and_are_as_large() -> None:
    people = [f"person {i // 3}" for i in range(30)]
    halves = halves_of(people, 20, 0)
    for half in halves:
        assert int(half.sum()) == 15
        assert all(len(set(half[i : i + 3].tolist())) == 1 for i in range(0, 30, 3))
    assert len({tuple(half.tolist()) for half in halves}) > 15


def test_noise_has_no_split_half_cosine_and_a_shared_shift_has() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(40, 1, 50, dtype=torch.float64, generator=generator)
    zero = torch.zeros_like(noise)
    alone = directions_from(made_up(["happy"] * 40, noise, zero, 8))
    shifted = directions_from(made_up(["happy"] * 40, noise + 1, zero, 8))
    assert abs(alone.split_half().values[0].item()) < 0.4
    assert shifted.split_half().values[0].item() > 0.95


# --- vectors, files ---------------------------------------------------------------------------------------


def test_scales_and_the_intervention_they_make() -> None:
    found = directions_from(by_hand())
    assert found.unit("happy").norm().item() == pytest.approx(1)
    assert found.vectors("relative", "happy").norm().item() == pytest.approx(found.norms.item())
    assert found.vectors("raw") is found.overall
    steer = found.steer(-1, 0.5, "sad", scale="raw", positions="last")
    assert (steer.layer, steer.alpha, steer.positions) == (0, 0.5, "last")
    torch.testing.assert_close(steer.vector, found.of("sad")[0])
    with pytest.raises(ValueError, match="scale='big' must be one of relative, raw, unit"):
        found.vectors("big")
    with pytest.raises(ValueError, match="No direction for 'proud'; there are happy, sad"):
        found.of("proud")


def test_saved_directions_come_back_to_the_bit(tmp_path: Path) -> None:
    found = directions_from(by_hand())
    back = Directions.load(found.save(tmp_path / "d.safetensors"))
    for name in ("overall", "per_emotion", "norms", "neutral_mean", "emotional_mean"):
        assert torch.equal(getattr(back, name), getattr(found, name))
    assert all(torch.equal(back.measured[k].nan_to_num(), v.nan_to_num()) for k, v in found.measured.items())
    assert (back.meta, dict(back.counts), list(back.emotions)) == (found.meta, found.counts, ["happy", "sad"])
    back.strength().save(tmp_path / "scores.safetensors")
    with pytest.raises(ValueError, match="holds no Directions"):
        Directions.load(tmp_path / "scores.safetensors")
    with pytest.raises(FileNotFoundError, match="No directions at"):
        Directions.load(tmp_path / "none")


def test_fingerprint_knows_the_vectors_alone(tmp_path: Path) -> None:
    found = directions_from(by_hand())
    assert Directions.load(found.save(tmp_path / "d.safetensors")).fingerprint == found.fingerprint
    assert found.fingerprint != noise_directions(found).fingerprint
    torch.testing.assert_close(found.at(-1, "sad"), found.of("sad")[0])


def test_curve_of_strengths_has_a_line_a_direction() -> None:
    lines = directions_from(by_hand()).plot().axes[0].get_lines()
    assert {line.get_label() for line in lines} >= {"happy", "sad", "overall"}


def test_words_tell_numbers_and_doubts() -> None:
    found = directions_from(by_hand())
    assert "3 pairs" in repr(found)
    assert "fewer than 30 pairs: happy 2, sad 1" in repr(found)
    table = found.summary()
    assert table["pairs"].tolist() == [2, 1, 3]
    assert table["norm"].tolist() == pytest.approx([3, 3, 4.5**0.5])


def test_directions_of_another_size_are_refused() -> None:
    found = directions_from(by_hand())
    with pytest.raises(ValueError, match="1 layers of width 2 .*other has 8 of 2"):
        found.check(SimpleNamespace(cfg=SimpleNamespace(n_layers=8, d_model=2, model_name="other")))


# --- controls ---------------------------------------------------------------------------------------------


def test_swapping_every_pair_negates_the_direction() -> None:
    real = directions_from(by_hand())
    swapped = swapped_directions(by_hand(), share=1)
    assert torch.equal(swapped.overall, -real.overall)
    assert torch.equal(swapped.neutral_mean, real.emotional_mean)
    assert torch.equal(swapped_directions(by_hand(), share=0).per_emotion, real.per_emotion)
    with pytest.raises(ValueError, match="share=2"):
        swapped_directions(by_hand(), share=2)


def test_swapping_half_leaves_little_of_a_shared_shift() -> None:
    noise = torch.randn(200, 1, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    selected = made_up(["happy"] * 200, noise + 1, torch.zeros_like(noise), 64)
    real, swapped = directions_from(selected), swapped_directions(selected, seed=1)
    assert swapped.overall.norm() < 0.2 * real.overall.norm()


def test_shuffled_labels_keep_the_sum_and_lose_the_contrast() -> None:
    shift = torch.zeros(80, 1, 4, dtype=torch.float64)
    shift[::2, :, 0], shift[1::2, :, 1] = 1, 1
    selected = made_up([EMOTIONS[i % 2] for i in range(80)], shift, torch.zeros_like(shift), 32)
    real, shuffled = directions_from(selected), shuffled_directions(selected)
    assert shuffled.counts == real.counts
    torch.testing.assert_close(shuffled.measured["plain"], real.measured["plain"])
    assert shuffled.contrast("happy").norm() < 0.4 * real.contrast("happy").norm()


def test_random_directions_match_in_norm_alone() -> None:
    wide = torch.randn(8, 2, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    real = directions_from(made_up(["happy", "sad"] * 4, wide, torch.zeros_like(wide), 8))
    drawn, again, other = (noise_directions(real, seed) for seed in (0, 0, 1))
    torch.testing.assert_close(drawn.per_emotion.norm(dim=-1), real.per_emotion.norm(dim=-1))
    assert torch.equal(drawn.overall, again.overall)
    assert not torch.equal(drawn.overall, other.overall)
    assert torch.cosine_similarity(drawn.overall, real.overall, dim=-1).abs().max() < 0.25
    with pytest.raises(ValueError, match=r"random, norms matched\) have no 'split_half'"):
        drawn.split_half()


def test_directions_of_one_person_are_of_that_person_alone() -> None:
    found = person_directions(by_hand(), "p1")
    assert found.counts == {"happy": 1}
    torch.testing.assert_close(found.overall, torch.tensor([[4.0, 0]], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"no pair of \['nobody'\].*3 people"):
        person_directions(by_hand(), "nobody")


# --- on a model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    return HookedVLM.from_pretrained("tiny-llava-emotion")


@pytest.fixture(scope="module")
def pairs() -> PairSet:
    """Two emotions of eight people, asked so that the answer begins with the emotion."""
    found = load_pairs().select(split="development", emotion=EMOTIONS).without_context()
    people = [f"avataaars-{10000 + i}" for i in range(8)]
    return found.select(identity=people).asked(QUESTION)


@pytest.fixture(scope="module")
def found(model: HookedVLM, pairs: PairSet) -> Directions:
    return extract_directions(model, pairs, minimum=6, max_new_tokens=6, progress=False)


def test_states_are_those_of_the_last_prompt_token(model: HookedVLM, pairs: PairSet) -> None:
    examples = [pairs[0].emotional, pairs[1].neutral.asked("how does the person in the picture feel?")]
    states, _ = pair_states.states_of(model, examples, "last", 2)
    for example, state in zip(examples, states, strict=True):
        inputs = prepared(model, [example])
        _, cache = model.run_with_cache(inputs)
        last = inputs.spans[0].last
        alone = torch.stack([cache["resid_post", layer][0, last] for layer in range(model.cfg.n_layers)])
        torch.testing.assert_close(state, alone, rtol=1e-4, atol=1e-4)


def test_lead_in_moves_the_state_to_its_last_token(model: HookedVLM, pairs: PairSet) -> None:
    states, _ = pair_states.states_of(model, [pairs[0].emotional], "last", 2, "the person feels")
    inputs = prepared(model, [pairs[0].emotional], lead_in="the person feels")
    _, cache = model.run_with_cache(inputs)
    assert inputs.spans[0].last < inputs.shape[1] - 1
    torch.testing.assert_close(states[0, 3], cache["resid_post", 3][0, -1], rtol=1e-4, atol=1e-4)


def test_query_states_are_the_mean_over_the_question(model: HookedVLM, pairs: PairSet) -> None:
    states, _ = pair_states.states_of(model, [pairs[0].emotional], "query", 2)
    inputs = prepared(model, [pairs[0].emotional])
    _, cache = model.run_with_cache(inputs)
    torch.testing.assert_close(
        states[0, 3], cache["resid_post", 3][0, inputs.spans[0].query].mean(0), rtol=1e-4, atol=1e-4
    )


def test_directions_of_the_embedded_model_agree_over_halves(found: Directions) -> None:
    assert found.split_half().values.min() > 0.9
    assert found.agreement().select(direction="angry").values.min() > 0.3
    assert found.counts["happy"] == 8
    dropped = found.meta["dropped"]["angry"]
    assert found.counts["angry"] + sum(dropped.values()) == 8


def test_steering_neutral_pictures_of_others_names_the_emotion(model: HookedVLM, found: Directions) -> None:
    others = load_pairs().select(split="test").without_context().asked(QUESTION).neutrals[:8]
    plain = generate_answers(model, others, max_new_tokens=6)
    layer = 5
    for emotion in EMOTIONS:
        with model.intervene([found.steer(layer, 1.5, emotion, scale="raw")]):
            steered = generate_answers(model, others, max_new_tokens=6)
        with model.intervene([noise_directions(found).steer(layer, 1.5, emotion, scale="raw")]):
            noise = generate_answers(model, others, max_new_tokens=6)
        before, after, control = (
            sum(sample_hit(text, emotion) > 0.5 for text in texts) for texts in (plain, steered, noise)
        )
        assert before == 0
        assert after >= 7
        assert control <= 1


def test_batch_sizes_agree(model: HookedVLM, pairs: PairSet, found: Directions) -> None:
    other = extract_directions(model, pairs, minimum=6, max_new_tokens=6, batch_size=5, progress=False)
    torch.testing.assert_close(other.per_emotion, found.per_emotion, rtol=1e-3, atol=1e-3)
    assert other.counts == found.counts


class _Stopped(Exception):
    pass


def test_stopped_run_goes_on_to_the_same_bits(
    model: HookedVLM, pairs: PairSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = dict(minimum=6, max_new_tokens=6, batch_size=6, progress=False)
    whole = extract_directions(model, pairs, **settings)
    calls = {"generate_answers": 0, "states_of": 0}

    def counting(name: str, last: int) -> None:
        module = study if name == "generate_answers" else pair_states
        real = getattr(module, name)

        def run(*args: Any, **more: Any) -> Any:
            calls[name] += 1
            if calls[name] == last:
                raise _Stopped
            return real(*args, **more)

        monkeypatch.setattr(module, name, run)

    for name in calls:
        calls.update(generate_answers=0, states_of=0)
        with monkeypatch.context(), pytest.raises(_Stopped):
            counting(name, 2)
            extract_directions(model, pairs, store=tmp_path, **settings)
        monkeypatch.undo()
    calls.update(generate_answers=0, states_of=0)
    for name in calls:
        counting(name, -1)
    again = extract_directions(model, pairs, store=tmp_path, **settings)
    assert calls == {"generate_answers": 0, "states_of": 2}  # of three batches each
    for name in ("overall", "per_emotion", "norms", "neutral_mean"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    assert torch.equal(again.measured["split_half"], whole.measured["split_half"])
    calls.update(generate_answers=0, states_of=0)
    selected = select_pairs(model, pairs, store=tmp_path, **settings)
    assert torch.equal(swapped_directions(selected, share=1).overall, -whole.overall)
    assert calls == {"generate_answers": 0, "states_of": 0}


def test_too_few_pairs_say_how_many_and_which_tau(model: HookedVLM, pairs: PairSet) -> None:
    with pytest.raises(TooFewPairs, match=r"tau=0.5: happy: 4 of 4; angry: \d of 4; 8 are needed") as caught:
        extract_directions(model, pairs[:8], max_new_tokens=6, progress=False)
    assert caught.value.counts["happy"] == 4


def test_filter_wants_the_emotion_on_the_picture_and_not_on_its_twin() -> None:
    happy = by_hand().hits.pairs
    hits = PairHits(
        pairs=happy,
        emotional=torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64),
        neutral=torch.tensor([0.5, 0.0, 0.75], dtype=torch.float64),
        said=[("", "")] * 3,
    )
    assert hits.kept(0.5) == [0]
    assert hits.kept(0.5, require_neutral=False) == [0, 2]
    assert hits.dropped(0.5)["happy"] == {"not named on the emotional picture": 1, "named on its twin": 0}
    assert hits.dropped(0.5)["sad"] == {"not named on the emotional picture": 0, "named on its twin": 1}


def test_every_pair_is_taken_and_none_asked_with_a_tau_below_0(
    model: HookedVLM, pairs: PairSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(study, "generate_answers")
    found = extract_directions(model, pairs[:4], tau=-1, require_neutral=False, minimum=2, progress=False)
    assert found.counts == {"happy": 2, "angry": 2}


def test_contexts_are_left_out_unless_asked_for(model: HookedVLM, pairs: PairSet) -> None:
    pair = pairs[0].with_context("the person lost a friend.", "sad", "plain")
    bare = select_pairs(model, PairSet((pair,)), minimum=1, max_new_tokens=6, progress=False)
    assert bare.pairs[0].emotional.context is None
    told = select_pairs(model, PairSet((pair,)), tau=0, minimum=1, contexts=True, max_new_tokens=6, progress=False)
    assert told.pairs[0].emotional.context == "the person lost a friend."


def test_twins_of_other_tokens_are_refused(model: HookedVLM, pairs: PairSet, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pair_states.states_of

    def longer(*args: Any) -> Any:
        states, tokens = real(*args)
        return states, [(*row, i) for i, row in enumerate(tokens)]

    monkeypatch.setattr(pair_states, "states_of", longer)
    with pytest.raises(ValueError, match="twins of pair 'development-10000'.*same size"):
        extract_directions(model, pairs[:2], minimum=1, max_new_tokens=6, progress=False)


def test_settings_out_of_range_are_refused(pairs: PairSet) -> None:
    def run(**settings: Any) -> None:
        extract_directions(None, pairs, progress=False, **settings)

    with pytest.raises(ValueError, match="tau=1 must lie in"):
        run(tau=1)
    with pytest.raises(ValueError, match="batch_size=0"):
        run(batch_size=0)
    with pytest.raises(ValueError, match="positions='image' must be one of last, query"):
        run(positions="image")
    with pytest.raises(ValueError, match="goes with positions='last'"):
        run(positions="query", lead_in="the person feels")
    with pytest.raises(ValueError, match="holds no pairs"):
        extract_directions(None, [], progress=False)
