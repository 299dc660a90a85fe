"""The pass of the whole model, from images and tokens to logits; every caller in the package runs this one.

1. `embed`: images -> tower -> connector -> packed features, which take the places of the image tokens among the
   token embeddings.
2. `run_blocks`: the one loop over the blocks of the decoder, which read what they share (`blocks_share`): masks,
   rotary tables, past keys and values, attention biases.
3. `unembed`: final norm and unembedding, at the positions whose logits are wanted.

`HookedVLM.forward` and `generate` run it from the first block, sweeps and circuit tools from the block and the
positions where their runs begin to differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veena_lens.components.context import Context
from veena_lens.components.hooks import uncompiled
from veena_lens.components.kv_cache import KVCache, SharedPrefix
from veena_lens.images.layout import image_runs, pack_features
from veena_lens.inputs import MultimodalInputs
from veena_lens.model.edits import attention_biases, running
from veena_lens.model.span import PassSpan
from veena_lens.positions import as_int
from veena_lens.vision.connector import TowerOutput
from veena_lens.vision.qwen import DeepstackMerger

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM


class Output(NamedTuple):
    """What `return_type="both"` returns: logits [batch pos d_vocab] and the loss."""

    logits: Tensor
    loss: Tensor


Deepstack: TypeAlias = Mapping[int, Float[Tensor, "#batch pos d_model"]]
ALL, LAST = slice(None), slice(-1, None)


@dataclass(frozen=True, eq=False)
class ResidualState:
    """The residual stream that enters block `layer`, and what deep-stack features add at the input of layers."""

    resid: Float[Tensor, "batch pos d_model"]
    deepstack: Deepstack = field(default_factory=dict)
    layer: int = 0

    def rows(self, index: Sequence[int]) -> ResidualState:
        """Return the chosen rows, each as often as it is named."""
        at = list(index)
        return ResidualState(self.resid[at], {layer: x[at] for layer, x in self.deepstack.items()}, self.layer)


@uncompiled
def forward(
    model: HookedVLM,
    span: PassSpan,
    *,
    entering: ResidualState | None = None,
    stop: int | None = None,
    cache: KVCache | None = None,
    prefix: SharedPrefix | None = None,
    positions: slice | Int[Tensor, " batch"] = ALL,
    unembeds: bool = True,
) -> Float[Tensor, "batch pos d"]:
    """Return the logits of a pass, or the residual stream that enters a block.

    span: the inputs, and the positions that the pass computes.
    entering: where the pass begins. None: with the images and tokens of the span.
    stop: the block whose input is returned, 0 .. n_layers. None: logits are returned.
    cache: keys and values of earlier chunks; this chunk's are appended.
    prefix: keys and values of the positions before the span, which all rows share.
    positions: where logits are computed, a slice of the span's positions or one position per row.
    unembeds: False returns the last norm's output instead of logits.
    """
    with running(model, span):
        if entering is None:
            entering = embed(model, span)
        shared = blocks_share(model, span, entering.deepstack, cache, prefix)
        resid = run_blocks(model, entering.resid, shared, entering.layer, stop)
        if stop is not None:
            return resid
        resid = shared.with_deepstack(model.cfg.n_layers, resid)
        resid = at_positions(resid, positions)
        return unembed(model, resid) if unembeds else last_norm(model, resid)


def embed(model: HookedVLM, span: PassSpan) -> ResidualState:
    """Return what enters block 0: token embeddings with image features in place of the image tokens."""
    embeds = model.embed(span.tokens)
    seen = run_tower(model, span.inputs) if span.holds_images else None
    if seen is None:
        return ResidualState(model.hook_embed(embeds))
    features = connect(model, seen, span.inputs)
    deepstack = deepstack_features(model, seen, span.inputs)
    n_new = embeds.shape[1] - span.inputs.shape[1]  # tokens behind the prompt hold no image
    merged = scatter_features(embeds, F.pad(span.inputs.image_mask, (0, n_new)), features)
    return ResidualState(model.hook_embed(merged), {i: F.pad(x, (0, 0, 0, n_new)) for i, x in deepstack.items()})


def residual_state(
    model: HookedVLM, span: PassSpan, resid: Float[Tensor, "batch pos d_model"], layer: int
) -> ResidualState:
    """Return a given residual stream as what enters block `layer`; images are encoded where later layers add them."""
    if layer > model.cfg.n_deepstack:
        return ResidualState(resid, layer=layer)
    with running(model, span):
        return ResidualState(resid, deepstack_of(model, span.inputs), layer)


def blocks_share(
    model: HookedVLM, span: PassSpan, deepstack: Deepstack, cache: KVCache | None, prefix: SharedPrefix | None
) -> Context:
    """Return what the blocks of a pass share. Rows on a shared prefix have no padding and are not recorded."""
    inputs, n_new = span.inputs, span.stop - span.start
    key_mask, n_past, rows = None, span.start, None
    if prefix is None:
        key_mask, n_past, rows = span.real, 0, model._edits.recorder
        if cache is not None:
            n_past = cache.length
            key_mask = cache.extend_mask(key_mask)
        if rows is not None:
            rows.begin(span)
    return Context(
        key_mask=key_mask,
        n_past=n_past,
        n_new=n_new,
        rotary=model._rotary.tables(span.position_ids, model.embed.weight.dtype),
        kv_cache=cache,
        windows=model.cfg.window,
        biases=partial(attention_biases, model),
        rows=rows,
        prefix=prefix,
        deepstack=deepstack,
        ungrouped=model.cfg.ungroup_grouped_query_attention,
        image_runs=image_runs(model.cfg, inputs) if prefix is None and n_past == 0 else None,
    )


def run_blocks(
    model: HookedVLM,
    resid: Float[Tensor, "batch pos d_model"],
    shared: Context,
    start_layer: int = 0,
    stop_layer: int | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """Return the residual stream after blocks start_layer .. stop_layer - 1, moved to each block's device."""
    for block in list(model.blocks)[start_layer:stop_layer]:
        device = block.ln1.weight.device
        resid = block(resid if resid.device == device else resid.to(device), shared)
    return resid


