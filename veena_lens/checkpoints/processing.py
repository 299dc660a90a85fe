"""Text and images to inputs, through the checkpoint's own processor.

Rows are processed one by one and padded here, on the left, so that a row of a batch equals the row alone and the
user's tokenizer keeps its settings. What does not match is refused before any computing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from veena_lens.checkpoints.padding import pad_token_of, require_mask
from veena_lens.checkpoints.prompts import Prompt, prompts_of, with_named_keywords
from veena_lens.config import HookedVLMConfig
from veena_lens.images.files import to_rgb
from veena_lens.images.layout import arrange_images, layout_of, pixel_boxes
from veena_lens.images.resizing import require_processable, require_sizes
from veena_lens.inputs import MultimodalInputs, find_spans, text_positions


@with_named_keywords
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
    """Return the inputs of one prompt or several.

    Args:
        processor: the checkpoint's own processor, or tokenizer for text models.
        cfg: the model's configuration.
        text: a prompt or a list of prompts.
        images: for one prompt an image (PIL, a path, or what `read_image` takes) or several; for a list one entry per
            prompt, each an image or a list of images.
        chat: whether the prompt is wrapped in the chat template.
        answer: a lead-in or teacher-forced answer; see `MultimodalInputs.with_answer`.
        messages: a conversation, or several, in Hugging Face's format instead of text.

    Raises:
        ValueError, TypeError, FileNotFoundError: naming what does not match, before any computing.
    """
    if processor is None:
        raise ValueError("This checkpoint has no tokenizer or processor; use inputs_from_hf or token ids.")
    tokenizer = getattr(processor, "tokenizer", processor)
    takes_images = cfg.vision is not None and hasattr(processor, "image_processor")
    image_token = processor.image_token if takes_images else None
    if takes_images:
        require_own_processor(processor, cfg)
    prompts = prompts_of(processor, image_token, text, images, chat, messages)
    for row, prompt in enumerate(prompts):
        for image in prompt.images:
            size, several = (image.height, image.width), len(prompt.images) > 1
            require_processable(
                cfg, processor.image_processor, size, is_among_several=several, what=f"Row {row}: an image"
            )
    rows = [_process(processor, tokenizer, prompt, cfg) for prompt in prompts]
    pad = pad_token_of(tokenizer, cfg)
    tokens, mask = _left_pad([r["input_ids"][0] for r in rows], pad)
    longest = int(mask.sum(-1).max())
    if longest > cfg.n_ctx:
        raise ValueError(f"The longest prompt has {longest} tokens; the model's context is {cfg.n_ctx}. Shorten it.")
    pixels = _joined([r["pixel_values"] for r in rows if "pixel_values" in r])
    if pixels is not None and not bool(torch.isfinite(pixels).all()):
        raise ValueError(
            "The processor's pixel_values are not finite (image_std must not hold 0); use the checkpoint's."
        )
    found = {key: _joined([torch.as_tensor(r[key]) for r in rows if key in r]) for key in _layout_keys(cfg)}
    extras = {key: value for key, value in found.items() if value is not None}
    inputs = assemble(cfg, tokens, mask, None, pad, pixels, extras)
    _require_images(inputs, prompts)
    if takes_images:
        sizes = [[(image.height, image.width) for image in prompt.images] for prompt in prompts]
        inputs = replace(inputs, patch_boxes=pixel_boxes(inputs, sizes, processor.image_processor))
    inputs = replace(inputs, tokenize=partial(ids_of_answer, tokenizer))
    return inputs if answer is None else _with_answer(inputs, answer, cfg)


def ids_of_answer(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text that goes on a prompt: without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _with_answer(inputs: MultimodalInputs, answer: Any, cfg: HookedVLMConfig) -> MultimodalInputs:
    out = inputs.with_answer(answer)
    if int(out.lengths.max()) > cfg.n_ctx:
        raise ValueError(f"Prompt and answer have {int(out.lengths.max())} tokens; the context is {cfg.n_ctx}.")
    return out


def _process(processor: Any, tokenizer: Any, prompt: Prompt, cfg: HookedVLMConfig) -> Any:
    """Return the processor's tensors for one row, without padding."""
    # A template that writes the BOS token itself must not get a second one from the tokenizer.
    bos = tokenizer.bos_token
    special = not (bos and prompt.text.startswith(bos))
    if processor is tokenizer:
        return tokenizer([prompt.text], return_tensors="pt", add_special_tokens=special)
    # The processor's own conversion decides what transparent places show; without one, images must come in RGB.
    converts = getattr(getattr(processor, "image_processor", None), "do_convert_rgb", False)
    given = list(prompt.images) if converts else [to_rgb(image) for image in prompt.images]
    images = layout_of(cfg).ask(given) or None
    try:
        return processor(text=[prompt.text], images=images, return_tensors="pt", add_special_tokens=special)
    except Exception as error:  # settings that do not fit end in errors of every type
        sizes = ", ".join(f"{image.width} x {image.height}" for image in prompt.images) or "none"
        raise ValueError(f"The processor refuses a prompt with images of {sizes} pixels: {error}") from error


