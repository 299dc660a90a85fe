"""Generation sweeps equal generating under each entry alone, whatever it edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import BY_NAME
from tests.interrupting import stop_at
from tests.pairs import pair_of, ready_of
from tests.sweeps.engines import texts_agree
from veena_lens import HookedVLM
from veena_lens.checkpoints.files import bundled_pictures
from veena_lens.interventions import Ablate, BoostAttention, Circuit, KnockOutAttention, Patch, ScaleNeurons, Steer
from veena_lens.sweeps import generating, generation_sweep

CASES = [
    BY_NAME["clip-llama"],
    BY_NAME["window-mistral"],
    *(BY_NAME[f"{k}-plain"] for k in ("qwen2_vl", "qwen3_vl")),
    BY_NAME["idefics3-plain"],
    BY_NAME["gemma3-unequal-rows"],
]


def edits_of_images(inputs: Any, vector: Any) -> list[Any]:
    """Edits within an image, which may read itself in both directions."""
    inside = inputs.spans[0].images[0].stop - 1
    return [
        Steer(1, vector, positions=[inside]),
        Steer(0, vector, positions="image"),
        Steer(2, vector, positions="last+generated"),
        BoostAttention(1, keys="image", queries="query+generated", factor=5.0),
        BoostAttention(0, keys="image", queries="image", factor=3.0, mode="mul"),
        KnockOutAttention(1, keys="image", queries="image"),
        Ablate("blocks.0.hook_attn_out", positions="image"),
        [Ablate("vision.blocks.0.hook_mlp_out", positions="all"), Steer(1, vector)],
    ]


def entries_for(model: Any, inputs: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(model.cfg.d_model, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter="blocks.0.attn.hook_z")
        _, mine = model.run_with_cache(inputs, names_filter="blocks.1.attn.hook_z")
    whole = Patch("blocks.0.attn.hook_z", -2 * cache["blocks.0.attn.hook_z"], heads=[0], positions="query")
    mine.cache_dict["blocks.1.attn.hook_z"].mul_(-2)
    placed = Patch("blocks.1.attn.hook_z", mine, heads=[1], positions="last")
    return [
        [],
        Steer(0, vector, alpha=3.0),
        [Steer(1, vector, alpha=2.0, positions="generated")],
        Steer(0, vector, alpha=1.0, positions="all"),
        [BoostAttention(0, keys="image", factor=6.0), KnockOutAttention(1, heads=[1], queries="last+generated")],
        BoostAttention(1, keys="prompt", factor=3.0, mode="scale"),
        Ablate("blocks.0.mlp.hook_post", neurons=[1, 2, 3], positions="query+generated"),
        [ScaleNeurons(1, [5, 6], factor=9.0), whole],
        placed,
        Ablate("hook_image_features", positions="image"),
        Ablate("hook_embed", positions="query"),
        Circuit([Steer(0, vector, alpha=-3.0, positions="query")], "a circuit"),
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_equal_those_of_each_entry_alone(case: Any, model_of) -> None:
    model, inputs = ready_of(model_of, case, gain=3.0)
    row = inputs[2 if case.has("bidirectional") else 1].without_padding()
    entries = entries_for(model, row)
    settings: dict[str, Any] = dict(max_new_tokens=10, eos_token_id=[])
    fast = texts_agree(model, row, entries, **settings)
    for entry, tokens in zip(entries, fast.tokens[0], strict=True):
        mine = [entry] if not isinstance(entry, (list, Circuit)) else entry
        with model.intervene(list(mine)):
            alone = model.generate(row, return_type="tokens", **settings)
        assert alone[0].tolist() == tokens, entry
    assert len({tuple(tokens) for tokens in fast.tokens[0]}) > 5, "the entries hardly change what is said"
    few = generation_sweep(model, row, entries, max_rows=3, progress=False, **settings)
    assert few.tokens == fast.tokens


def test_edits_of_images_that_read_themselves_equal_whole_prompts(model_of) -> None:
    """In rows of several lengths together, and in one row with a patch of its image."""
    model, clean, corrupted = pair_of(model_of, BY_NAME["gemma3-unequal-rows"])
    clean, corrupted = clean[[0, 2, 3]], corrupted[[0, 2, 3]]
    vector = 3 * torch.randn(48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        _, cache = model.run_with_cache(corrupted[0].without_padding(), names_filter=["blocks.1.attn.hook_z"])
    entries = [[], *edits_of_images(clean[0].without_padding(), vector)]
    one = [*entries, Patch("blocks.1.attn.hook_z", cache, positions="image")]
    for rows, given in ((clean, entries), (clean[0], one)):
        fast = texts_agree(model, rows, given, max_new_tokens=6, eos_token_id=[], max_rows=4)
        assert len({tuple(ids) for ids in fast.tokens[0]}) > 3, "the entries say the same"


@pytest.fixture(scope="module")
def embedded() -> HookedVLM:
    return HookedVLM.from_pretrained("tiny-llava-emotion")


def test_several_prompts_and_a_score_of_the_texts(embedded: HookedVLM) -> None:
    faces = [p.open() for p in bundled_pictures("test")[:2]]
    questions = ["how does the person in the picture feel?", "what colour is the hair of the person?"]
    inputs = embedded.prepare(text=questions, images=[[face] for face in faces])
    cut = [KnockOutAttention(layer, queries="query+generated") for layer in range(embedded.cfg.n_layers)]
    result = generation_sweep(
        embedded, inputs, [[], cut], lambda texts: [len(t.split()) for t in texts], max_new_tokens=16, progress=False
    )
    plain = embedded.generate(inputs, max_new_tokens=16)
    assert [row[0] for row in result.texts] == plain
    assert bool(result.values.isfinite().all())
    assert result.scores.shape == (2, 2) and result.scores[0, 0] == len(plain[0].split())
    frame = result.to_frame()
    assert len(frame) == 4 and set(frame["entry"]) == set(result.labels["entry"]) and "nothing" in repr(result)
    assert len(repr(result).splitlines()) <= 10


def test_pictures_are_encoded_once(embedded: HookedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = embedded.prepare(text="who is it?", images=bundled_pictures("test")[0].open())
    calls, real = [], type(embedded.vision).forward
    monkeypatch.setattr(type(embedded.vision), "forward", lambda self, *a: calls.append(len(a[0])) or real(self, *a))
    entries = [Steer(layer, torch.ones(embedded.cfg.d_model)) for layer in range(8)]
    generation_sweep(embedded, inputs, entries, max_new_tokens=3, progress=False)
    assert calls == [1]


def test_bad_sweeps_are_refused(embedded: HookedVLM) -> None:
    inputs = embedded.prepare(text="who is it?", images=bundled_pictures("test")[0].open())
    with pytest.raises(ValueError, match="at least one entry"):
        generation_sweep(embedded, inputs, [])
    with pytest.raises(TypeError, match="not an intervention"):
        generation_sweep(embedded, inputs, [["Steer"]])
    with pytest.raises(ValueError, match="layer 99"):
        generation_sweep(embedded, inputs, [Steer(99, torch.ones(embedded.cfg.d_model))])
    with pytest.raises(ValueError, match="greedily"):
        generation_sweep(embedded, inputs, [[]], do_sample=True)
    with pytest.raises(ValueError, match="one number per text"):
        generation_sweep(embedded, inputs, [[]], lambda texts: 1.0, max_new_tokens=2, progress=False)


def test_a_stopped_sweep_goes_on_with_the_same_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_of) -> None:
    model, inputs = ready_of(model_of, BY_NAME["clip-llama"], gain=3.0)
    entries = entries_for(model, inputs[1].without_padding())[:6]
    kw: dict[str, Any] = dict(max_new_tokens=6, eos_token_id=[], progress=False, max_rows=2)
    calls = stop_at(monkeypatch, generating, "_continue", 3)
    with pytest.raises(KeyboardInterrupt):
        generation_sweep(model, inputs, entries, **kw, out=tmp_path)
    kept = generation_sweep(model, inputs, entries, **kw, out=tmp_path)
    assert len(calls) == 3 * len(inputs) + 1, "batches that were kept ran again"
    assert kept.tokens == generation_sweep(model, inputs, entries, **kw).tokens
    n = len(calls)
    longer = generation_sweep(model, inputs, entries, **(kw | {"max_new_tokens": 7}), out=tmp_path)
    other = generation_sweep(model, inputs, [*entries[:5], Ablate("hook_embed", positions=2)], **kw, out=tmp_path)
    assert len(calls) == n + 2 * 3 * len(inputs) and longer.tokens[0][0][:6] == other.tokens[0][0]
