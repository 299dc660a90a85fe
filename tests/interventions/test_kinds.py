"""Patch, Ablate, ScaleNeurons, BoostAttention and Circuit: equal to hooks by hand, cached or not, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import SuppressTokensLogitsProcessor

from tests.cases import IMAGE_TOKEN, PAD, QWEN, relative_error
from tests.interventions.kinds import BIDIRECTIONAL, CASES, SEVERAL, Ready, kinds_of
from tests.odd_inputs import QWEN_END, QWEN_IMAGE, QWEN_START, QWEN_VIDEO
from tests.pairs import pair_of
from veena_lens.interventions import (
    Ablate,
    BoostAttention,
    Circuit,
    Patch,
    ScaleNeurons,
    Steer,
    SuppressHeads,
)
from veena_lens.positions import position_mask

SPECIAL = [PAD, QWEN_IMAGE, QWEN_VIDEO, QWEN_START, QWEN_END, IMAGE_TOKEN]
OPTIONS: dict[str, Any] = dict(max_new_tokens=8, return_type="tokens", eos_token_id=[])
OPTIONS["logits_processor"] = [SuppressTokensLogitsProcessor(SPECIAL)]
MADE: dict[str, Ready] = {}


@pytest.fixture
def ready_of(model_of) -> Callable[[str], Ready]:
    """The runs of a case, which are computed once; Qwen's attention is made strong."""

    def get(name: str) -> Ready:
        case = CASES[name]
        model, inputs, others = pair_of(model_of, case, gain=5.0 if case.has("streams") else 1.0)
        if name not in MADE:
            with torch.no_grad():
                plain, cache = model.run_with_cache(inputs)
                MADE[name] = Ready(name, model, inputs, plain, cache, model.run_with_cache(others)[1])
        return MADE[name]

    return get


@pytest.fixture(params=CASES)
def any_ready(request: pytest.FixtureRequest, ready_of) -> Ready:
    return ready_of(request.param)


@pytest.fixture(params=QWEN)
def sized(request: pytest.FixtureRequest, ready_of) -> Ready:
    """Images of unequal size, frames of a video."""
    return ready_of(request.param)


@pytest.fixture
def ready(ready_of) -> tuple[Any, Any, Tensor, Any]:
    """(model, inputs, logits, cache) of square images."""
    found = ready_of(SEVERAL)
    return found.model, found.inputs, found.plain, found.cache


def test_every_kind_acts_alike_in_every_way_of_running(any_ready: Ready) -> None:
    """Forward, with every activation or the patterns listened to, and generation with a key/value cache and without."""
    ready = any_ready
    model, inputs = ready.model, ready.inputs
    options = OPTIONS if ready.name == SEVERAL else OPTIONS | dict(max_new_tokens=5)
    untouched, spoken = model.generate(inputs, **options), 0
    least = 1e-4 if ready.name == SEVERAL else 1e-6
    for name, item in kinds_of(ready).items():
        with torch.no_grad(), model.intervene([item]):
            ours = model(inputs)
            if ready.name == BIDIRECTIONAL:
                listening = ready.hooked((lambda n: n.endswith("pattern"), lambda x, hook: None))
            else:
                listening = model.run_with_cache(inputs)[0]
            steps = model.generate(inputs, **options)
            assert torch.equal(model.generate(inputs, use_past_kv_cache=False, **options), steps), name
        assert ready.differs(ours, ready.plain) > least, f"{name} does nothing"
        assert ready.differs(listening, ours) < 1e-12, name
        assert torch.equal(ready.logits([]), ready.plain), f"{name} stayed"
        spoken += not torch.equal(steps, untouched)
    assert spoken > 3, "edits that change no word show nothing of the words"


