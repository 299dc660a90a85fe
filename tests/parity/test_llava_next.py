"""LLaVA-1.6 against Hugging Face in float64: odd image sizes, several images, padding, generation, the way back."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.cases import IMAGE_TOKEN, PAD, TEXT, TOWER, relative_error
from veena_lens import HookedVLM
from veena_lens.images.anyres import image_in_tiles

PINS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
DECODERS = {
    "llama": transformers.LlamaConfig(**TEXT, head_dim=16, attention_bias=True),
    "mistral": transformers.MistralConfig(**TEXT, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**TEXT),
}
SIZES = [(28, 28), (40, 75), (90, 30), (1, 200), (200, 1), (56, 56), (84, 28), (300, 299), (13, 57), (29, 83)]


def build(decoder: str, seed: int = 0, **options: Any) -> tuple[Any, HookedVLM]:
    """A tiny model with every parameter shaken, in Hugging Face and here."""
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, projection_dim=16),
        text_config=DECODERS[decoder],
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINS,
        **options,
    )
    torch.manual_seed(seed)
    hf = transformers.LlavaNextForConditionalGeneration._from_config(config, attn_implementation="sdpa").double().eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.ndim == 1 else 0.05))
    return hf, HookedVLM.from_hf(hf)


def batch(model: HookedVLM, sizes: list[list[tuple[int, int]]], seed: int = 0) -> dict[str, Tensor]:
    """A left-padded batch whose rows hold images of the given (height, width)."""
    rng = random.Random(seed)
    rows, layouts = [], []
    for pictures in sizes:
        row = [rng.randint(2, 100) for _ in range(rng.randint(1, 5))]
        for size in pictures:
            layouts.append(image_in_tiles(model.cfg, size))
            row += [IMAGE_TOKEN] * layouts[-1].n_tokens + [rng.randint(2, 100) for _ in range(rng.randint(1, 6))]
        rows.append(row)
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])
    out = {"input_ids": ids, "attention_mask": mask}
    if layouts:
        most = max(layout.n_crops for layout in layouts)
        pixels = torch.zeros(len(layouts), most, 3, 28, 28, dtype=torch.float64)
        for i, layout in enumerate(layouts):
            pixels[i, : layout.n_crops] = torch.randn(layout.n_crops, 3, 28, 28, dtype=torch.float64)
        out |= {"pixel_values": pixels, "image_sizes": torch.tensor([layout.size for layout in layouts])}
    return out


def some_sizes(seed: int) -> list[list[tuple[int, int]]]:
    """Three rows of none to two images, every second size at random."""
    rng = random.Random(seed)
    pick = lambda: rng.choice(SIZES) if rng.random() < 0.5 else (rng.randint(1, 180), rng.randint(1, 180))  # noqa: E731
    rows = [[pick() for _ in range(rng.randint(0, 2))] for _ in range(2)]
    return [*rows, [pick()]]


@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("decoder", DECODERS)
def test_logits_and_hidden_states_equal_hugging_face(decoder: str, seed: int) -> None:
    options = [{}, {"vision_feature_layer": [-2, 1]}, {"vision_feature_layer": -1}][seed % 3]
    hf, model = build(decoder, seed, **options)
    raw = batch(model, some_sizes(seed), seed)
    with torch.no_grad():
        theirs = hf(**raw, output_hidden_states=True)
        logits, cache = model.run_with_cache(model.inputs_from_hf(**raw))
    keep = raw["attention_mask"].bool()
    assert relative_error(logits, theirs.logits, keep) < 1e-9
    for layer in range(model.cfg.n_layers):
        assert relative_error(cache["resid_pre", layer], theirs.hidden_states[layer], keep) < 1e-9
    if "pixel_values" in raw:
        features = hf.model.get_image_features(raw["pixel_values"], raw["image_sizes"], return_dict=True).pooler_output
        assert relative_error(cache["hook_image_features"], torch.cat(list(features))) < 1e-9


def test_generation_equals_hugging_face_on_pictures_of_unequal_size() -> None:
    hf, model = build("mistral")
    raw = batch(model, [[(40, 75)], [(90, 30), (28, 28)], [(200, 1)]])
    expected = hf.generate(**raw, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    ours = model.generate(model.inputs_from_hf(**raw), max_new_tokens=40, eos_token_id=[], return_type="tokens")
    assert torch.equal(ours, expected[:, raw["input_ids"].shape[1] :])


def test_a_row_of_the_batch_is_the_row_alone() -> None:
    _, model = build("llama")
    inputs = model.inputs_from_hf(**batch(model, [[(40, 75)], [(90, 30), (28, 28)], []]))
    with torch.no_grad():
        whole = model(inputs)
        for i in range(3):
            alone = model(inputs[i])
            keep = inputs.attention_mask[i]
            assert relative_error(whole[i][keep], alone[0][keep]) < 1e-7


def test_an_image_grid_leaves_out_the_whole_view_and_the_newlines() -> None:
    _, model = build("llama")
    raw = batch(model, [[(40, 75)], [(90, 30), (300, 299)]])
    inputs = model.inputs_from_hf(**raw)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    for row, image, size in [(0, 0, (40, 75)), (1, 0, (90, 30)), (1, 1, (300, 299))]:
        layout = image_in_tiles(model.cfg, size)
        grid = cache.image_grid("resid_post", 1, row=row, image=image)
        span = inputs.spans[row].images[image]
        assert grid.shape[:2] == (layout.rows, layout.cols) == inputs.grids[row][image]
        assert span.stop - span.start == layout.n_tokens
        mine = cache["resid_post", 1][row, span][layout.base**2 :].view(layout.rows, layout.cols + 1, -1)
        assert torch.equal(grid, mine[:, :-1])
        features = cache.image_grid("hook_image_features", row=row, image=image)
        assert torch.equal(features, cache.image_grid("hook_embed", row=row, image=image))


@pytest.mark.parametrize("size", [*SIZES, (600, 800)], ids=str)
def test_boxes_of_the_grid_tile_the_picture(size: tuple[int, int]) -> None:
    _, model = build("llama")
    layout = image_in_tiles(model.cfg, size)
    boxes = layout.boxes()
    height, width = size
    assert boxes.shape == (layout.n_tokens, 4) and int(boxes[:, 0].isnan().sum()) == layout.rows
    grid = boxes[layout.grid_places()].view(layout.rows, layout.cols, 4)
    assert bool((grid >= 0).all()) and bool((grid[..., 2] <= width).all()) and bool((grid[..., 3] <= height).all())
    # Neighbours touch, and a whole view spans the image.
    assert torch.allclose(grid[:, :-1, 2], grid[:, 1:, 0]) and torch.allclose(grid[:-1, :, 3], grid[1:, :, 1])
    whole = boxes[: layout.base**2]
    assert whole[:, :2].min() == 0 and torch.allclose(whole[:, 2:].max(0).values, torch.tensor([width, height]).float())


def test_the_way_back_is_exact_and_loads(tmp_path) -> None:
    hf, model = build("qwen2")
    theirs = hf.state_dict()
    ours = model.to_hf_state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)
    hf.save_pretrained(tmp_path)
    again = HookedVLM.from_pretrained(tmp_path)
    raw = batch(again, [[(40, 75)]])
    with torch.no_grad():
        assert torch.equal(again.forward_hf(**raw), model.forward_hf(**raw))


def test_pictures_that_do_not_fit_are_refused() -> None:
    _, model = build("llama")
    raw = batch(model, [[(40, 75)]])
    with pytest.raises(ValueError, match="image_sizes"):
        model.inputs_from_hf(**{k: v for k, v in raw.items() if k != "image_sizes"})
    with pytest.raises(ValueError, match="tiles"):
        model.inputs_from_hf(**{**raw, "pixel_values": raw["pixel_values"][:, :2]})
    with pytest.raises(ValueError, match="images"):
        model.inputs_from_hf(**{**raw, "image_sizes": torch.tensor([[28, 28]])})


def test_the_processor_and_the_packing_count_the_same_tokens(tiny_next_processor: Any) -> None:
    from PIL import Image

    _, model = build("llama")
    model.processor, model.tokenizer = tiny_next_processor, tiny_next_processor.tokenizer
    for height, width in [(40, 75), (90, 30), (28, 28), (13, 200)]:
        inputs = model.prepare(text="<image> w5", images=Image.new("RGB", (width, height), "red"), chat=False)
        layout = image_in_tiles(model.cfg, (height, width))
        assert inputs.count_image_tokens(0, inputs.spans[0].images[0]) == layout.n_tokens
        assert torch.equal(inputs.patch_boxes[0][0].nan_to_num(-1), layout.boxes().nan_to_num(-1))
    both = model.prepare(
        text=["<image> w5", "<image><image> w6"],
        images=[[Image.new("RGB", (75, 40))], [Image.new("RGB", (30, 90)), Image.new("RGB", (28, 28))]],
        chat=False,
    )
    with torch.no_grad():
        assert model(both).shape[:2] == both.shape


@pytest.fixture(scope="module")
def tiny_next_processor() -> Any:
    from tests.cases import tiny_tokenizer

    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # split wherever it stands
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=PINS
    )
    return transformers.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
