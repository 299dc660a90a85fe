"""Text and pictures to inputs, through the checkpoint's own processor; nothing model-specific is known above.

Rows are processed one by one and padded here, on the left, so that a row of a batch is the row alone and the
user's tokenizer keeps its settings. What does not match is refused before any computing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from veena_lens.checkpoints.pictures import patch_boxes
from veena_lens.checkpoints.prompts import Prompt, prompts_of
from veena_lens.config import HookedVLMConfig
from veena_lens.inputs import MultimodalInputs, find_spans, text_positions


def prepare(
    processor: Any,
    cfg: HookedVLMConfig,
    text: Any = None,
    images: Any = None,
    *,
    chat: bool = True,
    answer: Any = None,
    messages: Any = None,
) -> MultimodalInputs:
    """Inputs of one prompt or several; see `HookedVLM.prepare`.

    Raises: ValueError, TypeError or FileNotFoundError naming what does not match, before any computing."""
    if processor is None:
        raise ValueError("This checkpoint has no tokenizer or processor; use inputs_from_hf or token ids.")
    tokenizer = getattr(processor, "tokenizer", processor)
    takes_pictures = cfg.vision is not None and hasattr(processor, "image_processor")
    image_token = processor.image_token if takes_pictures else None
    prompts = prompts_of(processor, image_token, text, images, chat, messages)
    rows = [_process(processor, tokenizer, prompt) for prompt in prompts]
    pad = _pad_id(tokenizer, cfg)
    tokens, mask = _left_pad([r["input_ids"][0] for r in rows], pad)
    longest = int(mask.sum(-1).max())
    if longest > cfg.n_ctx:
        raise ValueError(f"The longest prompt has {longest} tokens; the model's context is {cfg.n_ctx}. Shorten it.")
    pixels = [r["pixel_values"] for r in rows if "pixel_values" in r]
    inputs = assemble(cfg, tokens, mask, text_positions(mask), pad, torch.cat(pixels) if pixels else None)
    inputs = replace(
        inputs,
        patch_boxes=_boxes(processor, cfg, prompts),
        tokenize=lambda t: list(tokenizer(t, add_special_tokens=False)["input_ids"]),
    )
    return inputs if answer is None else _with_answer(inputs, answer, cfg)


def _with_answer(inputs: MultimodalInputs, answer: Any, cfg: HookedVLMConfig) -> MultimodalInputs:
    out = inputs.with_answer(answer)
    if int(out.lengths.max()) > cfg.n_ctx:
        raise ValueError(f"Prompt and answer have {int(out.lengths.max())} tokens; the context is {cfg.n_ctx}.")
    return out


def _process(processor: Any, tokenizer: Any, prompt: Prompt) -> Any:
    """The processor's tensors for one row, without padding."""
    # A template that writes the BOS token itself must not get a second one from the tokenizer.
    bos = tokenizer.bos_token
    special = not (bos and prompt.text.startswith(bos))
    if processor is tokenizer:
        return tokenizer([prompt.text], return_tensors="pt", add_special_tokens=special)
    return processor(
        text=[prompt.text], images=list(prompt.images) or None, return_tensors="pt", add_special_tokens=special
    )


def _left_pad(rows: Sequence[Int[Tensor, " _"]], pad: int) -> tuple[Tensor, Tensor]:
    length = max(len(r) for r in rows)
    tokens = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return tokens, mask


def _pad_id(tokenizer: Any, cfg: HookedVLMConfig) -> int:
    for found in (getattr(tokenizer, "pad_token_id", None), cfg.pad_token_id, getattr(tokenizer, "eos_token_id", None)):
        if found is not None:
            return int(found)
    return 0


def _boxes(processor: Any, cfg: HookedVLMConfig, prompts: Sequence[Prompt]) -> tuple[tuple[Tensor, ...], ...] | None:
    """Pixel boxes of every image token of every row."""
    vision = cfg.vision
    if vision is None or not hasattr(processor, "image_processor"):
        return None
    out = []
    for prompt in prompts:
        mine = []
        for image in prompt.images:
            boxes = patch_boxes(image.size, processor.image_processor, vision.patch_size, vision.grid)
            if vision.has_class_token:  # it looks at the whole picture
                boxes = torch.cat([torch.tensor([[0.0, 0.0, *map(float, image.size)]]), boxes])
            mine.append(boxes[len(boxes) - vision.n_features :])
        out.append(tuple(mine))
    return tuple(out)


KNOWN_KEYS = ("input_ids", "attention_mask", "position_ids", "pixel_values")
IGNORED_KEYS = ("token_type_ids", "mm_token_type_ids")  # what the tokens say themselves


