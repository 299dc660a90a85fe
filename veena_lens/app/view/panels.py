"""What a view shows apart from attention: images as panels of cells, norms, and the logit lens in words.

A panel is a grid, the tiles of an image, or its whole view. Each of its cells knows its token and its box as shares of
the image's width and height, so that the page draws what the processor cut: unequal sizes, crops, merged patches, a
tile at the edge.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from veena_lens.activation_cache import ActivationCache
from veena_lens.app.view.bundles import encode
from veena_lens.circuits import logit_lens
from veena_lens.inputs import MultimodalInputs

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

RANKS = 4  # tokens that are named at a position
MOST_WORDS = 8


def resid_names(n_layers: int, part: str = "hook_resid_post") -> list[str]:
    """Name the residual's hook in every layer."""
    return [f"blocks.{layer}.{part}" for layer in range(n_layers)]


def norms_of(cache: ActivationCache, row: int, n_layers: int, part: str) -> Float[Tensor, "layer pos"] | None:
    """Return the norm of the residual in every layer; None where the cache lacks a layer."""
    names = resid_names(n_layers, part)
    if any(name not in cache.cache_dict for name in names):
        return None
    values = (cache.cache_dict[name] for name in names)
    return torch.stack([(v[row] if cache.has_batch_dim else v).float().norm(dim=-1).cpu() for v in values])


