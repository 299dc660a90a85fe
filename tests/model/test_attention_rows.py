"""`model.attention` and `record_attention`: chosen rows equal those of the pattern, at the memory of a plain run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import BY_NAME, QWEN, Case, build_hf, counted, raw_inputs, relative_error
from veena_lens.positions import position_mask

NAMES = ["clip-llama", "window-mistral", "window-qwen2", "right-padding", "three-images-and-none", "one-kv-head"]


@pytest.fixture
def ready(model_of):
    def get(name: str, **kw: Any) -> tuple[Any, Any]:
        model = model_of(BY_NAME[name], **kw)
        return model, model.inputs_from_hf(**counted(raw_inputs(BY_NAME[name])))

    return get


def rows_of(cache: Any, layer: int, row: int, queries: Tensor, keys: Tensor) -> Tensor:
    return cache["pattern", layer][row][:, queries][:, :, keys]


@pytest.fixture(
    params=[
        Case(name=f"attention-{padding}", family=family, rows=("2 i4x4 3 v2x2x4 2", "1 i2x6 3", "4"), padding=padding)
        for family in QWEN
        for padding in ("left", "right")
    ],
    ids=str,
)
def any_size(request: pytest.FixtureRequest, model_of) -> tuple[Any, Any]:
    """A model and images of unequal size, frames of a video and text alone."""
    model = model_of(request.param)
    return model, model.inputs_from_hf(**raw_inputs(request.param))


def assert_rows_equal_the_pattern(model: Any, inputs: Any, queries: Any, keys: Any) -> None:
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    scores = model.attention(inputs, queries=queries, keys=keys)
    assert scores.axes == ("batch", "layer", "head", "query", "key")
    q_mask, k_mask = position_mask(inputs, queries), position_mask(inputs, keys)
    assert bool(q_mask.any()) and bool(k_mask.any())
    n_q, n_k = int(q_mask.sum(-1).max()), int(k_mask.sum(-1).max())
    assert scores.values.shape == (len(inputs), model.cfg.n_layers, model.cfg.n_heads, n_q, n_k)
    for row in range(len(inputs)):
        q, k = q_mask[row].nonzero().flatten(), k_mask[row].nonzero().flatten()
        for layer in range(model.cfg.n_layers):
            ours = scores.values[row, layer]
            assert torch.allclose(ours[:, : len(q), : len(k)], rows_of(cache, layer, row, q, k), rtol=1e-9, atol=1e-12)
        there = torch.zeros(n_q, n_k, dtype=torch.bool)
        there[: len(q), : len(k)] = True
        assert torch.equal(scores.exists[row], there.expand_as(scores.exists[row]))
        assert not scores.values[row, :, :, len(q) :].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "queries, keys",
    [
        ("last", "image"),
        ("query", "all"),
        ("image", "image"),
        ([9, -1], "text"),
        (-1, "all"),
        ("all", "all"),
        ("text", "image+query"),
    ],
    ids=str,
)
def test_rows_equal_those_of_the_pattern(name: str, queries: Any, keys: Any, ready) -> None:
    assert_rows_equal_the_pattern(*ready(name), queries, keys)


@pytest.mark.parametrize(
    "queries, keys", [("last", "image"), ("query", "all"), ("image", "image"), (6, "text"), ("all", "all")], ids=str
)
def test_rows_of_any_size_equal_those_of_the_pattern(queries: Any, keys: Any, any_size) -> None:
    assert_rows_equal_the_pattern(*any_size, queries, keys)


def test_layers_and_heads_are_chosen(ready) -> None:
    model, inputs = ready("window-qwen2")
    whole = model.attention(inputs)
    part = model.attention(inputs, layers=[2, 0], heads=[5, -5])
    assert torch.allclose(part.values, whole.values[:, [2, 0]][:, :, [5, 1]], rtol=1e-9, atol=1e-12)
    assert part.labels["layer"] == [2, 0] and part.labels["head"] == [5, 1]
    one = model.attention(inputs, layers=[-1])
    assert torch.allclose(one.values, whole.values[:, -1:], rtol=1e-9, atol=1e-12)


def test_rows_to_all_keys_sum_to_one(ready) -> None:
    model, inputs = ready("three-images-and-none")
    scores = model.attention(inputs, queries="text", keys="all")
    sums = scores.values.sum(-1)
    there = scores.exists.any(-1)
    assert torch.allclose(sums[there], torch.ones_like(sums[there])) and not sums[~there].any()


def test_rows_of_a_generated_token_equal_those_of_its_teacher_forced_run(ready) -> None:
    model, inputs = ready("clip-llama")
    answer = model.generate(inputs, max_new_tokens=6, do_sample=False, eos_token_id=[], return_type="tokens")
    forced = inputs.with_answer(answer.tolist())
    with torch.no_grad():
        _, cache = model.run_with_cache(forced)
    scores = model.attention(forced, queries="answer", keys="image")
    for row in range(2):
        span = forced.spans[row].answer
        keys = forced.image_mask[row].nonzero().flatten()
        expected = torch.stack([rows_of(cache, i, row, torch.arange(span.start, span.stop), keys) for i in range(2)])
        assert torch.allclose(scores.values[row, ..., : len(keys)], expected, rtol=1e-9, atol=1e-12)


def test_attention_while_generating_equals_the_teacher_forced_rows(ready) -> None:
    """Each generated token looks back once it is itself fed in: the last one never is."""
    model, inputs = ready("clip-llama")
    with model.record_attention(queries="generated", keys="image") as seen:
        answer = model.generate(inputs, max_new_tokens=6, do_sample=False, eos_token_id=[], return_type="tokens")
    forced = inputs.with_answer(answer[:, :-1].tolist())
    expected = model.attention(forced, queries="answer", keys="image")
    scores = seen.scores()
    assert scores.values.shape == expected.values.shape
    assert relative_error(scores.values, expected.values) < 1e-9


def test_uncached_generation_collects_the_same_rows(ready) -> None:
    model, inputs = ready("clip-llama")
    results = []
    for cached in (True, False):
        with model.record_attention(queries="last+generated", keys="image") as seen:
            model.generate(inputs, max_new_tokens=4, eos_token_id=[], return_type="tokens", use_past_kv_cache=cached)
        results.append(seen.scores().values)
    assert relative_error(results[1], results[0]) < 1e-9


def test_attention_of_any_size_while_generating_equals_the_teacher_forced_rows(any_size) -> None:
    """Each generated token looks back once it is itself fed in: the last one never is."""
    model, inputs = any_size
    found = []
    for cached in (True, False):
        with model.record_attention(queries="generated", keys="image") as seen:
            answer = model.generate(
                inputs, max_new_tokens=4, eos_token_id=[], return_type="tokens", use_past_kv_cache=cached
            )
        found.append(seen.scores())
    forced = inputs.left_padded().with_new_tokens(answer[:, :-1])
    expected = model.attention(forced, queries="answer", keys="image")
    for scores in found:
        assert scores.values.shape == expected.values.shape and scores.values.shape[3] == 3
        assert relative_error(scores.values, expected.values) < 1e-9


def test_interventions_in_force_are_honoured(ready) -> None:
    from veena_lens.interventions import Steer

    model, inputs = ready("clip-llama", casts="none")
    vector = torch.randn(model.cfg.d_model, dtype=torch.float64)
    plain = model.attention(inputs)
    with model.intervene([Steer(layer=0, vector=vector, alpha=2.0, positions="all")]):
        steered = model.attention(inputs)
        _, cache = model.run_with_cache(inputs)
    assert relative_error(steered.values[:, 0], plain.values[:, 0]) < 1e-12, "layer 0 comes before the edit"
    assert relative_error(steered.values[:, 1], plain.values[:, 1]) > 1e-3
    for row in range(2):
        keys = inputs.image_mask[row].nonzero().flatten()
        expected = rows_of(cache, 1, row, torch.tensor([inputs.spans[row].last]), keys)
        assert torch.allclose(steered.values[row, 1, ..., : len(keys)], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["hook_attn_scores", "hook_pattern"])
def test_hooks_that_edit_attention_show_in_its_rows(name: str, ready) -> None:
    model, inputs = ready("one-row-no-padding", casts="none")

    def look_at_first(value: Tensor, hook: Any) -> Tensor:
        new = value.clone()
        new[..., 0] += 5.0
        return new

    with model.hooks([(f"blocks.1.attn.{name}", look_at_first)]), torch.no_grad():
        scores = model.attention(inputs, keys="all")
        _, cache = model.run_with_cache(inputs)
    assert torch.allclose(scores.values[0, 1, :, 0], cache["pattern", 1][0, :, -1], rtol=1e-9, atol=1e-12)


def test_no_square_attention_is_made(ready) -> None:
    """One mask for all heads is all that is ever [pos pos]; what would be a layer's pattern is not."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model, inputs = ready("image-45-patch-7-siglip")
    length, squares = inputs.shape[1], []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[-2:] == (length, length) and out.numel() > 2 * length**2:
                squares.append((str(func), tuple(out.shape)))
            return out

    with torch.no_grad(), Spy():
        model.attention(inputs)
    assert squares == []
    with torch.no_grad(), Spy():
        model.run_with_cache(inputs, names_filter="blocks.1.attn.hook_pattern")
    assert squares, "the spy sees nothing"


