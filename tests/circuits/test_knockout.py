"""Knockout sweeps against hand-masked forwards in float64, and on rows of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.circuits.runs import GEMMA3, LLAVA, NEXT, QWEN3, TEXT, difference, pair_of
from veena_lens.circuits.knockout import attention_knockout
from veena_lens.interventions import Box, Tile
from veena_lens.sweeps.metrics import log_prob, project

EXACT: dict[str, Any] = dict(rtol=1e-10, atol=1e-10)


@torch.no_grad()
def by_hand(
    model: Any, row: Any, keys: Any, queries: Any, layers: Any, heads: Any = None, metric: Any = difference
) -> float:
    """The metric's change when scores are set to minus infinity in whole forwards of one row."""
    row = row.without_padding()
    heads = range(model.cfg.n_heads) if heads is None else heads

    def mask(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        out = scores.clone()
        for head in heads:
            for query in queries:
                out[0, head, query, keys] = -torch.inf
        return out

    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", mask) for layer in layers]
    return float(metric(model.run_with_hooks(row, fwd_hooks=hooks)[:, -1])[0] - metric(model(row)[:, -1])[0])


def spans(row: Any) -> dict[str, list[int]]:
    row = row.without_padding()
    n = row.shape[1]
    query = list(range(n))[row.spans[0].query]
    return {"image": row.image_mask[0].nonzero().flatten().tolist(), "query": query, "last": [n - 1]}


@pytest.mark.parametrize("name", [LLAVA, NEXT, "qwen2_vl-plain", QWEN3, "right-padding"])
def test_cuts_equal_masked_forwards(name: str, model_of) -> None:
    model, clean, _ = pair_of(model_of, name)
    rows = [i for i, n in enumerate(clean.n_images) if n]
    inputs = clean[rows]
    found = attention_knockout(model, inputs, metric=difference, relative=False, max_rows=4)
    assert found.axes == ("pair", "cut", "layer")
    assert found.labels["cut"] == ["image -> query", "query -> last", "image -> last"]
    for i in range(len(inputs)):
        at = spans(inputs[i])
        pairs = [(at["image"], at["query"]), (at["query"][:-1], at["last"]), (at["image"], at["last"])]
        for c, (keys, queries) in enumerate(pairs):
            for layer in range(model.cfg.n_layers):
                truth = by_hand(model, inputs[i], keys, queries, [layer])
                assert float(found.values[i, c, layer]) == pytest.approx(truth, rel=1e-10, abs=1e-10)
    assert float(found.values[:, 0, 0].abs().min()) > 1e-7


def test_cuts_within_an_image_that_reads_itself_equal_masked_forwards(model_of) -> None:
    """Of its last token from its first: a cut that a causal decoder would not have."""
    model, inputs, _ = pair_of(model_of, GEMMA3)
    row = inputs[0].without_padding()
    span = row.spans[0].images[-1]
    keys, queries = [span.stop - 1], [span.start, span.start + 1]
    found = attention_knockout(model, row, [(keys, queries), ("image", "query")], difference, relative=False)
    for layer in range(3):
        truth = by_hand(model, row, keys, queries, [layer])
        assert float(found.values[0, 0, layer]) == pytest.approx(truth, rel=1e-9, abs=1e-11)
    assert float(found.values[0, 0, 0].abs()) > 1e-9
    with pytest.raises(ValueError, match="cuts nothing"):
        attention_knockout(model, row, [([span.stop], [span.start])], difference)


@pytest.mark.parametrize("name", [QWEN3, TEXT])
def test_windows_heads_and_share_of_the_metric(name: str, model_of) -> None:
    model, clean, _ = pair_of(model_of, name)
    metric, n = log_prob(7), model.cfg.n_layers
    cuts = [([0, 1], "last"), (slice(0, 2), slice(2, None))]
    found = attention_knockout(model, clean, cuts, metric, window=2, heads=[0, -1])
    assert found.meta["layers"][-1] == [n - 1] and found.meta["layers"][0] == [0, 1]
    for i in range(len(clean)):
        row = clean[i].without_padding()
        with torch.no_grad():
            base = float(metric(model(row)[:, -1])[0])
        assert found.meta["baseline"][i] == pytest.approx(base, rel=1e-12)
        for c, queries in enumerate([[row.shape[1] - 1], range(2, row.shape[1])]):
            heads = [0, model.cfg.n_heads - 1]
            for layer in range(n):
                within = [layer] if layer == n - 1 else [layer, layer + 1]
                truth = by_hand(model, row, [0, 1], queries, within, heads, metric) / abs(base)
                assert float(found.values[i, c, layer]) == pytest.approx(truth, rel=1e-9, abs=1e-10)
    three = attention_knockout(model, clean, cuts, metric, window=3, layers=[1])
    assert three.labels["layer"] == [1] and three.meta["layers"] == [[0, 1, 2][: n if n < 3 else 3]]


def test_rows_of_a_batch_are_rows_alone(model_of) -> None:
    model, clean, _ = pair_of(model_of, QWEN3)
    cuts = [(0, "last"), ("prompt", "prompt")]
    together = attention_knockout(model, clean, cuts, difference, max_rows=5)
    for i in range(len(clean)):
        alone = attention_knockout(model, clean[i].without_padding(), cuts, difference)
        torch.testing.assert_close(together.values[i], alone.values[0], **EXACT)


def test_boxes_and_tiles_are_cut_like_their_tokens(model_of) -> None:
    model, clean, _ = pair_of(model_of, NEXT)
    tiles = [[k for k, t in enumerate(clean.token_tiles[row][0]) if t == 1] for row in range(2)]
    found = attention_knockout(model, clean, [(Tile(1), "query")], difference, relative=False)
    for row in range(2):
        at = spans(clean[row])
        keys = [at["image"][k] for k in tiles[row]]
        truth = by_hand(model, clean[row], keys, at["query"], [1])
        assert float(found.values[row, 0, 1]) == pytest.approx(truth, rel=1e-10, abs=1e-10)
    from dataclasses import replace

    boxed = replace(
        clean[0], patch_boxes=((torch.arange(4.0).repeat(len(tiles[0]) * 9, 1)[: len(spans(clean[0])["image"])],),)
    )
    everywhere = attention_knockout(model, boxed, [(Box(0, 0, 9, 9), "query"), ("image", "query")], difference)
    torch.testing.assert_close(everywhere.values[:, 0], everywhere.values[:, 1], **EXACT)


def test_a_metric_inside_the_model_ends_the_run_there(model_of) -> None:
    model, clean, _ = pair_of(model_of, LLAVA)
    metric = project("blocks.0.hook_attn_out", torch.randn(48, dtype=torch.float64))
    found = attention_knockout(model, clean[[0, 2]], [("image", "last")], metric, layers=[0], relative=False)
    assert float(found.values.abs().min()) > 1e-6
    with pytest.raises(ValueError, match="the metric reads layer 0"):
        attention_knockout(model, clean[[0, 2]], [("image", "last")], metric)


def test_a_planted_flow_is_found_where_it_was_planted(model_of) -> None:
    """Heads of all layers but one write nothing: cuts act in that layer alone."""
    from tests.cases import BY_NAME, build_hf
    from veena_lens import HookedVLM

    model = HookedVLM.from_hf(build_hf(BY_NAME["window-qwen2"]), casts="none")
    _, clean, _ = pair_of(model_of, "window-qwen2")
    with torch.no_grad():
        for layer in (0, 2):
            model.blocks[layer].attn.o.weight.zero_()
    found = attention_knockout(model, clean, [("prompt", "last")], difference)
    assert found.values[:, 0, [0, 2]].abs().max() == 0 and float(found.values[:, 0, 1].abs().min()) > 1e-6


@pytest.mark.parametrize(
    ("kw", "telling"),
    [
        (dict(cuts=[]), "at least one"),
        (dict(cuts=[("image",)]), "pair"),
        (dict(cuts=[("image", "quarry")]), "quarry"),
        (dict(cuts=[("image", "query")]), "row 1"),
        (dict(cuts=[("last", 0)]), "cuts nothing"),
        (dict(cuts=[(0, "last"), (0, "last")]), "each once"),
        (dict(layers=[5]), "layer 5"),
        (dict(window=0), "window"),
        (dict(heads=[6]), "head 6"),
        (dict(metric=None), "metric="),
        (dict(metric=lambda logits: logits[:, :2]), "one number per row"),
        (dict(metric=lambda logits: logits[:, 0].log() * torch.nan), "not finite"),
        (dict(max_rows=0), "max_rows"),
    ],
)
def test_what_does_not_fit_is_refused(kw: dict[str, Any], telling: str, model_of) -> None:
    model, clean, _ = pair_of(model_of, LLAVA)
    with pytest.raises(ValueError, match=telling):
        attention_knockout(model, clean, **({"cuts": [(0, "last")], "metric": difference} | kw))


def test_the_embedded_model_needs_the_picture_at_the_query() -> None:
    from veena_lens import HookedVLM
    from veena_lens.checkpoints.files import bundled_pictures

    model = HookedVLM.from_pretrained("tiny-llava-emotion")
    faces = [p for p in bundled_pictures("test") if p.emotion == "happy" and p.context is None][:2]
    question = "name the emotions of the person in the picture."
    inputs = model.prepare(text=[question] * 2, images=[[face.open()] for face in faces])
    metric = log_prob(model.to_single_token(" happy"))
    found = attention_knockout(model, inputs, [("image", "query")], metric, window=16, layers=[4])
    assert float(found.values.max()) < 0, "without the picture the emotion's word must lose"
