"""Bytes hold maps within the stated error, and binaries say when they were cut short."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veena_lens.app.view.bundles import encode, pack, unpack


@given(seed=st.integers(0, 10_000), is_signed=st.booleans())
def test_decoded_map_is_within_half_a_step_of_the_root(seed: int, is_signed: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    values = torch.rand(2, 3, 40, generator=random) ** 4
    if is_signed:
        values = values * torch.where(torch.rand(values.shape, generator=random) < 0.5, -1.0, 1.0)
    is_image = torch.rand(40, generator=random) < 0.5
    is_image[:2] = torch.tensor([True, False])
    coded = encode(values, is_image, is_signed)
    scale = coded.scales[..., is_image.long()]
    root = (coded.decode(is_image).abs() / scale).sqrt() - (values.abs() / scale).sqrt()
    assert float(root.abs().max()) <= 0.5 / (127 if is_signed else 255) + 1e-5
    nonzero = coded.decode(is_image) != 0
    assert bool((coded.decode(is_image)[nonzero].sign() == values[nonzero].sign()).all())


def test_a_sink_in_the_text_leaves_the_picture_its_own_scale() -> None:
    values = torch.tensor([0.99, 0.001, 0.0005])
    decoded = encode(values, torch.tensor([False, True, True])).decode(torch.tensor([False, True, True]))
    torch.testing.assert_close(decoded, values, rtol=0.01, atol=0)


def test_map_of_zeros_and_of_nan_decodes_to_zeros() -> None:
    is_image = torch.tensor([True, False])
    for value in (0.0, torch.nan):
        for is_signed in (False, True):
            assert encode(torch.full((2,), value), is_image, is_signed).decode(is_image).tolist() == [0.0, 0.0]


def test_packed_arrays_come_back_and_lie_at_multiples_of_eight() -> None:
    arrays = {
        "a": np.arange(5, dtype=np.uint8),
        "b": np.array([[1.5, -2.0]], dtype=np.float32),
        "c": np.zeros((0, 4), dtype=np.int32),
    }
    data = pack({"title": "Gesicht — 顔"}, arrays)
    header, found = unpack(data)
    assert header == {"title": "Gesicht — 顔"} and (int.from_bytes(data[4:8], "little") + 8) % 8 == 0
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_binary_that_was_cut_short_or_is_of_another_kind_is_refused() -> None:
    data = pack({}, {"a": np.arange(100, dtype=np.uint8)})
    with pytest.raises(ValueError, match="cut short: array 'a'"):
        unpack(data[:-20])
    with pytest.raises(ValueError, match="cut short: its header"):
        unpack(data[:12])
    with pytest.raises(ValueError, match="not a packed view"):
        unpack(b"PNG and so on")