def test_logits_of_a_run_that_is_watched_stay_bit_equal(ready) -> None:
    model, inputs = ready("clip-llama")
    with torch.no_grad():
        plain = model(inputs)
        with model.record_attention(queries="last"):
            assert torch.equal(model(inputs), plain)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(layers=[7]), "layer 7"),
        (dict(heads=[6]), "head 6"),
        (dict(layers=[]), "at least one"),
        (dict(queries="first"), "unknown word"),
        (dict(queries="generated"), "generated"),
        (dict(queries=99), "99"),
    ],
)
def test_selection_that_does_not_exist_raises(options: dict[str, Any], message: str, ready) -> None:
    model, inputs = ready("clip-llama")
    with pytest.raises((ValueError, IndexError), match=message):
        model.attention(inputs, **options)


def test_image_keys_without_a_picture_raise(ready) -> None:
    model, inputs = ready("text-llama")
    with pytest.raises(ValueError, match="image"):
        model.attention(inputs, keys="image")
    mixed, rows = ready("three-images-and-none")
    scores = mixed.attention(rows, keys="image")
    assert not scores.exists[1].any() and not scores.values[1].any(), "a row without a picture has no such key"


def test_bare_tokens_are_accepted() -> None:
    from veena_lens import HookedVLM

    model = HookedVLM.from_hf(build_hf(BY_NAME["text-llama"]))
    tokens = torch.tensor([[5, 6, 7, 8]])
    scores = model.attention(tokens, keys="all")
    _, cache = model.run_with_cache(tokens)
    assert torch.allclose(scores.values[0, 1, :, 0], cache["pattern", 1][0, :, -1], rtol=1e-9, atol=1e-12)
