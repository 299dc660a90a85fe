"""Text and images to inputs, through the checkpoint's own processor; nothing model-specific is known above.

Rows are processed one by one and padded here, on the left, so that a row of a batch is the row alone and the
user's tokenizer keeps its settings. What does not match is refused before any computing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from veena_lens.checkpoints.prompts import Prompt, prompts_of
from veena_lens.config import HookedVLMConfig, VisionConfig
from veena_lens.images.anyres import cell_boxes
from veena_lens.images.files import patch_boxes
from veena_lens.images.layout import arrange_images
from veena_lens.images.packing import layouts_of, tile_layouts
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
    if takes_pictures:
        require_own_processor(processor, cfg)
    prompts = prompts_of(processor, image_token, text, images, chat, messages)
    rows = [_process(processor, tokenizer, prompt, cfg.tiles_single_images_only) for prompt in prompts]
    pad = pad_token_of(tokenizer, cfg)
    tokens, mask = _left_pad([r["input_ids"][0] for r in rows], pad)
    longest = int(mask.sum(-1).max())
    if longest > cfg.n_ctx:
        raise ValueError(f"The longest prompt has {longest} tokens; the model's context is {cfg.n_ctx}. Shorten it.")
    pixels = _pad_tiles([r["pixel_values"] for r in rows if "pixel_values" in r])
    extras = {}
    for key in layout_keys(cfg):
        found = [torch.as_tensor(r[key]) for r in rows if key in r]
        if found:
            extras[key] = _pad_tiles(found) if cfg.image_layout == "tiles" else torch.cat(found)
    inputs = assemble(cfg, tokens, mask, None, pad, pixels, extras)
    _require_pictures(inputs, prompts)
    inputs = replace(
        inputs,
        patch_boxes=_boxes(processor, cfg, prompts, inputs),
        tokenize=lambda t: list(tokenizer(t, add_special_tokens=False)["input_ids"]),
    )
    return inputs if answer is None else _with_answer(inputs, answer, cfg)


def _with_answer(inputs: MultimodalInputs, answer: Any, cfg: HookedVLMConfig) -> MultimodalInputs:
    out = inputs.with_answer(answer)
    if int(out.lengths.max()) > cfg.n_ctx:
        raise ValueError(f"Prompt and answer have {int(out.lengths.max())} tokens; the context is {cfg.n_ctx}.")
    return out


def _process(processor: Any, tokenizer: Any, prompt: Prompt, tiles_single_images_only: bool) -> Any:
    """The processor's tensors for one row, without padding."""
    # A template that writes the BOS token itself must not get a second one from the tokenizer.
    bos = tokenizer.bos_token
    special = not (bos and prompt.text.startswith(bos))
    if processor is tokenizer:
        return tokenizer([prompt.text], return_tensors="pt", add_special_tokens=special)
    pictures: Any = list(prompt.images) or None
    if pictures and tiles_single_images_only:  # a flat list would be prompts of one image each
        pictures = [pictures]
    try:
        return processor(text=[prompt.text], images=pictures, return_tensors="pt", add_special_tokens=special)
    except ValueError as error:
        sizes = ", ".join(f"{image.width} x {image.height}" for image in prompt.images) or "none"
        raise ValueError(f"The processor refuses a prompt with images of {sizes} pixels: {error}") from error


def _require_pictures(inputs: MultimodalInputs, prompts: Sequence[Prompt]) -> None:
    """Raises: ValueError where the tokens of tiles do not tell which of them belong to one image."""
    for row, (prompt, found) in enumerate(zip(prompts, inputs.n_images, strict=True)):
        if inputs.token_tiles and found != len(prompt.images):
            raise ValueError(
                f"Row {row}: its tokens stand for {found} images, {len(prompt.images)} were given. The tokenizer "
                "loses what the processor writes between tiles (the fake image token, names, line breaks); use the "
                "checkpoint's own."
            )