def _require_images(inputs: MultimodalInputs, prompts: Sequence[Prompt]) -> None:
    """Raise ValueError where the tokens of tiles do not say which of them belong to one image."""
    for row, (prompt, found) in enumerate(zip(prompts, inputs.n_images, strict=True)):
        if inputs.token_tiles and found != len(prompt.images):
            raise ValueError(
                f"Row {row}: its tokens stand for {found} images, {len(prompt.images)} were given. The tokenizer "
                "loses what the processor writes between tiles (the fake image token, names, line breaks); use the "
                "checkpoint's own."
            )


def require_own_processor(processor: Any, cfg: HookedVLMConfig) -> None:
    """Check that a processor is that of the model's checkpoint.

    Raises:
        ValueError: its crops or its image token are not the model's.
    """
    # Where a prompt's placeholder is not the token that images fill, the processor names both.
    own = [processor.tokenizer.convert_tokens_to_ids(processor.image_token)]
    own = list(getattr(processor, "image_token_ids", own))
    if cfg.image_token_id not in own:
        raise ValueError(
            f"The processor's image token {processor.image_token!r} has id {own[0]}, but the model's is "
            f"{cfg.image_token_id}. Use the processor of this checkpoint."
        )
    if getattr(processor.image_processor, "do_pan_and_scan", None):
        raise ValueError(
            "The processor cuts crops out of long images (do_pan_and_scan), whose boxes prepare does not know: set "
            "processor.image_processor.do_pan_and_scan = False, or give the processor's own tensors to inputs_from_hf, "
            "where every crop counts as an image."
        )
    require_sizes(processor.image_processor)
    layout_of(cfg).require_processor(processor)


def _joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """Join the tensors of all rows; images of fewer tiles get empty ones, as the processor gives within a row."""
    if not tensors:
        return None
    if tensors[0].ndim >= 4 and len({t.shape[1:] for t in tensors}) > 1:
        most = max(t.shape[1] for t in tensors)
        tensors = [torch.cat([t, t.new_zeros(len(t), most - t.shape[1], *t.shape[2:])], 1) for t in tensors]
    return torch.cat(list(tensors))


def _left_pad(rows: Sequence[Int[Tensor, " _"]], pad: int) -> tuple[Tensor, Tensor]:
    length = max(len(r) for r in rows)
    tokens = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return tokens, mask


KNOWN_KEYS = ("input_ids", "attention_mask", "position_ids", "pixel_values")
IGNORED_KEYS = ("token_type_ids", "mm_token_type_ids")  # the tokens say the same


def _layout_keys(cfg: HookedVLMConfig) -> tuple[str, ...]:
    """Return the names of the tensors that a model's image layout reads in addition to pixel_values."""
    return () if cfg.vision is None else layout_of(cfg).keys


