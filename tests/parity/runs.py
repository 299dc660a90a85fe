"""One batch of a case through both models: Hugging Face's output and what its tower said, our logits and cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.vision_utils import get_vision_window_index

from tests.cases import PAD, Case, build_hf, hf_model, native_model, raw_inputs
from tests.odd_inputs import images_of, numbers
from veena_lens import ActivationCache, HookedVLM
from veena_lens.inputs import MultimodalInputs

KEPT = ("resid_pre", "resid_post", "hook_out", "hook_deepstack", "hook_image_features", "unembed.hook_in")


@dataclass(frozen=True, eq=False)
class Both:
    """tower: of each layer what goes in, and after the last what comes out, image by image in reading order."""

    raw: dict[str, Tensor]
    theirs: Any
    tower: list[list[Tensor]]
    logits: Tensor
    cache: ActivationCache
    inputs: MultimodalInputs

    @property
    def keep(self) -> Tensor:
        return self.raw["attention_mask"]


def run_both(case: Case, hf: Any, model: HookedVLM) -> Both:
    raw = raw_inputs(case)
    blocks = tower_blocks(case, hf)
    said: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]
    handles = [
        block.register_forward_hook(lambda module, args, out, kept=kept: kept.append(out))
        for block, kept in zip(blocks, said[1:], strict=True)
    ]
    handles += [block.register_forward_pre_hook(lambda module, args: said[0].append(args[0])) for block in blocks[:1]]
    with torch.no_grad():
        theirs = hf(**raw, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        inputs = model.inputs_from_hf(**raw)
        logits, cache = model.run_with_cache(inputs, names_filter=lambda name: name.endswith(KEPT))
    return Both(raw, theirs, [in_reading_order(case, raw, parts) for parts in said], logits, cache, inputs)


@cache
def run(case: Case) -> Both:
    """The run of a case of the table, made once."""
    return run_both(case, hf_model(case), native_model(case))


def tower_blocks(case: Case, hf: Any) -> list[Any]:
    """Hugging Face's blocks, where its tower holds images as ours does, or one after another."""
    if case.has("any size"):
        return list(hf.model.visual.blocks)
    return list(hf.model.vision_tower.encoder.layers) if case.family in ("llava", "gemma3") else []


# --- images of any size, in Hugging Face's tower one after another -------------------------------------------
def grids(raw: dict[str, Tensor]) -> list[list[int]]:
    """(time, height, width) of all images, then of all videos."""
    return [g for key in ("image_grid_thw", "video_grid_thw") if key in raw for g in raw[key].tolist()]


def reading_order(case: Case) -> list[int]:
    """Images in reading order, as numbers among all images followed by all frames of videos."""
    words = [word for row in case.rows for word in images_of(row)]
    n_images, images, frames, order = sum(w[0] == "i" for w in words), 0, 0, []
    for word in words:
        if word[0] == "i":
            order.append(images)
            images += 1
        else:
            t = numbers(word)[0]
            order += range(n_images + frames, n_images + frames + t)
            frames += t
    return order


def split(case: Case, raw: dict[str, Tensor], parts: list[Tensor], merge: int = 1) -> list[Tensor]:
    """What Hugging Face holds of all images and all videos, cut into images in reading order."""
    sizes = [h * w // merge**2 for t, h, w in grids(raw) for _ in range(t)]
    pieces = torch.cat(parts).split(sizes) if parts else ()
    return [pieces[i] for i in reading_order(case)]


def in_reading_order(case: Case, raw: dict[str, Tensor], parts: list[Tensor]) -> list[Tensor]:
    """One tensor per image of what a tower's block said."""
    if not case.has("any size"):
        return [image for part in parts for image in part]
    if case.has("windows"):  # squares are held window by window: back to the order of the image
        vision = case.config().vision_config
        sizes = dict(spatial_merge_size=vision.spatial_merge_size, window_size=vision.window_size)
        keys = [key for key in ("image_grid_thw", "video_grid_thw") if key in raw]
        for i, key in enumerate(keys):
            index, _ = get_vision_window_index(raw[key], patch_size=vision.patch_size, **sizes)
            parts[i] = parts[i].unflatten(0, (len(index), -1))[index.argsort()].flatten(0, 1)
    return split(case, raw, parts)


# --- generation --------------------------------------------------------------------------------------------
def cut(row: list[int], eos: int | list[int] | None) -> list[int]:
    ends = [] if eos is None else [eos] if isinstance(eos, int) else eos
    at = [i for i, token in enumerate(row) if token in ends]
    return row[: at[0]] if at else row


def greedy(hf: Any, raw: dict[str, Tensor], **options: Any) -> list[list[int]]:
    """Hugging Face's greedy completions, cut after the first end token."""
    with torch.no_grad():
        out = hf.generate(**raw, do_sample=False, **options)
    return [cut(row, hf.generation_config.eos_token_id) for row in out[:, raw["input_ids"].shape[1] :].tolist()]


def never_ends(hf: Any) -> Any:
    hf.generation_config.eos_token_id = None
    hf.generation_config.pad_token_id = PAD
    return hf


def talking_pair(case: Case, gain: float = 5.0) -> tuple[Any, HookedVLM]:
    """A fresh pair whose generation never ends by itself."""
    hf = never_ends(build_hf(case, gain=gain))
    return hf, HookedVLM.from_hf(hf)


class Say(LogitsProcessor):
    """Forces one token at one length."""

    def __init__(self, token: int, length: int) -> None:
        self.token, self.length = token, length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == self.length:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self.token] = 0.0
        return scores