def require_own_processor(processor: Any, cfg: HookedVLMConfig) -> None:
    """Raises: ValueError for a processor of another checkpoint: its patches or its image token are not the model's."""
    assert cfg.vision is not None
    # Where a prompt's placeholder is not the token that images fill, the processor tells both.
    own = [processor.tokenizer.convert_tokens_to_ids(processor.image_token)]
    own = list(getattr(processor, "image_token_ids", own))
    if cfg.image_token_id not in own:
        raise ValueError(
            f"The processor's image token {processor.image_token!r} has id {own[0]}, the model's is "
            f"{cfg.image_token_id}: it belongs to another checkpoint."
        )
    if getattr(processor.image_processor, "do_pan_and_scan", None):
        raise ValueError(
            "The processor cuts crops out of long images (do_pan_and_scan), whose boxes prepare does not know: set "
            "processor.image_processor.do_pan_and_scan = False, or give the processor's own tensors to inputs_from_hf, "
            "where every crop counts as an image."
        )
    if cfg.image_layout == "tiles":
        _require_own_tiles(processor, cfg.vision)
    if cfg.image_layout != "dynamic":
        return
    for name in ("patch_size", "merge_size", "temporal_patch_size"):
        found, wanted = getattr(processor.image_processor, name, None), getattr(cfg.vision, name)
        if found != wanted:
            raise ValueError(
                f"The processor ({type(processor.image_processor).__name__}) has {name}={found}, the model's tower "
                f"{wanted}: it belongs to another checkpoint."
            )


def _require_own_tiles(processor: Any, vision: VisionConfig) -> None:
    """Raises: ValueError for a processor whose tiles have another size, or another number of tokens."""
    side = processor.image_processor.max_image_size["longest_edge"]
    for name, found, wanted in (
        ("max_image_size", side, vision.image_size),
        ("image_seq_len", processor.image_seq_len, vision.n_features),
    ):
        if found != wanted:
            raise ValueError(f"The processor has {name}={found}, the model's tower {wanted}: it belongs to another.")


def _pad_tiles(pixels: Sequence[Tensor]) -> Tensor | None:
    """Pixels of all rows; images of fewer tiles get empty ones, as the processor gives within a row."""
    if not pixels:
        return None
    if pixels[0].ndim >= 4 and len({p.shape[1:] for p in pixels}) > 1:
        most = max(p.shape[1] for p in pixels)
        pixels = [torch.cat([p, p.new_zeros(len(p), most - p.shape[1], *p.shape[2:])], 1) for p in pixels]
    return torch.cat(list(pixels))


def _left_pad(rows: Sequence[Int[Tensor, " _"]], pad: int) -> tuple[Tensor, Tensor]:
    length = max(len(r) for r in rows)
    tokens = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return tokens, mask


def pad_token_of(tokenizer: Any, cfg: HookedVLMConfig) -> int:
    """The token that pads: the tokenizer's, else the configuration's, else the end of text, else 0."""
    for found in (getattr(tokenizer, "pad_token_id", None), cfg.pad_token_id, getattr(tokenizer, "eos_token_id", None)):
        if found is not None:
            return int(found)
    return 0


def _boxes(
    processor: Any, cfg: HookedVLMConfig, prompts: Sequence[Prompt], inputs: MultimodalInputs
) -> tuple[tuple[Tensor, ...], ...] | None:
    """Pixel boxes of every image token of every row."""
    vision = cfg.vision
    if vision is None or not hasattr(processor, "image_processor"):
        return None
    out, layouts, tiled = [], iter(layouts_of(cfg, inputs)), iter(tile_layouts(cfg, inputs))
    for prompt, mine_grids in zip(prompts, inputs.grids, strict=True):
        mine = []
        for image, grid in zip(prompt.images, mine_grids, strict=True):
            if cfg.image_layout == "tiles":
                mine.append(next(tiled).boxes((image.height, image.width)))
                continue
            if cfg.image_layout == "anyres":
                mine.append(next(layouts).boxes())
                continue
            if cfg.image_layout == "dynamic":
                mine.append(cell_boxes(image.size, grid))
                continue
            side = vision.patch_size * vision.merge_size
            boxes = patch_boxes(image.size, processor.image_processor, side, vision.token_grid)
            if vision.has_class_token:  # it looks at the whole image
                boxes = torch.cat([torch.tensor([[0.0, 0.0, *map(float, image.size)]]), boxes])
            mine.append(boxes[len(boxes) - vision.n_features :])
        out.append(tuple(mine))
    return tuple(out)


