"""A patch whose source has other rows than the run is refused before anything is computed."""

from __future__ import annotations

import pytest
import torch

from veena_lens import HookedVLM
from veena_lens.interventions import Patch


@pytest.mark.parametrize("rows", [1, 3])
def test_source_of_two_rows_does_not_patch_other_numbers_of_rows(rows: int) -> None:
    model = HookedVLM.from_pretrained("tiny-llava-emotion")
    _, cache = model.run_with_cache(model.to_tokens("user: hello assistant:").repeat(2, 1))
    run = model.to_tokens("user: hello assistant:").repeat(rows, 1)
    with (
        model.intervene([Patch("blocks.3.hook_resid_post", cache)]),
        pytest.raises(ValueError, match="source has 2 rows"),
    ):
        model(run)
    assert not any(point._forward_hooks for point in model.hook_dict.values())
    one = Patch("blocks.3.hook_resid_post", cache["blocks.3.hook_resid_post"][:1])
    with model.intervene([one]):
        assert torch.isfinite(model(run)).all()
