"""A view shows what the library measures, whichever source it comes from, and says what it cannot show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.app.view.conftest import QUESTION
from tests.app.view.large import N_IMAGE, large_cache, large_picture
from tests.app.view.sinking import SINKS, sinking_cache
from veena_lens import HookedVLM
from veena_lens.activation_cache import ActivationCache, MissingActivation
from veena_lens.app.view import ExplorerView, open_cache, save_cache
from veena_lens.app.view.bundles import Coded, Key, unpack
from veena_lens.app.view.rows import CachedRows, cached_sinks, sink_queries
from veena_lens.circuits import attention_sinks, direct_attribution_map
from veena_lens.interventions import Ablate

PATTERNS = ("hook_pattern", "hook_resid_pre", "hook_resid_post")
KEYS = ("hook_rot_q", "hook_rot_k", "hook_resid_post")


def cache_of(model: Any, pair: Any, parts: tuple[str, ...] = PATTERNS) -> ActivationCache:
    inputs = model.prepare(text=QUESTION, images=pair[0].open(), answer=" happy")
    names = [n for n in model.hook_dict if n.startswith("blocks.") and n.endswith(parts)]
    return model.run_with_cache(inputs, names_filter=names)[1]


def maps_of(view: ExplorerView, **key: Any) -> Tensor:
    """[layer head pos] of one token, as the page decodes it."""
    header, arrays = unpack(view.maps(Key(**key)))
    (about,) = header["bundles"]
    values, scales = (torch.from_numpy(arrays[about[name]].copy()) for name in ("maps", "scales"))
    is_image = view.inputs.image_mask[0]
    return Coded(values=values, scales=scales, is_signed=about["signed"]).decode(is_image)


def test_maps_are_the_models_attention(model: Any, pair: Any) -> None:
    view = ExplorerView.from_run(model, (pair[0].open(), QUESTION), answer=" happy")
    expected = model.attention(view.inputs, queries="all", keys="all").values[0]
    for query in (view.header["query"], view.inputs.spans[0].answer.start, 1):
        torch.testing.assert_close(maps_of(view, query=query), expected[:, :, query], rtol=0.02, atol=2e-4)


def test_cache_of_patterns_and_cache_of_keys_show_the_same_as_the_model(model: Any, pair: Any) -> None:
    shown = ExplorerView.from_run(model, (pair[0].open(), QUESTION), answer=" happy")
    for parts in (PATTERNS, KEYS):
        view = ExplorerView.from_cache(cache_of(model, pair, parts))
        for query in (view.header["query"], 3, 60):
            torch.testing.assert_close(maps_of(view, query=query), maps_of(shown, query=query), rtol=0.05, atol=1e-4)


def test_sinks_of_a_cache_follow_the_rule_of_find_sinks(model: Any, pair: Any) -> None:
    cache = cache_of(model, pair)
    found = attention_sinks(model, cache.inputs).meta["positions"]
    view = ExplorerView.from_cache(cache)
    assert view.header["sinks"] == [found[str(layer)][0] for layer in range(model.cfg.n_layers)]
    run = ExplorerView.from_run(model, (pair[0].open(), QUESTION), answer=" happy")
    assert run.header["sinks"] == view.header["sinks"]


def test_rule_of_sinks_is_that_of_find_sinks_where_there_are_some(model: Any, pair: Any) -> None:
    cache = cache_of(model, pair)
    rule = {"multiple": 2.0, "share": 0.3, "norm_multiple": 1.02}
    expected = attention_sinks(model, cache.inputs, **rule).meta["positions"]
    norms = torch.stack([cache["resid_pre", layer][0].norm(dim=-1) for layer in range(model.cfg.n_layers)])
    found = cached_sinks(CachedRows(cache=cache), norms, torch.ones(cache.inputs.shape[1], dtype=torch.bool), **rule)
    assert found == [expected[str(layer)][0] for layer in range(model.cfg.n_layers)] and sum(map(len, found)) > 10


def test_sinks_of_a_cache_are_named_layer_by_layer() -> None:
    assert ExplorerView.from_cache(sinking_cache()).header["sinks"] == [[], SINKS]


def test_a_long_prompt_is_asked_for_sinks_by_a_sample_with_its_last_token() -> None:
    asked = sink_queries(torch.ones(2940, dtype=torch.bool))
    assert len(asked) <= 257 and asked[-1] == 2939
    assert sink_queries(torch.tensor([False, True, True])) == [1, 2]


def test_lens_and_norms_are_those_of_the_residual(model: Any, pair: Any) -> None:
    view = ExplorerView.from_run(model, (pair[0].open(), QUESTION), answer=True, words=[" happy", " sad"])
    assert view.header["lens"]["words"] == [" happy", " sad"]
    last, n = view.header["query"], model.cfg.n_layers
    _, cache = model.run_with_cache(view.inputs, names_filter="blocks.7.hook_resid_post")
    torch.testing.assert_close(torch.from_numpy(view.arrays["norms"][7]), cache["resid_post", 7][0].norm(dim=-1))
    probabilities = model(view.inputs)[0, last].softmax(-1)
    best = view.header["lens"]["texts"][view.arrays["lens_ids"][n - 1, last, 0]]
    assert best == model.tokenizer.decode([int(probabilities.argmax())])
    coded = Coded(
        values=torch.from_numpy(view.arrays["lens_maps"]), scales=torch.from_numpy(view.arrays["lens_scales"])
    )
    happy = coded.decode(view.inputs.image_mask[0])[0, n - 1, last]
    torch.testing.assert_close(happy, probabilities[model.to_single_token(" happy")], rtol=0.01, atol=1e-5)


def test_push_is_per_patch(model: Any, pair: Any) -> None:
    direction = torch.randn(model.cfg.n_layers, model.cfg.d_model)
    view = ExplorerView.from_run(model, (pair[0].open(), QUESTION), directions={"noise": direction})
    query = view.header["query"]
    expected = direct_attribution_map(model, view.inputs, direction, [query]).values[0].flatten(-2)
    shown = maps_of(view, query=query, kind="push", name="noise")[..., view.inputs.grid_tokens(0, 0).flatten()]
    torch.testing.assert_close(shown, expected, rtol=0.03, atol=float(expected.abs().max()) * 1e-3)


def test_difference_needs_the_same_cells_and_text(model: Any, pair: Any) -> None:
    view = ExplorerView.from_run(model, (pair[0].open(), QUESTION), answer=" happy", other=pair[1].open())
    assert {p["run"] for p in view.header["panels"]} == {0, 1} and "difference" in view.header["modes"]
    query = view.header["query"]
    twin = model.prepare(text=QUESTION, images=pair[1].open(), answer=" happy")
    expected = model.attention(twin, queries=[query], keys="all").values[0, :, :, 0]
    torch.testing.assert_close(maps_of(view, query=query, run=1), expected, rtol=0.02, atol=2e-4)
    inputs = model.prepare(text=QUESTION, images=pair[0].open())
    again = ExplorerView.from_run(model, inputs, other=pair[1].open(), pictures=[pair[0].open()])
    assert torch.equal(again.inputs.tokens, inputs.tokens)
    with pytest.raises(ValueError, match="second image's grids are .* or their text differs"):
        ExplorerView.from_run(model, inputs, other=model.prepare(text="another question", images=pair[1].open()))


def test_interventions_hold_in_every_map_of_the_view_and_leave_the_model_clean(model: Any, pair: Any) -> None:
    cut = Ablate(name="blocks.0.hook_attn_out", positions="all", value="zero")
    plain = ExplorerView.from_run(model, (pair[0].open(), QUESTION))
    edited = ExplorerView.from_run(model, (pair[0].open(), QUESTION), interventions=[cut])
    query = plain.header["query"]
    late = ExplorerView.maps(edited, {"query": 5})
    assert not torch.allclose(maps_of(plain, query=query)[3], maps_of(edited, query=query)[3], atol=1e-3)
    assert late != ExplorerView.maps(plain, {"query": 5})


def test_budget_keeps_heads_of_the_first_tokens_and_means_of_the_others(model: Any, pair: Any) -> None:
    small = ExplorerView.from_run(model, (pair[0].open(), QUESTION), answer=" happy", modes=["attention"], max_bytes=1)
    heads = [b.maps.values.shape[1] for b in small.bundles]
    assert heads[0] == model.cfg.n_heads and set(heads[1:]) == {1}
    whole = ExplorerView.from_run(model, (pair[0].open(), QUESTION), answer=" happy", modes=["attention"])
    query = small.bundles[3].key.query
    mean = small.bundles[3].maps.decode(small.inputs.image_mask[0])[:, 0]
    torch.testing.assert_close(mean, maps_of(whole, query=query).mean(1), rtol=0.05, atol=3e-4)
    assert maps_of(small, query=query).shape[1] == model.cfg.n_heads  # asked for, it comes whole


def test_strip_has_every_text_token_once_and_one_entry_a_picture(model: Any, pair: Any) -> None:
    view = ExplorerView.from_run(model, ([p.open() for p in pair], "compare them."), answer=" happy")
    entries = view.header["tokens"]
    assert [t["n"] for t in entries if "image" in t] == [64, 64]
    words = [t for t in entries if "at" in t]
    text = (view.inputs.attention_mask[0] & ~view.inputs.image_mask[0]).nonzero().flatten().tolist()
    assert [t["at"] for t in words] == text and words[-1] == {"at": text[-1], "text": " happy", "part": "answer"}


# --- caches and files -------------------------------------------------------------------------------------


def test_saved_cache_opens_with_pictures_and_words_without_a_model(
    model: Any, pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(model, pair)
    path = save_cache(
        cache, tmp_path / "c.safetensors", pictures=[pair[0].open()], tokenizer=model.tokenizer, model_name="tiny"
    )
    monkeypatch.setattr(HookedVLM, "__init__", lambda *_: pytest.fail("a model was built"))
    view = ExplorerView.from_cache(path)
    assert view.title == "tiny" and view.header["panels"][0]["source"].startswith("data:image/png")
    assert view.header["tokens"][-1]["text"] == " happy" and view.header["modes"] == ["attention", "sinks", "norms"]
    assert ActivationCache.load(path).cache_dict.keys() == cache.cache_dict.keys()  # the same file for others
    assert not list(tmp_path.glob(".*"))


def test_plain_cache_shows_token_numbers_and_bare_cells(model: Any, pair: Any, tmp_path: Path) -> None:
    cache_of(model, pair).save(tmp_path / "c.safetensors")
    view = ExplorerView.from_cache(tmp_path / "c.safetensors")
    assert re.fullmatch(r"#\d+", view.header["tokens"][0]["text"]) and view.header["panels"][0]["source"] == ""
    named = ExplorerView.from_cache(tmp_path / "c.safetensors", tokenizer=model.tokenizer)
    assert named.header["tokens"][-1]["text"] == " happy"


def test_cache_with_its_model_has_the_lens(model: Any, pair: Any) -> None:
    view = ExplorerView.from_cache(cache_of(model, pair), model=model)
    assert "lens" in view.header["modes"] and view.header["lens"]["words"] == [" happy"]


def test_cache_of_another_model_is_refused_with_what_differs(model: Any, pair: Any) -> None:
    other = HookedVLM.from_pretrained("tiny-qwen2vl-emotion")
    with pytest.raises(ValueError, match=r"of another model than tiny-qwen2vl-emotion: it has .*\(the model: "):
        ExplorerView.from_cache(cache_of(model, pair), model=other)
    small = ActivationCache({f"blocks.0.{n}": torch.zeros(1, 2, 3, 3) for n in ("attn.hook_pattern",)})
    small.inputs = model.prepare(text="a")
    with pytest.raises(ValueError, match=r"layers 1 \(the model: 8\), heads 2 \(the model: 8\)"):
        ExplorerView.from_cache(small, model=model)


def test_file_cut_short_says_so(model: Any, pair: Any, tmp_path: Path) -> None:
    path = cache_of(model, pair).save(tmp_path / "c.safetensors")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"c\.safetensors \([\d,]+ bytes\) cannot be read .*cut short"):
        open_cache(path)
    with pytest.raises(FileNotFoundError, match="No activation cache at"):
        open_cache(tmp_path / "none.safetensors")


def test_cache_without_attention_says_what_to_cache(model: Any, pair: Any) -> None:
    with pytest.raises(MissingActivation, match=r"attn.hook_pattern, or attn.hook_rot_q and attn.hook_rot_k"):
        ExplorerView.from_cache(cache_of(model, pair, ("hook_resid_post",)))


def test_rows_of_a_batch_open_one_by_one(model: Any, pair: Any, tmp_path: Path) -> None:
    inputs = model.prepare(text=[QUESTION, "and?"], images=[[p.open()] for p in pair])
    names = [n for n in model.hook_dict if n.endswith("attn.hook_pattern") and n.startswith("blocks.")]
    _, cache = model.run_with_cache(inputs, names_filter=names)
    view = ExplorerView.from_cache(cache, row=1, tokenizer=model.tokenizer)
    alone = model.prepare(text="and?", images=pair[1].open())
    expected = model.attention(alone, queries="last", keys="all").values[0, :, :, 0]
    shown = maps_of(view, query=view.header["query"])[..., view.inputs.attention_mask[0]]
    torch.testing.assert_close(shown, expected, rtol=0.03, atol=2e-4)
    path = save_cache(cache, tmp_path / "c.safetensors", pictures=[pair[0].open()], tokenizer=model.tokenizer)
    first, second = (ExplorerView.from_cache(path, row=row) for row in (0, 1))
    assert first.header["panels"][0]["source"] and not second.header["panels"][0]["source"]
    assert first.header["tokens"][0]["text"] == "<s>" and second.header["tokens"][0]["text"].startswith("#")


def test_window_of_a_layer_hides_what_lies_before_it(model: Any, pair: Any) -> None:
    cache = cache_of(model, pair, KEYS)
    rows = CachedRows(cache=cache, windows=[4] + [None] * 7)
    seen: dict[int, Tensor] = {}
    rows.stream([30], lambda layer, at, weights: seen.update({layer: weights}))
    assert bool((seen[0][:, 0, :27] == 0).all()) and bool((seen[1][:, 0, :27] > 0).any())
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(8, 1))


# --- questions, files and words ---------------------------------------------------------------------------


def test_odd_questions_and_requests_are_refused_with_a_reason(model: Any, pair: Any, tmp_path: Path) -> None:
    source = (pair[0].open(), QUESTION)
    view = ExplorerView.from_run(model, source)
    for key, told in (
        ({"query": 10_000}, "No token at position 10000"),
        ({"query": 3, "run": 1}, "no second image"),
        ({"query": 3, "kind": "push", "name": "x"}, "No direction 'x'"),
        ({"query": 3, "kind": "weights"}, "No maps of kind 'weights'"),
        ({"position": 3}, "a key has query"),
    ):
        with pytest.raises(ValueError, match=told):
            view.maps(key)
    with pytest.raises(ValueError, match=r"must end in \.html"):
        view.save(tmp_path / "view.png")
    with pytest.raises(ValueError, match="Unknown mode 'heat'; there are: attention"):
        ExplorerView.from_run(model, source, modes=["heat"])
    with pytest.raises(ValueError, match="'difference' needs other="):
        ExplorerView.from_run(model, source, modes=["difference"])
    with pytest.raises(ValueError, match="shows one row; these inputs have 2"):
        ExplorerView.from_run(model, model.prepare(text=["a", "b"], images=[[p.open()] for p in pair]))
    with pytest.raises(ValueError, match="prepared inputs, or"):
        ExplorerView.from_run(model, 3)


def test_page_loads_nothing_from_elsewhere(model: Any, pair: Any, tmp_path: Path) -> None:
    view = ExplorerView.from_run(model, (pair[0].open(), QUESTION), title="<script>alert(1)</script> & co")
    page = view.save(tmp_path / "new" / "view.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page and "<script>alert" not in page
    assert not re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", page.replace("http-equiv", ""))
    assert "sandbox=" in view._repr_html_() and "<iframe srcdoc=" in view._repr_html_()


def test_text_alone_makes_a_view_without_pictures(model: Any) -> None:
    view = ExplorerView.from_run(model, ([], "name the emotions of the person in the picture."))
    assert view.header["panels"] == [] and "no image" in repr(view)


def test_widget_answers_with_maps_or_with_the_reason(model: Any, pair: Any) -> None:
    pytest.importorskip("anywidget")
    view = ExplorerView.from_run(model, (pair[0].open(), QUESTION), max_bytes=1)
    widget, sent = view.widget(), []
    widget.send = lambda content, buffers=None: sent.append((content, buffers))
    widget._answer(widget, {"number": 1, "key": {"query": 5}}, [])
    widget._answer(widget, {"number": 2, "key": {"query": -1}}, [])
    assert sent[0] == ({"number": 1}, [view.maps({"query": 5})])
    assert sent[1][0]["number"] == 2 and "No token at position -1" in sent[1][0]["error"]
    assert unpack(widget.payload)[0]["title"] == view.title


def test_two_thousand_tokens_fit_the_budget() -> None:
    cache = large_cache()
    view = ExplorerView.from_cache(cache, pictures=[large_picture()], modes=["attention", "norms"], max_bytes=12 << 20)
    assert (
        sum(b.size for b in view.bundles) < 16 << 20 and len(view.bundles) == 61
    )  # of text, and what predicts the first word
    assert [p["grid"] for p in view.header["panels"]] == [(24, 24), (48, 48)]
    asked = maps_of(view, query=view.bundles[-1].key.query)
    assert asked.shape == (32, 32, cache.inputs.shape[1]) and int(view.inputs.image_mask.sum()) == N_IMAGE