KNOWN_KEYS = ("input_ids", "attention_mask", "position_ids", "pixel_values")
IGNORED_KEYS = ("token_type_ids", "mm_token_type_ids")  # what the tokens say themselves


def layout_keys(cfg: HookedVLMConfig) -> tuple[str, ...]:
    """What an image layout reads besides."""
    if cfg.image_layout == "dynamic":
        times = () if cfg.positions_per_second is None else ("second_per_grid_ts",)
        return "image_grid_thw", "pixel_values_videos", "video_grid_thw", *times
    if cfg.image_layout == "tiles":
        return ("pixel_attention_mask",)
    if cfg.image_layout != "anyres":
        return ()
    videos = () if cfg.video_token_id is None else ("pixel_values_videos",)
    return "image_sizes", *(("batch_num_images",) if cfg.tiles_single_images_only else ()), *videos


def inputs_from_hf(cfg: HookedVLMConfig, tokenizer: Any = None, **outputs: Any) -> MultimodalInputs:
    """A processor's tensors as inputs: padding side and positions are kept, else 0 .. S - 1 as Hugging Face sets.

    Raises: ValueError for unknown keys, padding without a mask, or images that do not match the tokens."""
    known = (*KNOWN_KEYS, *layout_keys(cfg))
    unknown = sorted(set(outputs) - set(known) - set(IGNORED_KEYS))
    if unknown:
        raise ValueError(
            f"inputs_from_hf: unknown keys {unknown}; {cfg.architecture or 'this model'} reads {', '.join(known)}."
        )
    if outputs.get("input_ids") is None:
        raise ValueError("inputs_from_hf: input_ids is missing.")
    tokens = torch.as_tensor(outputs["input_ids"]).long()
    if tokens.ndim != 2 or not tokens.numel():
        raise ValueError(f"input_ids must be [batch pos] with at least one token, not {list(tokens.shape)}.")
    mask = require_mask(cfg, tokenizer, tokens, outputs.get("attention_mask"))
    require_types(cfg, tokens, mask, outputs)
    pad = pad_token_of(tokenizer, cfg)
    positions = outputs.get("position_ids")
    if positions is not None:
        positions = _fitting(cfg, positions, tokens)
    inputs = assemble(cfg, tokens, mask, None, pad, outputs.get("pixel_values"), outputs)
    if positions is not None:
        inputs = replace(inputs, position_ids=positions)
    elif inputs.position_ids.ndim == 2:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        inputs = replace(inputs, position_ids=places.expand(tokens.shape))
    if tokenizer is not None:
        inputs = replace(inputs, tokenize=lambda t: list(tokenizer(t, add_special_tokens=False)["input_ids"]))
    return inputs


def _fitting(cfg: HookedVLMConfig, position_ids: Any, tokens: Tensor) -> Tensor:
    """Given positions as [batch pos], or [3 batch pos] for three streams (a fourth, of text positions, may lead).

    Raises: ValueError for another shape, or streams that the model does not have."""
    positions = torch.as_tensor(position_ids).long().to(tokens.device)
    shape = list(positions.shape)
    if positions.ndim == 1:
        positions = positions[None]
    if positions.ndim > 1 and positions.shape[-2] == 1 and positions.shape[-1] == tokens.shape[1]:
        positions = positions.expand(*positions.shape[:-2], *tokens.shape)
    if positions.ndim == 3 and len(positions) == 4:
        positions = positions[1:]
    fits = positions.ndim == 2 or (positions.ndim == 3 and len(positions) == 3)
    if not fits or positions.shape[-2:] != tokens.shape:
        raise ValueError(f"position_ids {shape} do not fit input_ids {list(tokens.shape)}.")
    if positions.ndim == 3 and cfg.rope.sections is None:
        raise ValueError(f"position_ids {shape} have several streams; this model's rotary positions have one.")
    return positions


