"""Prompts as embeddings [batch pos d_model], which enter block 0: what they stand for, and what they do not tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens.inputs import MultimodalInputs
from veena_lens.model.forward import scatter_features
from veena_lens.model.generation_settings import NEUTRAL_PENALTY, READ_THE_PROMPT, resolve_settings
from veena_lens.model.text import inputs_of_residual

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM


def is_embeddings(given: Any) -> bool:
    """Return True for embeddings [batch pos d_model], which stand for a prompt."""
    return isinstance(given, Tensor) and given.is_floating_point() and given.ndim == 3


def embedded_prompt(
    model: HookedVLM, embeds: Float[Tensor, "batch pos d_model"], attention_mask: Tensor | None
) -> MultimodalInputs:
    """Return the inputs that embeddings of text stand for; which tokens these are, nobody says.

    attention_mask: [batch pos], pads on the left; None means that there are none.
    Raises: ValueError for pads on the right, another width, or a model whose images need more than embeddings."""
    if model.cfg.bidirectional_images or model.cfg.n_deepstack:
        raise ValueError(
            "generate: this model reads images in more ways than by their embeddings, which do not say where images "
            "are. Give prepared inputs, tokens or text."
        )
    if attention_mask is not None and not bool(torch.as_tensor(attention_mask)[..., -1].all()):
        raise ValueError("generate: embeddings must be padded on the left, where their mask is zero.")
    return inputs_of_residual(model, embeds, None, attention_mask, None)


def refuse_what_reads_tokens(
    model: HookedVLM, settings: dict[str, Any], return_type: str, return_input_tokens: bool
) -> None:
    """Raise ValueError for what needs the tokens of a prompt that is given as embeddings."""
    config = resolve_settings(model.generation_config, settings)
    reads = [name for name in READ_THE_PROMPT if config[name] not in (None, 0, 0.0, NEUTRAL_PENALTY.get(name))]
    reads += ["return_input_tokens"] * return_input_tokens + ["return_type='tensor'"] * (return_type == "tensor")
    if reads:
        raise ValueError(
            f"generate: {', '.join(reads)} needs the prompt's tokens, which embeddings do not tell. Give tokens, or "
            "set it to its neutral value."
        )


def continued(
    model: HookedVLM,
    embeds: Float[Tensor, "batch pos d_model"],
    prompt: MultimodalInputs,
    new: Int[Tensor, "batch new"],
) -> tuple[Float[Tensor, "batch length d_model"], dict[str, Any]]:
    """Return embeddings of prompt and completion, and the arguments of a forward pass over them."""
    answered = prompt.with_answer(new)
    of_prompt = answered.attention_mask.clone()
    for row, spans in enumerate(answered.spans):
        of_prompt[row, spans.answer] = False
    whole = scatter_features(model.embed(answered.tokens), of_prompt, embeds[prompt.attention_mask])
    return whole, dict(start_at_layer=0, attention_mask=answered.attention_mask)