def inputs_from_hf(cfg: HookedVLMConfig, tokenizer: Any = None, **outputs: Any) -> MultimodalInputs:
    """A processor's tensors as inputs: padding side and positions are kept, else 0 .. S - 1 as Hugging Face sets.

    Raises: ValueError for unknown keys, padding without a mask, or pictures that do not match the tokens."""
    unknown = sorted(set(outputs) - set(KNOWN_KEYS) - set(IGNORED_KEYS))
    if unknown:
        raise ValueError(
            f"inputs_from_hf: unknown keys {unknown}; {cfg.architecture or 'this model'} reads {', '.join(KNOWN_KEYS)}."
        )
    if outputs.get("input_ids") is None:
        raise ValueError("inputs_from_hf: input_ids is missing.")
    tokens = torch.as_tensor(outputs["input_ids"]).long()
    if tokens.ndim != 2 or not tokens.numel():
        raise ValueError(f"input_ids must be [batch pos] with at least one token, not {list(tokens.shape)}.")
    mask = require_mask(cfg, tokenizer, tokens, outputs.get("attention_mask"))
    positions = outputs.get("position_ids")
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    positions = torch.as_tensor(positions).long().to(tokens.device)
    if positions.shape[-1] != tokens.shape[1]:
        raise ValueError(f"position_ids {list(positions.shape)} do not fit input_ids {list(tokens.shape)}.")
    if positions.ndim == 1:
        positions = positions[None]
    if positions.shape[-2] == 1:
        positions = positions.expand(*positions.shape[:-2], *tokens.shape)
    inputs = assemble(cfg, tokens, mask, positions, _pad_id(tokenizer, cfg), outputs.get("pixel_values"))
    if tokenizer is not None:
        inputs = replace(inputs, tokenize=lambda t: list(tokenizer(t, add_special_tokens=False)["input_ids"]))
    return inputs


def require_mask(cfg: HookedVLMConfig, tokenizer: Any, tokens: Tensor, mask: Any) -> Tensor:
    """The mask as booleans; all True without one, if no row begins or ends with a pad token.

    Raises: ValueError for padding without a mask, a mask of another shape, or a row without a real token."""
    if mask is None:
        pads = {getattr(tokenizer, "pad_token_id", None), cfg.pad_token_id} - {None}
        for pad in pads:
            rows = ((tokens[:, 0] == pad) | (tokens[:, -1] == pad)).nonzero().flatten().tolist()
            if rows:
                raise ValueError(
                    f"Rows {rows} begin or end with the pad token {pad} and no attention_mask was given: without it "
                    "pads would be read as text. Pass attention_mask (ones where the token is real)."
                )
        return torch.ones_like(tokens, dtype=torch.bool)
    mask = torch.as_tensor(mask).to(tokens.device) != 0
    if mask.shape != tokens.shape:
        raise ValueError(f"attention_mask {list(mask.shape)} does not fit input_ids {list(tokens.shape)}.")
    empty = (~mask.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"Rows {empty} have no real token: their attention_mask is zero everywhere.")
    return mask


def assemble(
    cfg: HookedVLMConfig, tokens: Tensor, mask: Tensor, positions: Tensor, pad: int, pixel_values: Any
) -> MultimodalInputs:
    """Inputs with spans and grids, pictures checked against the image tokens.

    Raises: ValueError when their numbers or sizes do not fit."""
    n = len(tokens)
    if cfg.vision is None:
        if pixel_values is not None:
            raise ValueError("pixel_values were given to a model without a vision tower.")
        return MultimodalInputs(
            tokens=tokens,
            attention_mask=mask,
            position_ids=positions,
            pad_token_id=pad,
            spans=find_spans(tokens, mask, None, [[]] * n),
            grids=((),) * n,
        )
    per_image = cfg.vision.n_features
    counts = ((tokens == cfg.image_token_id) & mask).sum(-1).tolist()
    pixels = None if pixel_values is None else torch.as_tensor(pixel_values)
    n_pictures = _require_pixels(cfg, pixels)
    if pixels is None and sum(counts):
        raise ValueError(
            f"The prompt holds {sum(counts)} image tokens (id {cfg.image_token_id}) but no picture was given."
        )
    odd = [row for row, count in enumerate(counts) if count % per_image]
    if odd or sum(counts) != n_pictures * per_image:
        raise ValueError(
            f"Rows hold {counts} image tokens; a picture of this model fills {per_image}, and {n_pictures} pictures "
            "were given. Use the checkpoint's own processor, one picture for each placeholder."
        )
    images = [count // per_image for count in counts]
    rows = torch.tensor([row for row, k in enumerate(images) for _ in range(k)], dtype=torch.long)
    first = per_image - cfg.vision.grid[0] * cfg.vision.grid[1]
    return MultimodalInputs(
        tokens=tokens,
        attention_mask=mask,
        position_ids=positions,
        image_token_id=cfg.image_token_id,
        pad_token_id=pad,
        pixel_values=pixels,
        picture_rows=rows if n_pictures else None,
        image_rows=rows if n_pictures else None,
        spans=find_spans(tokens, mask, cfg.image_token_id, [[per_image] * k for k in images]),
        grids=tuple((cfg.vision.grid,) * k for k in images),
        grid_start=first,
    )


def _require_pixels(cfg: HookedVLMConfig, pixels: Tensor | None) -> int:
    """The number of pictures. Raises: ValueError for a size that the tower does not take."""
    assert cfg.vision is not None
    if pixels is None:
        return 0
    want = (cfg.vision.n_channels, cfg.vision.image_size, cfg.vision.image_size)
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != want or not pixels.is_floating_point():
        raise ValueError(
            f"pixel_values must be floats [pictures {want[0]} {want[1]} {want[2]}], not {pixels.dtype} "
            f"{list(pixels.shape)}; the checkpoint's own processor makes them so."
        )
    return len(pixels)
