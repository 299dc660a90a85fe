"""What strengthening one head's attention to the image would do to an answer: exactly, or by its gradient for all.

m is how far the image's emotion leads at the answer slot (over the context's where there is one). With A' = beta A on
image keys the derivative at beta = 1 is sum_{q, k in V} A dm/dA ("scale"); with the row renormalised it is
sum_{q, k in V} A (dm/dA - sum_j A_j dm/dA_j) ("renorm"). One pass forward and back gives every head of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.circuits.gradients import frozen_parameters
from veena_lens.emotion.locate.answer_slot import AnswerPosition
from veena_lens.emotion.methods import batches, prepared
from veena_lens.interventions import BoostAttention
from veena_lens.positions import position_mask
from veena_lens.scores import Scores

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

UNITS = {"scale": "log odds per unit of beta", "renorm": "log odds per unit of beta"}
Head = tuple[int, int]


def margins(
    slot: AnswerPosition, examples: Sequence[Any], logits: Float[Tensor, "row d_vocab"]
) -> Float[Tensor, " row"]:
    """Return log p of the image's emotion less that of the context's; without another emotion in the context, R."""
    found = []
    for example, row in zip(examples, logits, strict=True):
        told = example.context_emotion
        others = None if told is None or told == example.emotion else [told]
        found.append(slot.metric(example.emotion, others)(row[None])[0])
    return torch.stack(found)


def head_boost_gradients(
    model: HookedVLM,
    examples: Sequence[Any],
    slot: AnswerPosition,
    mode: str = "scale",
    *,
    queries: str = "query+generated",
    batch_size: int = 8,
) -> Scores:
    """Return d margin / d beta at beta = 1 for every head, axes (example, layer, head).

    Args:
        model: the model.
        examples: images with prompts, and contexts where there are any.
        slot: where the emotion is said.
        mode: "scale", or "renorm" where the row is renormalised.
        queries: the rows in which attention is strengthened.
        batch_size: examples in a batch.

    Raises: ValueError for another mode, no examples, or inside torch.inference_mode."""
    if mode not in UNITS:
        raise ValueError(f"boost_gradients: mode={mode!r} must be one of {', '.join(UNITS)}.")
    if not examples:
        raise ValueError("boost_gradients: there are no examples.")
    if torch.is_inference_mode_enabled():
        raise ValueError("boost_gradients needs gradients: leave torch.inference_mode().")
    found = []
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    for some in batches(examples, batch_size):
        inputs = prepared(model, some, lead_in=slot.lead_in)
        rows = position_mask(inputs, queries)
        heard: dict[str, Tensor] = {}

        def listen(tensor: Tensor, hook: Any, heard: dict[str, Tensor] = heard) -> None:
            heard[hook.name] = tensor if tensor.requires_grad else tensor.requires_grad_()

        with frozen_parameters(model), torch.enable_grad(), model.hooks([(name, listen) for name in names]):
            total = margins(slot, some, model.last_logits(inputs)).sum()
            gradients = torch.autograd.grad(total, [heard[name] for name in names])
        image = inputs.image_mask
        per_layer = []
        for name, gradient in zip(names, gradients, strict=True):
            pattern = heard[name].detach().double()
            product = pattern * gradient.double()
            keys = image[:, None, None, :].to(product.device)
            each = (product * keys).sum(-1)
            if mode == "renorm":
                each = each - (pattern * keys).sum(-1) * product.sum(-1)
            per_layer.append((each * rows[:, None].to(each.device)).sum(-1).cpu())
        found.append(torch.stack(per_layer, 1))
    axes = ("example", "layer", "head")
    return Scores(torch.cat(found), axes, {}, "boost gradient", UNITS[mode], meta={"mode": mode, "queries": queries})


@torch.no_grad()
def head_boost_effects(
    model: HookedVLM,
    examples: Sequence[Any],
    slot: AnswerPosition,
    heads: Sequence[Head],
    factor: float | int = 2.0,
    mode: str = "scale",
    *,
    queries: str = "query+generated",
    batch_size: int = 32,
) -> Scores:
    """Return the exact change of the margin when one head's attention to the image is strengthened by `factor`.

    Axes (example, head), heads labelled "L3H2"; log odds.

    Args:
        model: the model.
        examples: images with prompts, and contexts where there are any.
        slot: where the emotion is said.
        heads: (layer, head) of the heads, which are strengthened one at a time.
        factor: what attention to the image is multiplied by.
        mode: as in `BoostAttention`.
        queries: the rows in which attention is strengthened.
        batch_size: rows in a batch.

    Raises: ValueError for no heads or examples."""
    if not heads:
        raise ValueError("head_boost_effects: the list of heads is empty.")
    if not examples:
        raise ValueError("head_boost_effects: there are no examples.")
    entries: list[list[Any]] = [[]]
    entries += [
        [BoostAttention(layer=a, heads=[h], queries=queries, factor=float(factor), mode=mode)] for a, h in heads
    ]
    found = []
    for example in examples:
        inputs = prepared(model, [example], lead_in=slot.lead_in)
        values = []
        for some in batches(entries, batch_size):
            rows = inputs[[0] * len(some)]
            with model.intervene(per_row=some):
                logits = model.last_logits(rows)
            values.append(margins(slot, [example] * len(some), logits).double().cpu())
        each = torch.cat(values)
        found.append(each[1:] - each[0])
    labels = {"head": [f"L{a}H{h}" for a, h in heads]}
    return Scores(torch.stack(found), ("example", "head"), labels, "boost effect", "log odds", meta={"mode": mode})


def top_heads(scores: Scores, k: int, layers: Sequence[int] | None = None) -> list[Head]:
    """Return the `k` heads of largest mean over the first axis, of Scores whose other axes are layer and head."""
    mean = scores.mean(scores.axes[0])
    values = mean.values.nan_to_num(-torch.inf)
    if layers is not None:
        keep = torch.tensor([at in set(layers) for at in mean.labels["layer"]])
        values = torch.where(keep[:, None], values, -torch.inf)
    n_heads = values.shape[1]
    order = [
        i
        for i in values.flatten().argsort(descending=True, stable=True)[:k].tolist()
        if values.flatten()[i] > -torch.inf
    ]
    return [(int(mean.labels["layer"][i // n_heads]), i % n_heads) for i in order]
