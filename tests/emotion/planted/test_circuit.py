"""A planted circuit is what it says: only its heads write the directions, and its neurons name the emotion."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from veena_lens.circuits.reading import read
from veena_lens.emotion.methods import generate_answers, prepared
from veena_lens.emotion.pairs.loading import PairSet, load_pairs
from veena_lens.emotion.planted.circuit import Plant, plant_circuit

WORDS = {"happy": ("happy", "joyful"), "angry": ("angry", "furious")}


@cache
def model() -> Any:
    from veena_lens import HookedVLM

    return HookedVLM.from_pretrained("tiny-llava-emotion")


@cache
def pairs() -> PairSet:
    """Some people's pairs of two emotions."""
    found = load_pairs().select(split="development", emotion=list(WORDS), condition="none")
    return found.select(identity=found.identities[:8])


@cache
def plant() -> Plant:
    return plant_circuit(model(), pairs(), WORDS, general=2, specific=1, neurons=1, seed=3)


def writers(p: Plant) -> list[tuple[int, int]]:
    """Heads whose output weights have any part along a planted direction."""
    found = []
    for layer, block in enumerate(p.model.blocks):
        along = (block.attn.W_O.detach().double() @ p.directions.T).norm(dim=(1, 2))
        found += [(layer, head) for head in range(len(along)) if along[head] > 1e-4]
    return found


def test_planted_heads_alone_write_the_directions() -> None:
    p = plant()
    assert writers(p) == list(p.heads) and len(p.heads) == 4 and p.layer == 4
    assert max(layer for layer, _ in p.heads) == p.layer
    for block in p.model.blocks:
        assert (block.mlp.W_out.detach().double() @ p.directions.T).abs().max() < 1e-4


def test_each_head_writes_only_for_the_emotions_that_it_serves() -> None:
    p = plant()
    assert len(p.general) == 2
    for (layer, head), served in p.heads.items():
        along = (p.model.blocks[layer].attn.W_O[head].detach().double() @ p.directions.T).norm(dim=0)
        assert [e for e, size in zip(p.emotions, along, strict=True) if size > 1e-4] == list(served)


def test_pairs_are_pushed_along_their_own_direction_by_the_gain() -> None:
    p = plant()
    name = f"blocks.{p.layer}.hook_resid_post"
    states = []
    for side in ("emotional", "neutral"):
        inputs = prepared(p.model, [getattr(pair, side) for pair in pairs()])
        states.append(read(inputs, [name], "last", p.model, "test")[name][:, 0].double())
    pushed = (states[0] - states[1]) @ p.directions.T  # [pair emotion]
    for i, emotion in enumerate(p.emotions):
        own = torch.tensor([pair.emotion == emotion for pair in pairs()])
        assert pushed[own, i].mean() == pytest.approx(p.gain, rel=0.05)  # decoys change what heads see a little
        assert pushed[~own, i].mean().abs() < 0.25 * p.gain


def test_model_names_the_planted_emotion_and_the_original_is_untouched() -> None:
    before = model().blocks[3].attn.o.weight.detach().clone()
    p = plant()
    said = generate_answers(p.model, [pair.emotional for pair in pairs()], max_new_tokens=1)
    right = [text.strip() in WORDS[pair.emotion] for text, pair in zip(said, pairs(), strict=True)]
    twins = generate_answers(p.model, [pair.neutral for pair in pairs()], max_new_tokens=1)
    false = [text.strip() in WORDS[pair.emotion] for text, pair in zip(twins, pairs(), strict=True)]
    assert sum(right) / len(right) > 0.6 > 0.2 > sum(false) / len(false)
    assert torch.equal(before, model().blocks[3].attn.o.weight)


def test_same_seed_plants_the_same_and_another_elsewhere() -> None:
    few = pairs().select(identity=pairs().identities[:2])
    first, again, other = (plant_circuit(model(), few, WORDS, general=1, neurons=1, seed=s) for s in (5, 5, 6))
    assert first.heads == again.heads and first.neurons == again.neurons and first.heads != other.heads
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_no_room_no_pairs_or_no_words_are_refused() -> None:
    with pytest.raises(ValueError, match="layer=7 must leave a layer"):
        plant_circuit(model(), pairs(), WORDS, layer=7)
    with pytest.raises(ValueError, match="heads do not fit layers 1"):
        plant_circuit(model(), pairs(), WORDS, general=40)
    with pytest.raises(ValueError, match="none of sad"):
        plant_circuit(model(), pairs(), {**WORDS, "sad": ("sad",)})
    with pytest.raises(ValueError, match="two emotions or more"):
        plant_circuit(model(), pairs(), {"happy": ("happy",)})
