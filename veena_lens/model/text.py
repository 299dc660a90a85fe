"""Text in and out of tokens, as HookedTransformer offers it, and the checks at the border of a forward pass.

Elsewhere a padded batch without a mask, or image tokens without an image, give wrong numbers in silence.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens import checkpoints
from veena_lens.components.block import Embed, Unembed
from veena_lens.components.norms import Norm
from veena_lens.config import HookedVLMConfig
from veena_lens.images.layout import require_own_images
from veena_lens.inputs import MultimodalInputs, is_any_of, text_positions
from veena_lens.model.encoding import (
    encode_rows,
    encode_text,
    ids_of,
    is_text,
    padded,
    padding_side_of,
    prepends_bos,
    refuse_unknown,
    require_tokenizer,
)

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

    attention_mask: None masks the pads that a row begins or ends with (`checkpoints.padding_mask`).
    Raises: ValueError for image tokens (their images are missing), or what is not a batch of tokens."""
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
    if attention_mask is None:
        attention_mask = _own_mask(cfg, tokenizer, tokens, ids)
    elif attention_mask.ndim == 1 and len(ids) == 1:
        attention_mask = attention_mask[None]
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": attention_mask}
    if position_ids is not None:
        given["position_ids"] = position_ids
    inputs = checkpoints.inputs_from_hf(cfg, tokenizer, **given)
    return inputs if position_ids is not None else replace(inputs, position_ids=text_positions(inputs.attention_mask))


def _own_mask(cfg: HookedVLMConfig, tokenizer: Any, given: Any, ids: Int[Tensor, "batch pos"]) -> Tensor:
    """Return the mask that `to_tokens` left on its tokens, where they still are those; else what the pads say."""
    mask = getattr(given, "attention_mask", None)
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        mask = mask.to(ids.device)
        if bool((ids[~mask] == checkpoints.pad_token_of(tokenizer, cfg)).all()):
            return mask
    return checkpoints.padding_mask(cfg, tokenizer, ids.long())


def as_inputs(
    model: HookedVLM,
    input: Any,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    prepend_bos: bool | None = None,
    padding_side: str | None = None,
) -> MultimodalInputs:
    """Return prepared inputs, bare tokens or raw text as inputs on the model's device: see `HookedVLM.as_inputs`."""
    device = model.embed.weight.device
    if isinstance(input, MultimodalInputs):
        if attention_mask is not None or position_ids is not None:
            raise ValueError("MultimodalInputs carry their own mask and positions; do not pass others.")
        inputs = input.to(device)
    else:
        if is_text(input):
            rows = encode_rows(model.tokenizer, model.cfg, input, prepend_bos)
            input, found = padded(rows, model.pad_token_id, padding_side_of(model.tokenizer, padding_side))
            attention_mask = found if attention_mask is None else attention_mask
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