def test_every_kind_edits_the_row_that_it_is_given_to_as_the_row_alone(any_ready: Ready) -> None:
    ready = any_ready
    model, inputs = ready.model, ready.inputs
    row = next(i for i, s in enumerate(inputs.spans) if s.images)
    for name, item in kinds_of(ready).items():
        every = ready.logits([item])
        with torch.no_grad(), model.intervene(per_row=[[item] if i == row else [] for i in range(len(inputs))]):
            one = model(inputs)
        for i, keep in enumerate(inputs.attention_mask):
            expected = every if i == row else ready.plain
            assert relative_error(one[i][keep], expected[i][keep]) < 1e-12, name
            if inputs.spans[i].images and not isinstance(item, Patch):  # a source has rows of its own
                with torch.no_grad(), model.intervene([item]):
                    alone = model(inputs[i].without_padding())[0]
                assert relative_error(alone, every[i][keep]) < 1e-10, name


def test_rows_with_lists_of_kinds_equal_the_rows_alone(sized: Ready) -> None:
    ready, items = sized, kinds_of(sized)
    model, inputs = ready.model, ready.inputs
    of_text = ("steer", "ablate a pattern", "ablate to the mean", "scale neurons")
    first = [item for name, item in items.items() if name not in of_text and not isinstance(item, Patch)]
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


def test_a_circuit_comes_back_from_its_file_as_it_was(any_ready: Ready, tmp_path) -> None:
    """Each kind for itself beside another, and all kinds together."""
    ready, items = any_ready, kinds_of(any_ready)
    lists = [[item, Steer(0, torch.ones(48, dtype=torch.float64))] for item in items.values()]
    for mine in [*(lists if ready.name == SEVERAL else []), list(items.values())]:
        circuit = Circuit(mine, "test", {"seed": 1})
        back = Circuit.load(circuit.save(tmp_path / "circuit.safetensors"))
        assert back.name == "test" and back.meta == {"seed": 1} and len(back) == len(mine)
        assert repr(back[0]).split(",")[0] == repr(circuit[0]).split(",")[0]
        first = ready.logits(circuit)
        assert torch.equal(ready.logits(back), first)
        assert ready.differs(first, ready.plain) > 1e-4


PARTS = ("hook_resid_pre", "attn.hook_z", "attn.hook_k", "attn.hook_pattern", "mlp.hook_post")
PATCHES = [(SEVERAL, f"blocks.1.{p}", at) for p in PARTS for at in ("last", "query", "image", "all", slice(2, 5))]
PATCHES += [(family, "blocks.2.hook_resid_pre", "image") for family in QWEN[:2]]
PATCHES += [("qwen3_vl", "blocks.2.hook_deepstack", "image")]


@pytest.mark.parametrize(("name", "site", "positions"), PATCHES, ids=str)
def test_a_patch_equals_a_hook_written_by_hand(name: str, site: str, positions: Any, ready_of) -> None:
    ready = ready_of(name)
    mask, donor = position_mask(ready.inputs, positions), ready.source[site]

    def by_hand(value: Tensor, hook: Any) -> Tensor:
        out = value.clone()
        if site.endswith("pattern"):
            out.transpose(1, 2)[mask] = donor.transpose(1, 2)[mask]
        else:
            out[mask] = donor[mask]
        return out

    ours = ready.logits([Patch(site, ready.source, positions=positions)])
    assert ready.differs(ours, ready.hooked((site, by_hand))) < 1e-12
    assert ready.differs(ours, ready.plain) > 1e-6


def test_a_patch_between_runs_of_unequal_length_goes_position_by_position(ready) -> None:
    model, inputs, _, _ = ready
    short, long = inputs[0], inputs.with_answer([[7, 8, 9]] * len(inputs))[0]
    with torch.no_grad():
        _, donor = model.run_with_cache(long)
        with model.intervene([Patch("blocks.0.hook_resid_post", donor, positions="query")]):
            _, cache = model.run_with_cache(short)
    here, there = cache.at("query", "resid_post", 0), donor.at("query", "resid_post", 0)
    assert relative_error(here, there) < 1e-12


def test_patching_a_run_with_itself_changes_nothing(ready) -> None:
    model, inputs, plain, cache = ready
    with torch.no_grad(), model.intervene([Patch("blocks.0.attn.hook_z", cache, heads=[0, 2], positions="all")]):
        assert relative_error(model(inputs), plain, inputs.attention_mask) < 1e-12