def unembed(model: HookedVLM, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
    """Return the logits of a residual stream that left the last block: final norm and unembedding."""
    return model.unembed(last_norm(model, resid))


def last_norm(model: HookedVLM, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
    """Return what the unembedding reads of a residual stream that left the last block."""
    return model.ln_final(resid.to(model.ln_final.weight.device))


def at_positions(
    x: Float[Tensor, "batch pos d"], positions: slice | Int[Tensor, " batch"]
) -> Float[Tensor, "batch chosen d"]:
    """Return the chosen positions: a slice of them, or one per row."""
    if isinstance(positions, slice):
        return x[:, positions]
    return x[torch.arange(len(x), device=x.device), positions.to(x.device)][:, None]


# --- images -----------------------------------------------------------------------------------------------


def run_tower(model: HookedVLM, inputs: MultimodalInputs) -> TowerOutput | None:
    """Encode the images with the vision tower. Returns None if there are no images."""
    if inputs.pixel_values is None:
        return None
    return model.vision(inputs.pixel_values.to(model.vision.patch_embed.weight.device), inputs.crop_shapes)


def connect(model: HookedVLM, seen: TowerOutput, inputs: MultimodalInputs) -> Float[Tensor, "n_image_tokens d_model"]:
    """Return the features that image tokens take: the connector's output, in the order of the tokens."""
    return model.hook_image_features(pack(model, model.connector(seen.features), inputs))


def deepstack_features(model: HookedVLM, seen: TowerOutput, inputs: MultimodalInputs) -> Deepstack:
    """Return, for each layer that receives features of an inner tower layer, what is added at its input."""
    out = {}
    for i, inner in enumerate(seen.inner[: model.cfg.n_deepstack]):
        merger = cast("DeepstackMerger", model.deepstack[i])
        out[i + 1] = scattered(merger.hook_out(pack(model, merger(inner), inputs)), inputs)
    return out


def deepstack_of(model: HookedVLM, inputs: MultimodalInputs) -> Deepstack:
    """Return the deep-stack features of the images; empty without images or in a model that has none."""
    seen = run_tower(model, inputs) if model.cfg.n_deepstack else None
    return {} if seen is None else deepstack_features(model, seen, inputs)


def pack(
    model: HookedVLM, features: Float[Tensor, "crop pos d_model"], inputs: MultimodalInputs
) -> Float[Tensor, "n_image_tokens d_model"]:
    """Return features of images in the order of the image tokens that they fill."""
    return pack_features(model.cfg, features, inputs, getattr(model, "image_newline", None))


def scattered(
    features: Float[Tensor, "n_image_tokens d_model"], inputs: MultimodalInputs
) -> Float[Tensor, "batch pos d_model"]:
    """Return features in the places of their image tokens, zeros elsewhere."""
    return scatter_features(features.new_zeros(*inputs.shape, features.shape[-1]), inputs.image_mask, features)


def scatter_features(
    embeds: Float[Tensor, "batch pos d_model"],
    image_mask: Bool[Tensor, "batch pos"],
    features: Float[Tensor, "n_image_tokens d_model"],
) -> Float[Tensor, "batch pos d_model"]:
    """Return token embeddings with image features in place of the image tokens, row after row.

    Raises: ValueError when the numbers of features and image tokens differ."""
    wanted = int(image_mask.sum())
    if wanted != len(features):
        raise ValueError(
            f"The prompt holds {wanted} image tokens but the images give {len(features)} features. "
            "Prepare the inputs with the checkpoint's own processor, one image for each placeholder."
        )
    return embeds.masked_scatter(image_mask[..., None].to(embeds.device), features.to(embeds))


# --- what callers read --------------------------------------------------------------------------------------


def last_logits(model: HookedVLM, inputs: MultimodalInputs) -> Float[Tensor, "batch d_vocab"]:
    """Return the logits of each row's last real position; no other position is unembedded."""
    return forward(model, PassSpan.whole(inputs), positions=last_positions(inputs))[:, 0]


def last_positions(inputs: MultimodalInputs) -> slice | Int[Tensor, " batch"]:
    """Return the last real position of each row, as a slice where it is the last of the batch in all rows."""
    if bool(inputs.attention_mask[:, -1].all()):
        return LAST
    return inputs.shape[1] - 1 - inputs.attention_mask.flip(1).long().argmax(1)


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"], inputs: MultimodalInputs, per_token: bool
) -> Float[Tensor, ...]:
    """Return the next-token cross-entropy over text targets: neither images nor pads count.

    per_token: [batch pos - 1], 0 where a target does not count; else the mean over the targets, a scalar."""
    targets, counted = next_token_targets(
        inputs.tokens, inputs.attention_mask & ~inputs.image_mask, inputs.attention_mask
    )
    targets, counted = targets.to(logits.device), counted.to(logits.device)
    safe = torch.where(counted, targets, torch.zeros_like(targets))
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), safe, reduction="none") * counted
    return losses if per_token else losses.sum() / counted.sum()


def next_token_targets(
    tokens: Int[Tensor, "batch pos"], counted: Bool[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]
) -> tuple[Int[Tensor, "batch pos_less_one"], Bool[Tensor, "batch pos_less_one"]]:
    """Return each position's next token, and whether it counts in a loss: text, predicted from a real position."""
    return tokens[:, 1:], counted[:, 1:] & real[:, :-1]


def resolve_layer(layer: Any, n_layers: int, what: str) -> int | None:
    """Return a layer bound in 0 .. n_layers; negative ones count from the end.

    Raises: ValueError when it is outside; TypeError when it is not an integer."""
    if layer is None:
        return None
    layer = as_int(layer, what)
    resolved = layer + n_layers if layer < 0 else layer
    if not 0 <= resolved <= n_layers:
        raise ValueError(f"{what}={layer} is outside a model of {n_layers} layers.")
    return resolved