def inputs_from_hf(cfg: HookedVLMConfig, tokenizer: Any = None, **outputs: Any) -> MultimodalInputs:
    """Return a processor's tensors as inputs.

    Args:
        cfg: the model's configuration.
        tokenizer: names the pad token, and tokenizes answers; None without one.
        outputs: what the processor gave, by name. The padding side is kept, and so are position_ids; without them
            positions are 0 .. S - 1 as Hugging Face sets them, or follow from the images.

    Raises:
        ValueError: unknown keys, padding without a mask, or images that do not match the tokens.
    """
    known = (*KNOWN_KEYS, *_layout_keys(cfg))
    unknown = sorted(set(outputs) - set(known) - set(IGNORED_KEYS))
    if unknown:
        raise ValueError(
            f"inputs_from_hf: unknown keys {unknown}; {cfg.architecture or 'this model'} reads {', '.join(known)}."
        )
    if outputs.get("input_ids") is None:
        raise ValueError("inputs_from_hf: input_ids is missing.")
    outputs = {name: _as_tensor(name, value) for name, value in outputs.items()}
    tokens = outputs["input_ids"].long()
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
        inputs = replace(inputs, tokenize=partial(ids_of_answer, tokenizer))
    return inputs


def _as_tensor(name: str, value: Any) -> Any:
    """Return a processor's output as a tensor; without `return_tensors` it is lists of lists or of arrays.

    Raises:
        ValueError: the lists have unequal lengths, or hold something else than numbers.
    """
    # Rounding follows the type of the times of a video, so they stay what they are.
    if value is None or isinstance(value, Tensor) or name == "second_per_grid_ts":
        return value
    try:
        if isinstance(value, (list, tuple)) and value and all(isinstance(part, Tensor) for part in value):
            return torch.stack(list(value))
        return torch.as_tensor(value if isinstance(value, np.ndarray) else np.asarray(value))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"inputs_from_hf: {name} cannot be made a tensor ({error}). Call the processor with return_tensors='pt', "
            "and padding=True for several rows."
        ) from error


def _fitting(cfg: HookedVLMConfig, position_ids: Any, tokens: Tensor) -> Tensor:
    """Return given positions as [batch pos], or [3 batch pos] for three streams (a fourth, of the text, may lead).

    Raises:
        ValueError: another shape, or streams that the model does not have.
    """
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
    """Check that a processor's types of tokens (1 image, 2 video, else 0) agree with the tokens.

    This package reads the tokens, Hugging Face the types.

    Raises:
        ValueError: they differ, or are missing where Hugging Face would go on without them.
    """
    name = "token_type_ids" if cfg.bidirectional_images else "mm_token_type_ids"
    types = outputs.get(name)
    if types is None and cfg.bidirectional_images and outputs.get("pixel_values") is not None:
        raise ValueError(
            "token_type_ids are missing (1 at image tokens, else 0; the processor gives them): without them Hugging "
            "Face lets an image's tokens read only earlier ones, and the model was trained with both directions."
        )
    are_read = cfg.bidirectional_images or (cfg.vision is not None and layout_of(cfg).reads_token_types)
    if types is None or not are_read:
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


def assemble(
    cfg: HookedVLMConfig,
    tokens: Tensor,
    mask: Tensor,
    positions: Tensor | None,
    pad: int,
    pixel_values: Any,
    extras: Mapping[str, Any] | None = None,
) -> MultimodalInputs:
    """Return inputs with spans and layouts, the images checked against the image tokens.

    Args:
        cfg: the model's configuration.
        tokens: ids, with every image expanded to its tokens.
        mask: True at real tokens.
        positions: position ids; None counts real tokens, or follows the images where they decide.
        pad: the id of the pad token.
        pixel_values: the processor's; None without images.
        extras: the processor's further tensors by name.

    Raises:
        ValueError: numbers or sizes do not fit.
    """
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
            layouts=((),) * n,
            spans=find_spans(tokens, mask, None, [[]] * n),
        )
    arranged = arrange_images(cfg, tokens, mask, pixel_values, extras or {})
    if positions is None and arranged.position_ids is not None:
        counted = arranged.position_ids
    lengths = [[image.n_tokens for image in row] for row in arranged.images]
    return MultimodalInputs(
        tokens=tokens,
        attention_mask=mask,
        position_ids=counted,
        image_token_id=cfg.image_token_id,
        video_token_id=cfg.video_token_id,
        pad_token_id=pad,
        pixel_values=arranged.pixels,
        patch_mask=arranged.patch_mask,
        layouts=arranged.images,
        spans=find_spans(tokens, mask, cfg.image_token_ids, lengths),
    )
