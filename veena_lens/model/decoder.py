"""The one loop over blocks, and what enters it.

Forward, caching, generation and sweeps all call `run_blocks`; there is no second forward. The residual stream
moves to a block's device when blocks lie on several.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Bool, Float, Int
from torch import Tensor

from veena_lens.components.block import Block
from veena_lens.components.context import Context


def run_blocks(
    blocks: Sequence[Block] | object,
    resid: Float[Tensor, "batch pos d_model"],
    context: Context,
    start_layer: int = 0,
    stop_layer: int | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream after blocks start_layer .. stop_layer - 1."""
    for block in list(blocks)[start_layer:stop_layer]:  # type: ignore[call-overload]
        device = block.ln1.weight.device
        resid = block(resid if resid.device == device else resid.to(device), context)
    return resid


def scatter_features(
    embeds: Float[Tensor, "batch pos d_model"],
    image_mask: Bool[Tensor, "batch pos"],
    features: Float[Tensor, "n_image_tokens d_model"],
) -> Float[Tensor, "batch pos d_model"]:
    """Token embeddings with image features in place of the image tokens, row after row.

    Raises: ValueError when the numbers of features and image tokens differ."""
    wanted = int(image_mask.sum())
    if wanted != len(features):
        raise ValueError(
            f"The prompt holds {wanted} image tokens but the pictures give {len(features)} features. "
            "Prepare the inputs with the checkpoint's own processor, one picture for each placeholder."
        )
    return embeds.masked_scatter(image_mask[..., None].to(embeds.device), features.to(embeds))


def resolve_layer(layer: int | None, n_layers: int, what: str) -> int | None:
    """A layer bound in 0..n_layers; negative ones count from the end.

    Raises: ValueError when it is outside."""
    if layer is None:
        return None
    resolved = layer + n_layers if layer < 0 else layer
    if not 0 <= resolved <= n_layers:
        raise ValueError(f"{what}={layer} is outside a model of {n_layers} layers.")
    return resolved


def next_token_targets(
    tokens: Int[Tensor, "batch pos"], counted: Bool[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]
) -> tuple[Int[Tensor, "batch pos_less_one"], Bool[Tensor, "batch pos_less_one"]]:
    """Each position's next token, and whether it counts in a loss: text, predicted from a real position."""
    return tokens[:, 1:], counted[:, 1:] & real[:, :-1]
