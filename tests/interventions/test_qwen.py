"""Interventions on the Qwen-VL models: every kind in every way of running, several images, frames of a video."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import PAD, QWEN, Case, build_hf, raw_inputs, relative_error
from tests.odd_inputs import QWEN_END, QWEN_IMAGE, QWEN_START, QWEN_VIDEO
from veena_lens import HookedVLM
from veena_lens.interventions import Ablate, BoostAttention, Circuit, Patch, ScaleNeurons, Steer
from veena_lens.positions import position_mask

ROWS = ("2 i4x4 1 i2x4 3", "1 v2x2x4 1 i2x2 2", "5")
CASES = {family: Case(name="edits", family=family, rows=ROWS) for family in QWEN}


class Ready:
    """A model with strong attention in pure float64, inputs, and the cache of other images and text."""

    def __init__(self, case: Case) -> None:
        raw = raw_inputs(case)
        self.model: Any = HookedVLM.from_hf(build_hf(case, gain=5.0), casts="none")
        self.inputs = self.model.inputs_from_hf(**raw)
        other = {name: value.flip(0) if "pixel" in name else value for name, value in raw.items()}
        text = raw["attention_mask"].bool() & (raw["input_ids"] < QWEN_IMAGE)
        other["input_ids"] = torch.where(text, raw["input_ids"] % 90 + 5, raw["input_ids"])
        with torch.no_grad():
            self.plain = self.model(self.inputs)
            self.source = self.model.run_with_cache(self.model.inputs_from_hf(**other))[1]

    def logits(self, interventions: Any) -> Tensor:
        with torch.no_grad(), self.model.intervene(interventions):
            return self.model(self.inputs)

    def hooked(self, *hooks: Any) -> Tensor:
        with torch.no_grad():
            return self.model.run_with_hooks(self.inputs, fwd_hooks=list(hooks))


@pytest.fixture(scope="module")
def both() -> dict[str, Ready]:
    return {kind: Ready(case) for kind, case in CASES.items()}


@pytest.fixture(params=list(CASES))
def ready(request: pytest.FixtureRequest, both: dict[str, Ready]) -> Any:
    yield both[request.param]
    assert not [name for name, hook in both[request.param].model.hook_dict.items() if hook._forward_hooks]


def kinds(ready: Ready) -> dict[str, Any]:
    source, third = ready.source, ready.model.cfg.n_deepstack > 0
    vector = torch.randn(48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = {
        "steer": Steer(1, vector, alpha=2.0),
        "steer image tokens": Steer(0, vector, alpha=2.0, positions="image"),
        "patch a head": Patch("blocks.1.attn.hook_z", source, heads=[1, 2], positions="query"),
        "patch image tokens": Patch("blocks.1.hook_resid_pre", source, positions="image"),
        "patch rotated keys": Patch("blocks.1.attn.hook_rot_k", source, positions="image"),
        "patch the tower": Patch("vision.blocks.1.attn.hook_z", source, heads=[0], positions="all"),
        "ablate a pattern": Ablate("blocks.2.attn.hook_pattern", heads=[-1], positions="query"),
        "ablate to the mean": Ablate("blocks.0.mlp.hook_post", neurons=list(range(40)), value="mean", reference=source),
        "ablate features": Ablate("hook_image_features"),
        "scale neurons": ScaleNeurons(1, list(range(40)), 4.0, positions="query+generated"),
        "boost renorm": BoostAttention(1, [0, 3], factor=8.0),
        "boost scale": BoostAttention(1, [0, 3], factor=8.0, mode="scale"),
        "boost mul": BoostAttention(0, factor=4.0, mode="mul"),
        "boost abs": BoostAttention(0, factor=4.0, mode="abs"),
    }
    if third:
        found |= {
            "patch the addition": Patch("blocks.1.hook_deepstack", source, positions="image+last"),
            "ablate inner features": Ablate("deepstack.0.hook_out"),
            "ablate normed queries": Ablate("blocks.1.attn.q_norm.hook_normalized", heads=[1], positions="all"),
        }
    return found


def test_every_kind_acts_alike_in_every_way_of_running(ready: Ready) -> None:
    """Forward, run_with_cache, and generation with a key/value cache and without."""
    from transformers import SuppressTokensLogitsProcessor

    model, inputs = ready.model, ready.inputs
    options: dict[str, Any] = dict(max_new_tokens=4, return_type="tokens", eos_token_id=[])
    options["logits_processor"] = [SuppressTokensLogitsProcessor([PAD, QWEN_IMAGE, QWEN_VIDEO, QWEN_START, QWEN_END])]
    untouched = model.generate(inputs, **options)
    same, spoken = [], 0
    for name, item in kinds(ready).items():
        with torch.no_grad(), model.intervene([item]):
            ours, (cached, _) = model(inputs), model.run_with_cache(inputs)
            steps = model.generate(inputs, **options)
            assert torch.equal(model.generate(inputs, use_past_kv_cache=False, **options), steps), name
        assert relative_error(cached, ours, inputs.attention_mask) < 1e-10, name
        if not relative_error(ours, ready.plain, inputs.attention_mask) > 1e-6:
            same.append(name)
        spoken += not torch.equal(steps, untouched)
    assert same == [] and spoken > 3, "what changes nothing shows nothing"
    with torch.no_grad():
        assert torch.equal(model(inputs), ready.plain)


def test_every_kind_row_by_row_equals_the_rows_alone(ready: Ready) -> None:
    model, inputs, items = ready.model, ready.inputs, kinds(ready)
    of_text = ("steer", "ablate a pattern", "ablate to the mean", "scale neurons")
    first = [item for item in list(items.values())[6:] if not isinstance(item, Patch)]  # a source has rows of its own
    lists = [first, [items["boost renorm"], items["steer image tokens"], items["ablate features"]]]
    lists.append([items[name] for name in of_text])
    with torch.no_grad():
        with model.intervene(per_row=lists):
            together = model(inputs)
        for row, mine in enumerate(lists):
            with model.intervene(mine):
                alone = model(inputs[row])
            keep = inputs.attention_mask[row : row + 1]
            assert relative_error(together[row : row + 1], alone, keep) < 1e-10, row
            assert relative_error(alone, ready.plain[row : row + 1], keep) > 1e-6, row


@pytest.mark.parametrize("mode", ["renorm", "scale", "mul", "abs"])
def test_boost_of_images_reaches_every_image_and_frame_of_its_row_alone(mode: str, ready: Ready) -> None:
    """Against the pattern edited by hand: two images in one row, two frames of a video and an image in the next."""
    model, inputs, factor = ready.model, ready.inputs, 3.0
    keys = (inputs.tokens == QWEN_IMAGE) | (inputs.tokens == QWEN_VIDEO)
    assert keys.sum(-1).tolist() == [4 + 2, 2 + 2 + 1, 0]
    boost = BoostAttention(1, heads=[0, 2], factor=factor, mode=mode, queries="query")
    at = position_mask(inputs, "query")[:, None, :, None] & keys[:, None, None, :]
    at = at & torch.isin(torch.arange(model.cfg.n_heads), torch.tensor([0, 2]))[None, :, None, None]

    def edit(value: Tensor, hook: Any) -> Tensor:
        if mode == "abs":
            return torch.where(at, value + (factor - 1) * value.abs(), value)
        boosted = torch.where(at, value * factor, value)
        return boosted / boosted.sum(-1, keepdim=True).clamp(min=1e-300) if mode == "renorm" else boosted

    where = "hook_attn_scores" if mode in ("mul", "abs") else "hook_pattern"
    ours, expected = ready.logits([boost]), ready.hooked((f"blocks.1.attn.{where}", edit))
    assert relative_error(ours, expected, inputs.attention_mask) < 1e-10
    assert relative_error(ours[:2], ready.plain[:2], inputs.attention_mask[:2]) > 1e-4
    assert relative_error(ours[2:], ready.plain[2:], inputs.attention_mask[2:]) < 1e-12, "it has no picture"


def test_patch_of_image_tokens_equals_one_made_by_hand(ready: Ready) -> None:
    site = "blocks.2.hook_deepstack" if ready.model.cfg.n_deepstack else "blocks.2.hook_resid_pre"
    at, value = ready.inputs.image_mask[..., None], ready.source[site]
    ours = ready.logits([Patch(site, ready.source, positions="image")])
    expected = ready.hooked((site, lambda x, hook: torch.where(at, value, x)))
    assert relative_error(ours, expected, ready.inputs.attention_mask) < 1e-10
    assert relative_error(ours, ready.plain, ready.inputs.attention_mask) > 1e-6


@pytest.mark.parametrize("site", ["vision.blocks.1.mlp.hook_post", "connector.hook_pre", "hook_image_features"])
@pytest.mark.parametrize("has_batch_dim", [True, False])
def test_mean_over_pictures_counts_no_pads(site: str, has_batch_dim: bool, ready: Ready) -> None:
    """Shorter images are padded; one row's cache without its batch axis gives that row's mean."""
    inputs = ready.inputs if has_batch_dim else ready.inputs[0]
    with torch.no_grad():
        _, cache = ready.model.run_with_cache(inputs, names_filter=site, remove_batch_dim=not has_batch_dim)
    value = cache[site]
    if value.ndim == 3:
        patches = inputs.crop_grids.prod(-1) // (1 if site.startswith("vision.") else 4)
        assert len(set(patches.tolist())) > 1 and len(value) == len(patches)
        value = torch.cat([one[:n] for one, n in zip(value, patches.tolist(), strict=True)])
    ours = ready.logits([Ablate(site, value="mean", reference=cache)])
    expected = ready.hooked((site, lambda x, hook: value.mean(0).expand_as(x)))
    assert relative_error(ours, expected, ready.inputs.attention_mask) < 1e-12
    assert relative_error(ours, ready.plain, ready.inputs.attention_mask) > 1e-6


def test_ablation_of_one_rows_tower_leaves_the_other_rows(ready: Ready) -> None:
    model, inputs = ready.model, ready.inputs
    with torch.no_grad(), model.intervene(per_row=[[], [Ablate("vision.blocks.0.mlp.hook_post")], []]):
        ours = model(inputs)
    for row in (0, 2):
        assert relative_error(ours[row], ready.plain[row], inputs.attention_mask[row]) < 1e-12
    assert relative_error(ours[1], ready.plain[1], inputs.attention_mask[1]) > 1e-6


def test_saved_circuit_does_what_it_did(tmp_path: Any, ready: Ready) -> None:
    circuit = Circuit(list(kinds(ready).values()), name="all kinds")
    circuit.save(tmp_path / "circuit.safetensors")
    loaded = Circuit.load(tmp_path / "circuit.safetensors")
    assert len(loaded) == len(kinds(ready))
    first = ready.logits(circuit)
    assert torch.equal(ready.logits(loaded), first)
    assert relative_error(first, ready.plain, ready.inputs.attention_mask) > 1e-4
