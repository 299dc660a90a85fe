"""Text in and out of tokens, as HookedTransformer offers it, and the checks at the border of a forward pass.

Elsewhere a padded batch without a mask, or image tokens without an image, give wrong numbers in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens import checkpoints
from veena_lens.components.block import Embed, Unembed
from veena_lens.components.norms import Norm
from veena_lens.config import HookedVLMConfig
from veena_lens.images.layout import require_own_images
from veena_lens.inputs import MultimodalInputs, is_any_of, text_positions

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM


def bare_inputs(
    cfg: HookedVLMConfig,
    tokenizer: Any,
    tokens: Int[Tensor, ...] | Any,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> MultimodalInputs:
    """Return inputs of text tokens [batch pos] (or one row [pos]); positions count real tokens unless given.

    Raises: ValueError for padding without a mask, or image tokens (their images are missing)."""
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"A model runs on prepared inputs, tokens [batch pos] or text, not on {type(tokens).__name__}."
        ) from error
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise ValueError(f"Tokens must be integers [batch pos], not {ids.dtype} {list(ids.shape)}.")
    given: dict[str, Any] = {"input_ids": ids}
    if attention_mask is not None:
        given["attention_mask"] = attention_mask
    if position_ids is not None:
        given["position_ids"] = position_ids
    inputs = checkpoints.inputs_from_hf(cfg, tokenizer, **given)
    return inputs if position_ids is not None else replace(inputs, position_ids=text_positions(inputs.attention_mask))


def as_inputs(
    model: HookedVLM, input: Any, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> MultimodalInputs:
    """Return prepared inputs, bare tokens or raw text as inputs on the model's device: see `HookedVLM.as_inputs`."""
    device = model.embed.weight.device
    if isinstance(input, MultimodalInputs):
        if attention_mask is not None or position_ids is not None:
            raise ValueError("MultimodalInputs carry their own mask and positions; do not pass others.")
        inputs = input.to(device)
    else:
        if isinstance(input, str) or (isinstance(input, (list, tuple)) and input and isinstance(input[0], str)):
            rows = encode_text(model.tokenizer, input)
            length, pad = max(map(len, rows)), model.pad_token_id
            attention_mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])
            input = torch.tensor([[pad] * (length - len(r)) + r for r in rows])
        inputs = bare_inputs(model.cfg, model.tokenizer, input, attention_mask, position_ids).to(device)
    require_prompt_fits(model.cfg, inputs)
    return inputs if torch.is_inference_mode_enabled() else outside_inference(inputs)


def outside_inference(inputs: MultimodalInputs) -> MultimodalInputs:
    """Return inputs none of whose tensors was made in inference mode, since torch refuses those where gradients are."""
    names = ("tokens", "attention_mask", "position_ids", "pixel_values", "patch_mask")
    made = {name: x for name in names if (x := getattr(inputs, name)) is not None and x.is_inference()}
    with torch.inference_mode(False):
        return replace(inputs, **{name: x.clone() for name, x in made.items()}) if made else inputs


def inputs_of_residual(
    model: HookedVLM, resid: Any, tokens: Any, mask: Tensor | None, positions: Tensor | None
) -> MultimodalInputs:
    """Return the inputs that a residual stream [batch pos d_model] came from, as `start_at_layer` takes them.

    tokens: prepared inputs or tokens; None where it does not matter which they are.
    Raises: ValueError for a residual of another shape, one that does not lie on its tokens, or no tokens in a model
    whose image tokens read each other in both directions."""
    d_model = model.cfg.d_model
    if not isinstance(resid, Tensor) or resid.ndim != 3 or resid.shape[-1] != d_model:
        shape = list(resid.shape) if isinstance(resid, Tensor) else type(resid).__name__
        raise ValueError(f"start_at_layer takes a residual [batch pos {d_model}] as input, not {shape}.")
    if tokens is None and model.cfg.bidirectional_images:
        raise ValueError(
            "start_at_layer: tokens of an image read each other in both directions in this model, so pass the "
            "inputs that the residual came from as tokens=."
        )
    if tokens is None:  # which tokens does not matter past the embedding; that none is a pad does
        tokens = torch.zeros(resid.shape[:2], dtype=torch.long, device=resid.device)
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    inputs = as_inputs(model, tokens, mask, positions)
    if inputs.shape != resid.shape[:2]:
        raise ValueError(f"The residual is {list(resid.shape[:2])} but its tokens are {list(inputs.shape)}.")
    return inputs


def require_prompt_fits(cfg: HookedVLMConfig, inputs: MultimodalInputs) -> None:
    """Raise ValueError for a context longer than the model's, images that are missing, or token ids that the
    vocabulary does not have."""
    longest = int(inputs.lengths.max())
    if longest > cfg.n_ctx:
        raise ValueError(
            f"The longest row has {longest} tokens; the model's context is {cfg.n_ctx}. Shorten the prompt."
        )
    if inputs.pixel_values is None and bool(inputs.image_mask.any()):
        n = int(inputs.image_mask.sum())
        raise ValueError(f"The prompt holds {n} image tokens (ids {_ids(cfg)}) but no image was given.")
    if inputs.pixel_values is not None and cfg.vision is None:
        raise ValueError("Images were given to a model without a vision tower.")
    _require_placeholders(cfg, inputs)
    require_own_images(cfg, inputs)
    text = inputs.tokens[inputs.attention_mask & ~is_any_of(inputs.tokens, cfg.image_token_ids)]
    if len(text) and (int(text.max()) >= cfg.d_vocab or int(text.min()) < 0):
        bad = text[(text >= cfg.d_vocab) | (text < 0)][0]
        raise ValueError(f"Token id {int(bad)} is outside the vocabulary of {cfg.d_vocab}.")


