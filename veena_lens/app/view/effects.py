"""The view of a sweep over positions: each position's effect on its cell of the image, or on its word of the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from veena_lens.app.view.building import Parts
from veena_lens.app.view.opening import seen_layer
from veena_lens.app.view.rows import Consume
from veena_lens.app.view.view import ExplorerView
from veena_lens.inputs import MultimodalInputs
from veena_lens.scores import Scores


@dataclass(frozen=True)
class NoRows:
    """The shape of a model whose attention such a view does not show."""

    n_layers: int
    n_heads: int = 1

    def stream(self, queries: Sequence[int], consume: Consume) -> None:
        """Raises: ValueError, always."""
        raise ValueError("The view of a sweep holds effects, and no attention; ask in the Look tab for that.")


def effects_view(
    result: Scores,
    inputs: MultimodalInputs,
    pictures: Sequence[Image.Image] | None,
    tokenizer: Any,
    *,
    name: str = "effect",
    title: str = "",
) -> ExplorerView:
    """Return the view of effects over (layer, pos), as `patch_sweep(..., positions="each")` measures them.

    inputs: of the run that was patched, one row. pictures: its images. tokenizer: names its tokens. name: of the
    effect, with its unit. title: of the page.
    Raises: ValueError for Scores of other axes, or positions that the inputs do not have."""
    if tuple(result.axes) != ("layer", "pos") or len(inputs) != 1:
        raise ValueError(
            f"effects_view: got axes {tuple(result.axes)} and {len(inputs)} rows of inputs; give (layer, pos) of one "
            "pair, after .mean('head') or .select(...)."
        )
    places, length = result.labels["pos"], inputs.shape[1]
    if not all(isinstance(p, int) and 0 <= p < length for p in places):
        raise ValueError(f"effects_view: the sweep has positions to {max(places)}, the inputs {length}.")
    values = torch.full((result.shape[0], length), torch.nan)
    values[:, list(places)] = result.scores.detach().float().cpu()
    parts = Parts(inputs=inputs, pictures=pictures, model=None, modes=["effects"])
    parts.tokenizer = tokenizer
    parts.arrays["effects"] = values.numpy().astype(np.float32)
    parts.header["effects"] = {"name": name}
    rows, is_image = NoRows(result.shape[0]), inputs.image_mask[0].cpu()
    header, arrays = parts.finished(rows, [inputs.spans[0].last], [], title)
    header["layer"] = seen_layer(values.nan_to_num(0.0).abs()[:, None], is_image)
    return ExplorerView(title=title, inputs=inputs, header=header, arrays=arrays, bundles=(), runs=(rows,))