@pytest.mark.parametrize("mode", ["renorm", "scale", "mul", "abs"])
def test_boost_of_images_reaches_every_image_and_frame_of_its_row_alone(mode: str, any_ready: Ready) -> None:
    """Against the pattern edited by hand: several images in a row, two frames of a video and an image, none."""
    ready, factor = any_ready, 3.0
    model, inputs = ready.model, ready.inputs
    keys = (inputs.tokens == QWEN_IMAGE) | (inputs.tokens == QWEN_VIDEO)
    if ready.name in QWEN:
        assert keys.sum(-1).tolist() == [4 + 2, 2 + 2 + 1, 0]
    else:
        keys = inputs.tokens == IMAGE_TOKEN
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
    assert ready.differs(ours, expected) < 1e-10
    for row, spans in enumerate(inputs.spans):
        change = relative_error(ours[row], ready.plain[row], inputs.attention_mask[row])
        assert change > 1e-6 if spans.images else change < 1e-12, "a row without images is left alone"
    with_images = [row for row, spans in enumerate(inputs.spans) if spans.images]
    keep = inputs.attention_mask[with_images]
    assert relative_error(ours[with_images], ready.plain[with_images], keep) > 1e-4


def test_renorm_divides_by_the_new_sum(ready) -> None:
    """A' = factor A on the keys, divided by the new sum: the bias of the fused kernel is that same function."""
    model, inputs, _, _ = ready
    with torch.no_grad():
        with model.intervene([BoostAttention(1, [0, 3], factor=4.0)]):
            mass = model.attention(inputs, "query", "image", layers=[1]).values
        before = model.attention(inputs, "query", "image", layers=[1]).values
    m = before[:, 0, 0].sum(-1)
    assert relative_error(mass[:, 0, 0].sum(-1), 4 * m / (1 + 3 * m)) < 1e-12


@pytest.mark.parametrize("site", ["vision.blocks.1.mlp.hook_post", "connector.hook_pre", "hook_image_features"])
@pytest.mark.parametrize("has_batch_dim", [True, False])
def test_mean_over_pictures_counts_no_pads(site: str, has_batch_dim: bool, sized: Ready) -> None:
    """Shorter images are padded; one row's cache without its batch axis gives that row's mean."""
    inputs = sized.inputs if has_batch_dim else sized.inputs[0]
    with torch.no_grad():
        _, cache = sized.model.run_with_cache(inputs, names_filter=site, remove_batch_dim=not has_batch_dim)
    value = cache[site]
    if value.ndim == 3:
        patches = inputs.crop_grids.prod(-1) // (1 if site.startswith("vision.") else 4)
        assert len(set(patches.tolist())) > 1 and len(value) == len(patches)
        value = torch.cat([one[:n] for one, n in zip(value, patches.tolist(), strict=True)])
    ours = sized.logits([Ablate(site, value="mean", reference=cache)])
    expected = sized.hooked((site, lambda x, hook: value.mean(0).expand_as(x)))
    assert relative_error(ours, expected, sized.inputs.attention_mask) < 1e-12
    assert relative_error(ours, sized.plain, sized.inputs.attention_mask) > 1e-6


def test_ablation_of_one_rows_tower_leaves_the_other_rows(sized: Ready) -> None:
    model, inputs = sized.model, sized.inputs
    with torch.no_grad(), model.intervene(per_row=[[], [Ablate("vision.blocks.0.mlp.hook_post")], []]):
        ours = model(inputs)
    for row in (0, 2):
        assert relative_error(ours[row], sized.plain[row], inputs.attention_mask[row]) < 1e-12
    assert relative_error(ours[1], sized.plain[1], inputs.attention_mask[1]) > 1e-6


@pytest.mark.parametrize("mode", ["renorm", "logit", "scale", "mul", "abs"])
def test_a_factor_of_one_changes_no_bit_worth_of_a_logit(mode: str, ready) -> None:
    model, inputs, plain, _ = ready
    with torch.no_grad(), model.intervene([BoostAttention(1, factor=1.0, mode=mode), ScaleNeurons(0, [1, 2], 1.0)]):
        assert relative_error(model(inputs), plain, inputs.attention_mask) < 1e-13


