"""What a cache will hold is known before the pass, and one that would not fit is refused with what would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformer_lens.utilities import Slice

from tests.cases import BY_NAME, counted_inputs
from veena_lens.memory import in_words
from veena_lens.model import cache_size
from veena_lens.model.cache_size import bytes_by_name

NAMES = (
    "clip-llama",
    "three-images-and-none",
    "qwen2_vl-plain",
    "qwen2_5_vl-plain",
    "qwen3_vl-plain",
    "onevision-plain",
    "idefics3-plain",
    "gemma3-plain",
)


@pytest.fixture
def ready(model_of: Any) -> Any:
    def get(name: str) -> tuple[Any, Any]:
        model = model_of(BY_NAME[name])
        return model, model.inputs_from_hf(**counted_inputs(BY_NAME[name]))

    return get


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pos_slice", [None, -1, (1, 5)])
def test_estimate_is_what_the_cache_holds(name: str, pos_slice: Any, ready: Any) -> None:
    model, inputs = ready(name)
    _, cache = model.run_with_cache(inputs, names_filter=lambda _: True, pos_slice=pos_slice, max_bytes=None)
    held = {n: value.nbytes for n, value in cache.items()}
    found = bytes_by_name(model, inputs, cache.keys(), Slice.unwrap(pos_slice))
    assert found.keys() == held.keys()
    in_text = [n for n in held if not n.startswith(("vision.", "connector", "deepstack", "hook_image"))]
    plain = [n for n in in_text if not n.endswith("hook_scale")]  # these may be in float32
    assert {n: found[n] for n in plain} == {n: held[n] for n in plain}
    assert sum(found.values()) == pytest.approx(sum(held.values()), rel=0.01)


def test_cache_beyond_the_bound_is_refused_before_the_pass_with_filters_that_fit(ready: Any) -> None:
    model, inputs = ready("three-images-and-none")
    _, cache = model.run_with_cache(inputs)
    total = sum(value.nbytes for value in cache.values())
    passes: list[Any] = []
    with model.hooks([("hook_embed", lambda x, hook: passes.append(x))]):
        with pytest.raises(MemoryError) as raised:
            model.run_with_cache(inputs, max_bytes=int(0.99 * total))
        assert not passes
        message = str(raised.value)
        assert f"max_bytes allows {in_words(int(0.99 * total))}" in message
        model.run_with_cache(inputs, max_bytes=int(1.01 * total))
        model.run_with_cache(inputs, max_bytes=None)
        assert len(passes) == 2
    # The first way that the message names is taken, and it fits.
    way = message.split("names_filter=", 1)[1].split(" keeps ")[0]
    kept = model.run_with_cache(inputs, names_filter=eval(way), max_bytes=int(0.99 * total))[1]
    assert f"{way} keeps {in_words(sum(value.nbytes for value in kept.values()))}" in message
    with pytest.raises(MemoryError, match="Give fewer rows at once"):
        model.run_with_cache(inputs, max_bytes=10)


def test_free_memory_is_the_bound_by_default(ready: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = ready("clip-llama")
    monkeypatch.setattr(cache_size, "free_memory", lambda device: 5000)
    with pytest.raises(MemoryError, match=r"4.88 KiB are free on cpu.*max_bytes=None lifts the bound"):
        model.run_with_cache(inputs)
    model.run_with_cache(inputs, max_bytes=None)
    monkeypatch.setattr(cache_size, "free_memory", lambda device: None)
    model.run_with_cache(inputs)


@pytest.mark.parametrize("wrong", [-1, True, "all", 1.5])
def test_other_bounds_are_refused(wrong: Any, ready: Any) -> None:
    model, inputs = ready("clip-llama")
    with pytest.raises((ValueError, TypeError), match="max_bytes"):
        model.run_with_cache(inputs, max_bytes=wrong)


def test_rows_of_text_alone_have_no_crops(ready: Any) -> None:
    model, _ = ready("clip-llama")
    _, cache = model.run_with_cache(torch.tensor([[5, 6, 7]]), names_filter=lambda _: True)
    inputs = model.as_inputs(torch.tensor([[5, 6, 7]]))
    found = bytes_by_name(model, inputs, cache.keys(), Slice.unwrap(None))
    assert sum(found.values()) == pytest.approx(sum(value.nbytes for value in cache.values()), rel=0.01)