class TextInterface:
    """View of a model as HookedTransformer shows it: text to tokens and back, and tokens as directions.

    It reads the tokenizer, the embedding and the unembedding, and nothing else."""

    cfg: HookedVLMConfig
    embed: Embed
    unembed: Unembed
    ln_final: Norm
    _tokenizer: Any

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer, None where the model has none."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        checkpoints.give_pad_token(tokenizer, self.cfg)
        asked = partial(prepends_bos, tokenizer) if callable(tokenizer) else None
        self.cfg.flags.tokenizer_prepends_bos = asked

    def set_tokenizer(self, tokenizer: Any, default_padding_side: str | None = None) -> None:
        """Take another tokenizer. default_padding_side: "left" or "right"; None leaves the tokenizer's own.

        One without pad token gets the model's: the configuration's, else the end of text.

        Raises: ValueError for another side."""
        if default_padding_side is not None:
            tokenizer.padding_side = padding_side_of(tokenizer, default_padding_side)
        self.tokenizer = tokenizer

    def to_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
        **unknown: Any,
    ) -> Int[Tensor, "batch pos"]:
        """Return the tokens of raw text [batch pos], without a chat template, shorter rows padded.

        The tokens know which of them are pads: a model that they are given to masks them.
        input: a text or a list of texts.
        prepend_bos: None is `cfg.default_prepend_bos`, by default what the tokenizer does; False leaves every special
            token out; True adds the BOS token where the tokenizer has one and has not written it.
        padding_side: "left" or "right"; None is the tokenizer's own. move_to_device: False leaves them on the CPU.
        truncate: whether texts longer than the context are cut to it, on the tokenizer's `truncation_side`.
        Raises: TypeError for an unknown argument, or images (`prepare` takes them); ValueError without a tokenizer.
        """
        if "images" in unknown:
            raise TypeError("to_tokens reads text alone; model.prepare(text=..., images=...) takes images too.")
        refuse_unknown("to_tokens", unknown, ("prepend_bos", "padding_side", "move_to_device", "truncate"))
        tokenizer = require_tokenizer(self.tokenizer, "to_tokens")
        rows = encode_rows(tokenizer, self.cfg, input, prepend_bos)
        if truncate:
            ends = getattr(tokenizer, "truncation_side", "right") == "right"
            rows = [r[: self.cfg.n_ctx] if ends else r[-self.cfg.n_ctx :] for r in rows]
        tokens, mask = padded(rows, self.pad_token_id, padding_side_of(tokenizer, padding_side))
        tokens = tokens.to(self.embed.weight.device) if move_to_device else tokens
        cast(Any, tokens).attention_mask = mask
        return tokens

    @property
    def pad_token_id(self) -> int:
        """Return the token that pads: the tokenizer's, else the configuration's, else the end of text, else 0."""
        return checkpoints.pad_token_of(self.tokenizer, self.cfg)

    def to_string(self, tokens: Any) -> str | list[str]:
        """Return the text of tokens, special tokens shown: a string for one row [pos], else a list, one per row.

        tokens: prepared inputs, a tensor or array [pos] or [batch pos], or lists of ids, of unequal lengths too."""
        tokenizer = require_tokenizer(self.tokenizer, "to_string")
        ids = ids_of(tokens)
        return tokenizer.decode(ids) if isinstance(ids, Tensor) else [tokenizer.decode(row) for row in ids]

    def to_str_tokens(
        self, input: Any, prepend_bos: bool | None = None, padding_side: str | None = None, **unknown: Any
    ) -> list[Any]:
        """Return each token as text: a list for one row, a list of lists for a list of texts or several rows.

        input: a text or texts (the tokens of each, without pads), or whatever `to_string` takes (pads included, so that
            places are positions). prepend_bos: as `to_tokens` takes it. padding_side: without effect on texts that
            stand alone.
        Raises: TypeError for an unknown argument; ValueError without a tokenizer."""
        refuse_unknown("to_str_tokens", unknown, ("prepend_bos", "padding_side"))
        tokenizer = require_tokenizer(self.tokenizer, "to_str_tokens")
        if is_text(input):
            rows = encode_rows(tokenizer, self.cfg, input, prepend_bos)
            texts = [[tokenizer.decode([token]) for token in row] for row in rows]
            return texts[0] if isinstance(input, str) else texts
        ids = ids_of(input)
        rows = [ids] if isinstance(ids, Tensor) else ids
        texts = [[tokenizer.decode([int(token)]) for token in row] for row in rows]
        return texts[0] if len(texts) == 1 else texts

    def get_token_position(
        self,
        single_token: str | int | Tensor,
        input: Any,
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """Return the first or last position of a token in one row.

        single_token: its id, or its text. input: a text, tokens [pos] or [1 pos], or prepared inputs of one row.
        mode: "first" or "last". prepend_bos, padding_side: as `to_tokens` takes them.
        Raises: ValueError for a token that does not occur, several rows, or another mode."""
        if mode not in ("first", "last"):
            raise ValueError(f"get_token_position: mode={mode!r} must be 'first' or 'last'.")
        if isinstance(input, str):
            ids = self.to_tokens(input, prepend_bos=prepend_bos, padding_side=padding_side)
        else:
            ids = input.tokens if isinstance(input, MultimodalInputs) else torch.as_tensor(input)
        if (ids.ndim == 2 and len(ids) != 1) or ids.ndim not in (1, 2):
            raise ValueError(f"get_token_position takes one row of tokens, not {list(ids.shape)}.")
        token = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        places = (ids.flatten() == token).nonzero().flatten().tolist()
        if not places:
            raise ValueError(f"The token {single_token!r} (id {token}) does not occur in the prompt.")
        return places[0] if mode == "first" else places[-1]

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

        tokens: an id, the text of one token, a tensor of ids, or a list of ids or of texts.
        The last norm's weight is folded in, so that a dot product with a residual divided by
        `ln_final.hook_scale` is the logit exactly."""
        if is_text(tokens):
            ids = [self.to_single_token(one) for one in ([tokens] if isinstance(tokens, str) else tokens)]
            tokens = ids[0] if isinstance(tokens, str) else ids
        ids = torch.as_tensor(tokens, device=self.unembed.matrix.device)
        if ids.ndim and ids.numel() == 1:
            ids = ids.reshape(())
        return self.unembed.matrix[ids] * self.ln_final.w
