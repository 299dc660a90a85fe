"""Random controls: as many units in the same layers, none of the chosen, of the same size where asked."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import BY_NAME, native_model
from tests.circuits.tiny import ready
from veena_lens.emotion.enhance.random_controls import neuron_sizes, random_directions, random_heads, random_neurons
from veena_lens.positions import position_mask

CFG: Any = native_model(BY_NAME["clip-llama"], casts="none").cfg  # 2 layers of 6 heads and 96 neurons


@given(
    heads=st.sets(st.tuples(st.integers(0, 1), st.integers(0, 5)), min_size=1, max_size=12),
    seed=st.integers(0, 9),
)
def test_every_draw_has_as_many_heads_in_each_layer_and_avoids_the_chosen_while_there_is_room(
    heads: set[tuple[int, int]], seed: int
) -> None:
    found = random_heads(sorted(heads), CFG, draws=5, seed=seed)
    wanted = Counter(layer for layer, _ in heads)
    shared = {layer: max(0, 2 * n - 6) for layer, n in wanted.items()}
    for draw in found:
        assert len(set(draw)) == len(draw)
        assert Counter(layer for layer, _ in draw) == wanted
        assert Counter(layer for layer, head in draw if (layer, head) in heads) == Counter(shared)
    assert dict(found.crowded) == {layer: n for layer, n in shared.items() if n}
    assert list(found) == list(random_heads(sorted(heads), CFG, draws=5, seed=seed)), "the seed repeats the draws"


def test_the_report_says_where_there_was_no_room_and_how_many_draws_differ() -> None:
    found = random_heads([(0, 0), (1, 0), (1, 1), (1, 2), (1, 3)], CFG, draws=20)
    assert len(found) == 20 and found.crowded == ((1, 2),)
    assert "20 draws of 5 heads" in repr(found) and "layer 1" in repr(found) and "2 of its chosen" in repr(found)
    only = random_heads([(0, 0), (0, 1), (0, 2)], CFG, draws=20)
    assert only.n_distinct == 1 and not only.crowded, "three others are all there is"
    assert random_heads([(0, 3)], CFG, draws=20).n_distinct > 3


def test_negative_layers_and_heads_count_from_the_end() -> None:
    assert list(random_heads([(-1, -1)], CFG, seed=3)) == list(random_heads([(1, 5)], CFG, seed=3))


def test_random_heads_reach_every_other_head_about_equally_often() -> None:
    counts = Counter(draw[0][1] for draw in random_heads([(0, 2)], CFG, draws=2000))
    assert set(counts) == {0, 1, 3, 4, 5} and max(counts.values()) - min(counts.values()) < 120


def test_matched_neurons_are_among_the_eight_nearest_in_size() -> None:
    sizes = torch.arange(1, 97).float().exp2()[None].repeat(2, 1)  # log sizes one apart
    found = random_neurons([(1, 50)], CFG, draws=200, sizes=sizes)
    assert {neuron for draw in found for _, neuron in draw} == {46, 47, 48, 49, 51, 52, 53, 54}
    unmatched = random_neurons([(1, 50)], CFG, draws=200)
    assert len({neuron for draw in unmatched for _, neuron in draw}) > 60


@given(neurons=st.sets(st.tuples(st.integers(0, 1), st.integers(0, 95)), min_size=1, max_size=40), seed=st.integers(0))
def test_matched_neurons_are_as_many_and_others_also_where_sizes_are_zero(
    neurons: set[tuple[int, int]], seed: int
) -> None:
    sizes = torch.rand(2, 96, generator=torch.Generator().manual_seed(seed % 1000))
    sizes[:, :30] = 0
    (draw,) = random_neurons(sorted(neurons), CFG, draws=1, seed=seed % 1000, sizes=sizes)
    assert Counter(layer for layer, _ in draw) == Counter(layer for layer, _ in neurons)
    assert not set(draw) & neurons and len(set(draw)) == len(draw)


@pytest.mark.parametrize("name", ["three-images-and-none", "text-qwen3", "qwen2_vl-image-and-video"])
def test_a_neurons_size_is_its_mean_activation_times_the_norm_of_what_it_writes(name: str, model_of) -> None:
    model, inputs = ready(model_of, name)
    sizes = neuron_sizes(model, inputs, "query")
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    at = position_mask(inputs, "query")
    for layer in range(model.cfg.n_layers):
        by_hand = cache["post", layer][at].abs().mean(0) * model.W_out[layer].norm(dim=-1)
        torch.testing.assert_close(sizes[layer].double(), by_hand.double(), rtol=1e-5, atol=1e-8)
    with pytest.raises(ValueError, match="'generated' select nothing"):
        neuron_sizes(model, inputs, "generated")


def test_random_directions_keep_each_layers_norm_and_differ() -> None:
    direction = torch.randn(3, 192) * torch.tensor([[1.0], [5.0], [0.0]])
    found = random_directions(direction, draws=4, seed=2)
    assert found.shape == (4, 3, 192) and found.dtype == direction.dtype
    torch.testing.assert_close(found.norm(dim=-1), direction.norm(dim=-1).expand(4, 3))
    cosines = torch.cosine_similarity(found[0, :2], found[1, :2], dim=-1)
    assert cosines.abs().max() < 0.4
    assert torch.equal(random_directions(direction, draws=4, seed=2), found)


def test_what_cannot_be_matched_raises_and_names_it() -> None:
    with pytest.raises(ValueError, match="empty"):
        random_heads([], CFG)
    with pytest.raises(ValueError, match="head 6 does not exist; there are 6"):
        random_heads([(0, 6)], CFG)
    with pytest.raises(ValueError, match="layer 2 does not exist"):
        random_neurons([(2, 0)], CFG)
    with pytest.raises(ValueError, match=r"\(0, 1\).*more than once"):
        random_heads([(0, 1), (0, 1)], CFG)
    with pytest.raises(ValueError, match="draws=0"):
        random_heads([(0, 1)], CFG, draws=0)
    with pytest.raises(ValueError, match="draws=0"):
        random_directions(torch.ones(3), draws=0)
    with pytest.raises(ValueError, match=r"\[2 96\].*\[2, 3\]"):
        random_neurons([(0, 1)], CFG, sizes=torch.ones(2, 3))