def _ids(cfg: HookedVLMConfig) -> str:
    return ", ".join(map(str, cfg.image_token_ids))


def _require_placeholders(cfg: HookedVLMConfig, inputs: MultimodalInputs) -> None:
    """Raise ValueError for an image token in a prompt that no image fills (in an answer it is text)."""
    if cfg.image_token_id is None or cfg.vision is None:
        return
    found, filled = is_any_of(inputs.tokens, cfg.image_token_ids), inputs.image_mask
    for row, spans in enumerate(inputs.spans):
        found[row, spans.last + 1 :] = False
    found &= inputs.attention_mask
    if bool((found & ~filled).any()):
        raise ValueError(
            f"The prompt holds {int(found.sum())} image tokens (ids {_ids(cfg)}) but the images fill "
            f"{int(filled.sum())} of them. Prepare the inputs with an image for each placeholder."
        )


def require_tokenizer(tokenizer: Any, what: str) -> Any:
    """Return the tokenizer. Raises: ValueError, naming what needs it, where there is none."""
    if tokenizer is None:
        raise ValueError(f"{what} needs a tokenizer, and this model was loaded without one; give token ids instead.")
    return tokenizer


def encode_text(tokenizer: Any, text: str | Sequence[str], special: bool = True) -> list[list[int]]:
    """Return the token ids of each text, with or without special tokens."""
    tokenizer = require_tokenizer(tokenizer, "Text input")
    texts = [text] if isinstance(text, str) else list(text)
    return [list(tokenizer(t, add_special_tokens=special)["input_ids"]) for t in texts]


class TextInterface:
    """View of a model as HookedTransformer shows it: text to tokens and back, and tokens as directions.

    It reads the tokenizer, the embedding and the unembedding, and nothing else."""

    tokenizer: Any
    cfg: HookedVLMConfig
    embed: Embed
    unembed: Unembed
    ln_final: Norm

    def to_tokens(
        self, input: str | Sequence[str], prepend_bos: bool | None = None, move_to_device: bool = True, **_: Any
    ) -> Int[Tensor, "batch pos"]:
        """Return the tokens of raw text (no chat template), shorter rows padded on the left.

        prepend_bos: None follows the tokenizer; False leaves every special token out; True adds the BOS token
        where the tokenizer has not."""
        tokenizer = require_tokenizer(self.tokenizer, "to_tokens")
        rows = encode_text(self.tokenizer, input, special=prepend_bos is not False)
        bos = tokenizer.bos_token_id
        if prepend_bos and bos is not None:
            rows = [r if r[:1] == [bos] else [bos, *r] for r in rows]
        length, pad = max(map(len, rows)), self.pad_token_id
        tokens = torch.tensor([[pad] * (length - len(r)) + r for r in rows], dtype=torch.long)
        return tokens.to(self.embed.weight.device) if move_to_device else tokens

    @property
    def pad_token_id(self) -> int:
        """Return the token that pads: the tokenizer's, else the configuration's, else the end of text, else 0."""
        return checkpoints.pad_token_of(self.tokenizer, self.cfg)

    def to_string(self, tokens: Any) -> str | list[str]:
        """Return the text of tokens: a string for one row [pos], a list for [batch pos]; special tokens shown."""
        tokenizer = require_tokenizer(self.tokenizer, "to_string")
        ids = torch.as_tensor(tokens)
        return tokenizer.batch_decode(ids) if ids.ndim == 2 else tokenizer.decode(ids)

    def to_str_tokens(self, input: Any, prepend_bos: bool | None = None) -> list[Any]:
        """Return each token as text; for more than one row one list per row."""
        tokenizer = require_tokenizer(self.tokenizer, "to_str_tokens")
        if isinstance(input, MultimodalInputs):
            ids = input.tokens
        elif isinstance(input, (str, list)) and (isinstance(input, str) or (input and isinstance(input[0], str))):
            ids = self.to_tokens(input, prepend_bos=prepend_bos, move_to_device=False)
        else:
            ids = torch.as_tensor(input)
        rows = ids if ids.ndim == 2 else ids[None]
        texts = [[tokenizer.decode([int(t)]) for t in row] for row in rows]
        return texts[0] if len(texts) == 1 else texts

    def to_single_token(self, string: str) -> int:
        """Return the id of a text that is one token.

        Raises: ValueError when it is more, listing them."""
        ids = encode_text(self.tokenizer, string, special=False)[0]
        if len(ids) != 1:
            parts = [self.tokenizer.decode([i]) for i in ids]
            raise ValueError(f"{string!r} is {len(ids)} tokens, not one: {parts}.")
        return int(ids[0])

    def to_single_str_token(self, int_token: int) -> str:
        """Return the text of one token."""
        return require_tokenizer(self.tokenizer, "to_single_str_token").decode([int_token])

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "*pos d_model"]:
        """Return directions of the last residual stream that raise these tokens' logits, [d_model] for one token.

        The last norm's weight is folded in, so that a dot product with a residual divided by
        `ln_final.hook_scale` is the logit exactly."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        ids = torch.as_tensor(tokens, device=self.unembed.matrix.device)
        if ids.ndim and ids.numel() == 1:
            ids = ids.reshape(())
        return self.unembed.matrix[ids] * self.ln_final.w