def lens_of(
    model: HookedVLM, cache: ActivationCache, inputs: MultimodalInputs, row: int, words: Sequence[str | int]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the lens at every position: the likeliest tokens of every layer, and `words`' probabilities as maps.

    Gives the header's entry and its arrays."""
    n, length = model.cfg.n_layers, inputs.shape[1]
    best = logit_lens(model, cache, "all", k=RANKS, values="prob")
    at = torch.tensor(best.meta["positions"][row])
    texts = {int(token): text for token, text in best.meta.get("texts", {}).items()}
    table = sorted({token for layer in best.meta["tokens"][row] for cell in layer for token in cell})
    number = {token: i for i, token in enumerate(table)}
    ranks = min(RANKS, best.shape[-1])
    ids = np.zeros((n, length, ranks), dtype=np.int32)
    probs = np.zeros((n, length, ranks), dtype=np.uint8)
    tokens = best.meta["tokens"][row]
    ids[:, at] = [[[number[token] for token in cell] for cell in layer] for layer in tokens]
    probs[:, at] = (best.values[row, :, : len(at)].cpu() * 255).round().to(torch.uint8).numpy()
    header: dict[str, Any] = {"texts": [texts.get(token, f"#{token}") for token in table], "words": []}
    arrays = {"lens_ids": ids, "lens_probs": probs}
    if words:
        chosen = logit_lens(model, cache, "all", list(words), values="prob")
        maps = torch.zeros(len(words), n, length)
        maps[..., at] = chosen.values[row, :, : len(at)].permute(2, 0, 1).float().cpu()
        coded = encode(maps, inputs.image_mask[row])
        arrays |= {"lens_maps": coded.values.numpy(), "lens_scales": coded.scales.numpy()}
        header["words"] = [_text(model, word) for word in words]
    return header, arrays


def _text(model: HookedVLM, word: str | int) -> str:
    if isinstance(word, str):
        return word
    return f"#{word}" if model.tokenizer is None else model.tokenizer.decode([word])


def words_of(model: HookedVLM, inputs: MultimodalInputs, row: int, logits: Float[Tensor, "pos d_vocab"]) -> list[int]:
    """Choose tokens for maps: the answer's, without those that end it, or the likeliest next ones without an answer."""
    answer = inputs.spans[row].answer
    if answer is None or answer.start == answer.stop:
        return logits[inputs.spans[row].last].topk(min(5, logits.shape[-1])).indices.tolist()
    ids = inputs.tokens[row, answer].tolist()
    return [i for i in dict.fromkeys(ids) if i not in inputs.end_token_ids][:MOST_WORDS]


LARGEST_SIDE = 1024  # pixels of an image that travels with a view
LOSSLESS_PIXELS = 256 * 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """One image, or one view of it: `boxes` (left, top, right, bottom) in [0, 1], `positions` in the sequence.

    `grid`: (rows, columns) of its cells; `source`: the image as a data URL, "" where it is not known."""

    image: int
    name: str
    width: int
    height: int
    grid: tuple[int, int]
    boxes: Float[Tensor, "cell 4"]
    positions: Int[Tensor, " cell"]
    source: str = ""


def panels_of(inputs: MultimodalInputs, row: int, pictures: Sequence[Image.Image] | None = None) -> list[Panel]:
    """Return a panel for each image of a row; a tiled image gives its whole view and its tiles.

    Raises: ValueError for another number of images than the row has."""
    n = inputs.n_images[row]
    if pictures is not None and len(pictures) != n:
        raise ValueError(f"{len(pictures)} images were given; row {row} has {n}.")
    out = []
    for image in range(n):
        picture = None if pictures is None else pictures[image]
        places, boxes, tiles, size = _cells(inputs, row, image, picture)
        source = "" if picture is None else data_url(picture)
        name = "image" if n == 1 else f"image {image + 1}"
        views = [("", tiles >= 0)]
        if bool((tiles > 0).any()):
            views = [(", whole view", tiles == 0), (", in tiles", tiles > 0)]
        there = ~boxes.isnan().any(-1)
        for suffix, chosen in views:
            kept = chosen & there
            out.append(
                Panel(
                    image=image,
                    name=name + suffix,
                    width=size[0],
                    height=size[1],
                    grid=_grid(boxes[kept]),
                    boxes=boxes[kept],
                    positions=places[kept],
                    source=source,
                )
            )
    return out


def _cells(
    inputs: MultimodalInputs, row: int, image: int, picture: Image.Image | None
) -> tuple[Int[Tensor, " n"], Float[Tensor, "n 4"], Int[Tensor, " n"], tuple[int, int]]:
    """Return positions, boxes as shares of the image, and tiles of an image's tokens, and the image's size."""
    span = inputs.spans[row].images[image]
    places = torch.arange(span.start, span.stop)[inputs.image_mask[row, span].cpu()]
    tiles = torch.zeros(len(places), dtype=torch.long)
    if inputs.token_tiles:
        tiles = torch.tensor(inputs.token_tiles[row][image], dtype=torch.long)
    boxes = None if inputs.patch_boxes is None else inputs.patch_boxes[row][image]
    if boxes is not None:
        found = boxes.float().cpu()
        edge = found.nan_to_num(0.0).amax(0)[2:].tolist()
        size = picture.size if picture is not None else (round(edge[0]), round(edge[1]))
        return places, found / torch.tensor([*size, *size], dtype=torch.float), tiles, size
    height, width = inputs.grids[row][image]
    cells = list(inputs.grid_places[row][image]) if inputs.grid_places else list(range(height * width))
    found = torch.full((len(places), 4), torch.nan)
    for cell, place in enumerate(cells):
        y, x = divmod(cell, width)
        found[place] = torch.tensor([x / width, y / height, (x + 1) / width, (y + 1) / height])
    if inputs.token_tiles:  # without boxes only the grid through the tiles has a place
        tiles = torch.where(found.isnan().any(-1), -1, 0)
    size = picture.size if picture is not None else (width * 24, height * 24)
    return places, found, tiles, size


def _grid(boxes: Float[Tensor, "cell 4"]) -> tuple[int, int]:
    """Return the rows and columns that boxes make, counted by their corners."""
    if not len(boxes):
        return 0, 0
    left, top = (torch.unique((boxes[:, i] * 4096).round()).numel() for i in (0, 1))
    return top, left


def data_url(picture: Any) -> str:
    """Encode an image as a data URL: PNG where it is small, else WebP, at most 1024 pixels per side."""
    small = picture.convert("RGB")
    small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    kind = "png" if small.width * small.height <= LOSSLESS_PIXELS else "webp"
    buffer = io.BytesIO()
    small.save(buffer, format=kind.upper(), **({"optimize": True} if kind == "png" else {"quality": 88}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