def require_types(cfg: HookedVLMConfig, tokens: Tensor, mask: Tensor, outputs: Mapping[str, Any]) -> None:
    """What a processor says of its tokens (1 image, 2 video, else 0) must be what the tokens say: we read these,
    Hugging Face the types. Raises: ValueError where they differ, or lack and Hugging Face would go without."""
    name = "token_type_ids" if cfg.bidirectional_images else "mm_token_type_ids"
    types = outputs.get(name)
    if types is None and cfg.bidirectional_images and outputs.get("pixel_values") is not None:
        raise ValueError(
            "token_type_ids are missing (1 at image tokens, else 0; the processor gives them): without them Hugging "
            "Face lets an image's tokens read earlier ones alone, and the model was trained with both directions."
        )
    if types is None or not (cfg.image_layout == "dynamic" or cfg.bidirectional_images):
        return
    types = torch.as_tensor(types).to(tokens.device)
    if types.shape != tokens.shape:
        raise ValueError(f"{name} {list(types.shape)} do not fit input_ids {list(tokens.shape)}.")
    wanted = torch.zeros_like(tokens)
    for number, token in enumerate((cfg.image_token_id, cfg.video_token_id), start=1):
        if token is not None:
            wanted[tokens == token] = number
    rows = ((types != wanted) & mask).any(-1).nonzero().flatten().tolist()
    if rows:
        raise ValueError(
            f"{name} differ from input_ids in rows {rows}: 1 marks image tokens (id {cfg.image_token_id}), "
            f"2 video tokens (id {cfg.video_token_id}), 0 the rest. Pass what the processor gives for these tokens."
        )


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
    cfg: HookedVLMConfig,
    tokens: Tensor,
    mask: Tensor,
    positions: Tensor | None,
    pad: int,
    pixel_values: Any,
    extras: Mapping[str, Any] | None = None,
) -> MultimodalInputs:
    """Inputs with spans and grids, images checked against the image tokens.

    positions: None counts real tokens; where images have places of their own in three streams, those.
    Raises: ValueError when their numbers or sizes do not fit."""
    n = len(tokens)
    counted = text_positions(mask) if positions is None else positions
    if cfg.vision is None:
        if pixel_values is not None:
            raise ValueError("pixel_values were given to a model without a vision tower.")
        return MultimodalInputs(
            tokens=tokens,
            attention_mask=mask,
            position_ids=counted,
            pad_token_id=pad,
            spans=find_spans(tokens, mask, None, [[]] * n),
            grids=((),) * n,
        )
    images = arrange_images(cfg, tokens, mask, pixel_values, extras or {})
    if positions is None and images.positions is not None:
        counted = images.positions
    return MultimodalInputs(
        tokens=tokens,
        attention_mask=mask,
        position_ids=counted,
        image_token_id=cfg.image_token_id,
        video_token_id=cfg.video_token_id,
        pad_token_id=pad,
        pixel_values=images.pixels,
        crop_rows=images.crop_rows,
        crop_images=images.crop_images,
        crop_grids=images.crop_grids,
        patch_mask=images.patch_mask,
        image_rows=images.image_rows,
        extras=images.extras,
        spans=find_spans(tokens, mask, cfg.image_token_ids, images.lengths),
        grids=images.grids,
        grid_places=images.places,
        token_tiles=images.tiles,
    )
