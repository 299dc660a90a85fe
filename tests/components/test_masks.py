"""Attention inside areas: the kernel that meets them one by one equals the mask over all positions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import BY_NAME, native_model, raw_inputs
from veena_lens.components.masks import AreaMask, attend_in_areas
from veena_lens.vision.qwen import patch_places, window_numbers


@given(
    rows=st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=1, max_size=4).filter(lambda rows: any(rows)),
    seed=st.integers(0, 5),
)
def test_areas_one_by_one_equal_the_mask_over_all_positions(rows: list[list[int]], seed: int) -> None:
    """With gradients; positions that do not exist get zeros and no gradient."""
    length = max(map(len, rows)) + 1
    numbers = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    real = torch.tensor([[i < len(row) for i in range(length)] for row in rows])
    mask = AreaMask(numbers, real)
    generator = torch.Generator().manual_seed(seed)
    q, k, v, upward = (torch.randn(len(rows), 2, length, 4, generator=generator, dtype=torch.float64) for _ in range(4))
    found = []
    for attend in (
        lambda q, k, v: attend_in_areas(q, k, v, mask, 0.3),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask.allowed, scale=0.3),
    ):
        parts = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*parts).nan_to_num()
        found.append([out, *torch.autograd.grad(out, parts, upward * real[:, None, :, None])])
    for ours, plain in zip(*found, strict=True):
        keep = real[:, None, :, None].expand_as(ours)
        assert torch.allclose(ours[keep], plain[keep], rtol=1e-12, atol=1e-14)
        assert not ours[~keep].any()


def test_windows_cut_a_picture_from_the_top_left() -> None:
    """Patches lie square by square: here 2 x 2 a square, windows of 2 x 2 squares, ragged at the right and below."""
    places = patch_places((6, 10), 2)
    numbers = window_numbers(places[None], torch.tensor([10]), 4)[0]
    grid = torch.zeros(6, 10, dtype=torch.long)
    grid[places[:, 0], places[:, 1]] = numbers
    assert grid[:, ::2].tolist() == [[0, 0, 1, 1, 2]] * 4 + [[3, 3, 4, 4, 5]] * 2
    assert torch.equal(grid[:, ::2], grid[:, 1::2])


@pytest.mark.parametrize("name", ["hook_resid_post", "attn.hook_pattern"])
def test_mask_over_all_patches_is_made_for_listeners_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large image's windows cost what its windows hold."""
    made = []
    monkeypatch.setattr(AreaMask, "allowed", property(lambda self: made.append(1) or self.numbers[:, None, None] >= 0))
    case = BY_NAME["qwen2_5_vl-plain"]
    model = native_model(case)
    model.run_with_cache(model.inputs_from_hf(**raw_inputs(case)), names_filter=f"vision.blocks.0.{name}")
    assert bool(made) == (name == "attn.hook_pattern")
