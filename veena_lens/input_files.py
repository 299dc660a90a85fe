"""Inputs in a file: where tokens and images lie, without pixels.

A cache that is saved keeps its inputs beside the activations: tensors under names that begin with "inputs.", and the
rest as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from veena_lens.inputs import MultimodalInputs, text_positions
from veena_lens.own_files import require_words
from veena_lens.spans import Spans, StoredImage

PREFIX = "inputs."
PAIR = (None, [int])
SCHEMA = {
    "image_token_id": (None, int),
    "video_token_id?": (None, int),
    "pad_token_id": (None, int),
    "grids": [[[int]]],
    "grid_places": list,
    "token_tiles?": list,
    "spans": [dict],
    "boxes": bool,
}
SPANS = {"images": [[int]], "query": [int], "last": int, "answer": PAIR}
# Names of tensors in files that were written when crops were called pictures.
OLDER_NAMES = {"crop_rows": "picture_rows", "crop_images": "picture_images", "crop_grids": "picture_grids"}


def describe_inputs(inputs: MultimodalInputs) -> dict[str, Any]:
    """Return what a file keeps of inputs beside tensors, as JSON holds it."""

    def pair(s: slice | None) -> list[int] | None:
        return None if s is None else [s.start, s.stop]

    return {
        "image_token_id": inputs.image_token_id,
        "video_token_id": inputs.video_token_id,
        "pad_token_id": inputs.pad_token_id,
        "grid_places": [[list(p) for p in row] for row in inputs.grid_places],
        "token_tiles": [[list(t) for t in row] for row in inputs.token_tiles],
        "grids": [[list(g) for g in row] for row in inputs.grids],
        "spans": [
            {"images": [pair(i) for i in s.images], "query": pair(s.query), "last": s.last, "answer": pair(s.answer)}
            for s in inputs.spans
        ],
        "boxes": inputs.patch_boxes is not None,
    }


def input_tensors(inputs: MultimodalInputs) -> dict[str, Tensor]:
    """Return the tensors that a file keeps of inputs, on the CPU and independent of theirs."""
    names = ("tokens", "attention_mask", "position_ids", "crop_rows", "crop_images", "crop_grids")
    out = {f"{PREFIX}{name}": getattr(inputs, name) for name in names if getattr(inputs, name) is not None}
    for row, boxes in enumerate(inputs.patch_boxes or ()):
        out |= {f"{PREFIX}boxes.{row}.{i}": b for i, b in enumerate(boxes) if b is not None}
    return {k: v.detach().cpu().contiguous().clone() for k, v in out.items()}


def restore_inputs(about: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> MultimodalInputs | None:
    """Return the inputs of a file, without pixels; None where it holds none.

    Args:
        about: what `describe_inputs` gave.
        tensors: the file's tensors by name, those of `input_tensors` among them.

    Raises: ValueError for fields or tensors that are missing, of other types, or do not fit each other.
    """
    if about is None:
        return None
    _require_fit(about, tensors)

    def cut(pair: list[int] | None) -> slice | None:
        return None if pair is None else slice(*pair)

    def tensor(name: str) -> Tensor | None:
        return tensors.get(f"{PREFIX}{name}", tensors.get(f"{PREFIX}{OLDER_NAMES.get(name, name)}"))

    spans = tuple(
        Spans([slice(*i) for i in s["images"]], slice(*s["query"]), s["last"], cut(s["answer"])) for s in about["spans"]
    )
    mask = tensors[f"{PREFIX}attention_mask"]
    boxes = None
    if about["boxes"]:
        boxes = tuple(
            tuple(tensors.get(f"{PREFIX}boxes.{row}.{i}") for i in range(len(s.images))) for row, s in enumerate(spans)
        )
    return MultimodalInputs(
        tokens=tensors[f"{PREFIX}tokens"],
        attention_mask=mask,
        position_ids=tensors.get(f"{PREFIX}position_ids", text_positions(mask)),
        image_token_id=about["image_token_id"],
        video_token_id=about.get("video_token_id"),
        pad_token_id=about["pad_token_id"],
        layouts=_stored_images(about, tensor("crop_rows"), tensor("crop_images"), tensor("crop_grids")),
        spans=spans,
        patch_boxes=boxes,
    )


def _require_fit(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Check fields against the schema, and the rows, positions and crops of tensors with each other."""
    require_words(about, SCHEMA, "its inputs")
    for spans in about["spans"]:
        require_words(spans, SPANS, "the spans of its inputs")
    found = {name: tensors.get(f"{PREFIX}{name}") for name in ("tokens", "attention_mask")}
    if any(t is None or t.ndim != 2 or t.is_floating_point() for t in found.values()):
        raise ValueError("its inputs lack tokens and attention_mask [batch pos] of integers.")
    shapes = {name: list(t.shape) for name, t in found.items() if t is not None}
    rows, length = shapes["tokens"]
    counts = {"grids": len(about["grids"]), "spans": len(about["spans"])}
    if shapes["attention_mask"] != [rows, length] or set(counts.values()) != {rows}:
        raise ValueError(f"its inputs do not fit each other: {shapes}, {counts}.")
    positions = tensors.get(f"{PREFIX}position_ids")
    if positions is not None and (positions.shape[-2:] != (rows, length) or positions.is_floating_point()):
        raise ValueError(f"its position_ids {list(positions.shape)} do not fit {rows} rows of {length} tokens.")
    for spans in about["spans"]:
        ends = [*spans["images"], spans["query"], *([] if spans["answer"] is None else [spans["answer"]])]
        if not all(len(pair) == 2 and 0 <= pair[0] <= pair[1] <= length for pair in ends):
            raise ValueError(f"its spans {ends} do not lie in {length} tokens.")
        if not 0 <= spans["last"] < max(length, 1):
            raise ValueError(f"its last position {spans['last']} does not lie in {length} tokens.")


def _stored_images(
    about: Mapping[str, Any], crop_rows: Tensor | None, crop_images: Tensor | None, crop_grids: Tensor | None
) -> tuple[tuple[StoredImage, ...], ...]:
    """Return a record of every image, row by row."""
    owners: list[tuple[int, int]] = []
    if crop_rows is not None and crop_images is not None:
        owners = list(zip(crop_rows.tolist(), crop_images.tolist(), strict=True))
    patch_grids = {} if crop_grids is None else dict(zip(owners, crop_grids.tolist(), strict=True))
    places, tiles = about["grid_places"], about.get("token_tiles")
    rows = []
    for row, grids in enumerate(about["grids"]):
        images = []
        for image, (height, width) in enumerate(grids):
            sides = patch_grids.get((row, image))
            images.append(
                StoredImage(
                    grid=(height, width),
                    n_crops=owners.count((row, image)) if owners else 1,
                    places=tuple(places[row][image]) if places else None,
                    crops=tuple(tiles[row][image]) if tiles else None,
                    patch_grid=None if sides is None else (sides[0], sides[1]),
                )
            )
        rows.append(tuple(images))
    return tuple(rows)