def test_scaling_neurons_equals_scaling_rows_of_w_out(ready) -> None:
    model, inputs, _, _ = ready
    with torch.no_grad():
        with model.intervene([ScaleNeurons(1, [4, 9], 3.0, positions="all")]):
            ours = model(inputs)
        kept = model.blocks[1].mlp.W_out[[4, 9]].clone()
        model.blocks[1].mlp.W_out[[4, 9]] *= 3.0
        expected = model(inputs)
        model.blocks[1].mlp.W_out[[4, 9]] = kept
    assert relative_error(ours, expected, inputs.attention_mask) < 1e-12


@pytest.mark.parametrize(
    ("make", "telling"),
    [
        (lambda: Ablate("blocks.9.attn.hook_z"), "blocks.9"),
        (lambda: Ablate("blocks.0.attn.hook_z", heads=[17]), "head 17"),
        (lambda: Ablate("blocks.0.hook_resid_pre", heads=[0]), "axes"),
        (lambda: Ablate("blocks.0.mlp.hook_post", neurons=[]), "empty"),
        (lambda: Ablate("blocks.0.attn.hook_z", value="mean"), "reference"),
        (lambda: Ablate("blocks.0.attn.hook_z", positions="lats"), "lats"),
        (lambda: ScaleNeurons(5, [0]), "layer 5"),
        (lambda: ScaleNeurons(0, [10_000]), "10000"),
        (lambda: BoostAttention(0, factor=-1.0), "positive"),
        (lambda: BoostAttention(0, mode="louder"), "louder"),
        (lambda: Ablate("vision.blocks.0.hook_resid_pre", positions="query"), "text"),
    ],
)
def test_what_cannot_act_is_refused_before_anything_runs(make: Any, telling: str, ready) -> None:
    model, inputs, _, _ = ready
    with pytest.raises(ValueError, match=telling), model.intervene([make()]):
        model(inputs)


def test_boosting_a_picture_that_is_not_there_is_refused(model_of) -> None:
    model = model_of(CASES[SEVERAL])
    text = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="no row"), model.intervene([BoostAttention(0)]):
        model(text)


def test_alike_edits_of_several_rows_act_as_one_and_equal_each_row_alone(ready) -> None:
    model, inputs, plain, _ = ready
    strong = [BoostAttention(1, [0, 2], factor=3.0, mode="scale") for _ in range(3)]
    weak, quiet = BoostAttention(1, [0, 2], factor=0.5, mode="scale"), SuppressHeads(1, keep=0.5)
    lists: list[list[Any]] = [[strong[0], quiet], [strong[1], quiet], [quiet, strong[2]], [weak]]
    lists += [[]] * (len(inputs) - len(lists))
    lists = lists[: len(inputs)]
    with torch.no_grad():
        with model.intervene(per_row=lists):
            # Place 0: the strong boosts of rows 0 and 1, row 2's quieting, row 3's; place 1: quieting, row 2's boost.
            groups = [x.of for x in model._edits.applied]
            assert groups[:2] == [(0, 1), (2,)] and (0, 1) in groups[2:]
            together = model(inputs)
        for row, mine in enumerate(lists):
            with model.intervene(mine):
                alone = model(inputs)
            keep = inputs.attention_mask[row]
            assert relative_error(together[row][keep], (alone if mine else plain)[row][keep]) < 1e-12


def test_empty_selection_of_one_row_among_alike_ones_is_named(ready) -> None:
    model, inputs, _, _ = ready
    boost = BoostAttention(1, queries=slice(0, 1))
    held = [bool(m[0]) for m in inputs.attention_mask]  # a padded row has no token there
    assert any(held) and not all(held), "the case must have padded rows and one without"
    with (
        model.intervene(per_row=[[boost]] * len(inputs)),
        pytest.raises(ValueError, match=f"no position in row {held.index(False)} "),
    ):
        model(inputs)
