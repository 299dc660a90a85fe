"""Bundles: all maps of one token as bytes, in one binary that a browser reads without parsing.

The page asks for bundles one by one; a file holds those that fit a budget. A map is one uint8 per cell and a scale.
A map of attention has a few large cells and many small ones, so a byte holds the square root: v = s (u / 255)^2, and
with a sign v = s |w| w with w = (u - 128) / 127. The smallest step is s / 65025; a cell of s / 100 is right to 4 %.
Image and text positions have scales of their own, else one sink among the text would blank the whole image.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from veena_lens.app.view.rows import Rows
from veena_lens.circuits import direct_attribution_map
from veena_lens.inputs import MultimodalInputs
from veena_lens.own_files import require_words
from veena_lens.regular_files import json_object

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

MAGIC = b"VEEN"
ALIGN = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Coded:
    """`values` [..., pos] as bytes and `scales` [..., 2]: that of text positions, that of image positions."""

    values: UInt8[Tensor, "*maps pos"]
    scales: Float[Tensor, "*maps 2"]
    is_signed: bool = False

    def decode(self, is_image: Bool[Tensor, " pos"]) -> Float[Tensor, "*maps pos"]:
        """Return the maps as numbers again, as the page computes them."""
        scale = self.scales[..., is_image.long()]
        if not self.is_signed:
            return scale * (self.values.float() / 255) ** 2
        w = (self.values.float() - 128) / 127
        return scale * w * w.abs()


def encode(values: Float[Tensor, "*maps pos"], is_image: Bool[Tensor, " pos"], is_signed: bool = False) -> Coded:
    """Encode maps over all positions of a row as bytes. NaN counts as 0; unsigned maps must not be negative."""
    values = values.detach().float().cpu().nan_to_num(0.0)
    is_image = is_image.cpu()
    scales = torch.zeros(*values.shape[:-1], 2)
    for part in (0, 1):
        chosen = values[..., is_image == bool(part)]
        if chosen.shape[-1]:
            scales[..., part] = chosen.abs().amax(-1)
    safe = torch.where(scales == 0, 1.0, scales)[..., is_image.long()]
    root = (values.abs() / safe).sqrt()
    if not is_signed:
        return Coded(values=(root * 255).round().to(torch.uint8), scales=scales)
    return Coded(values=(root * 127 * values.sign() + 128).round().to(torch.uint8), scales=scales, is_signed=True)


def pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Pack one binary: magic, length of the header, the header as JSON with an index of the arrays, then these.

    Arrays are little-endian, each at a multiple of 8 bytes from the end of the header."""
    index, parts, at = {}, [], 0
    for name, array in arrays.items():
        data = np.ascontiguousarray(array)
        raw = data.astype(data.dtype.newbyteorder("<"), copy=False).tobytes()
        index[name] = {"at": at, "dtype": data.dtype.name, "shape": list(data.shape)}
        padding = -len(raw) % ALIGN
        parts.append(raw + b"\0" * padding)
        at += len(raw) + padding
    text = json.dumps({**header, "arrays": index}, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGN)
    return b"".join([MAGIC, struct.pack("<I", len(text)), text, *parts])


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what `pack` wrote. Raises: ValueError for other bytes, or a file that was cut short."""
    if data[:4] != MAGIC or len(data) < 8:
        raise ValueError("These bytes are not a packed view of veena_lens.")
    start = 8 + struct.unpack("<I", data[4:8])[0]
    if len(data) < start:
        raise ValueError(f"The view was cut short: its header ends at byte {start}, the data at {len(data)}.")
    header = json_object(data[8:start], "The header of the view", finite=False)
    require_words(header, {"arrays": {str: dict}}, "The header of the view")
    arrays = {}
    for name, about in header.pop("arrays").items():
        require_words(about, {"at": int, "dtype": str, "shape": [int]}, f"Array {name!r} of the view")
        if not about["dtype"].isalnum() or min([about["at"], *about["shape"]]) < 0:
            raise ValueError(f"Array {name!r} of the view is of dtype {about['dtype']!r} and shape {about['shape']}.")
        try:
            dtype = np.dtype(about["dtype"]).newbyteorder("<")
        except TypeError as error:
            raise ValueError(f"Array {name!r} of the view has the unknown dtype {about['dtype']!r}.") from error
        n = math.prod(about["shape"])
        first = start + about["at"]
        if first + n * dtype.itemsize > len(data) or dtype.hasobject:
            raise ValueError(f"The view was cut short: array {name!r} ends past byte {len(data)}.")
        arrays[name] = np.frombuffer(data, dtype, n, first).reshape(about["shape"])
    return header, arrays


KINDS = ("attention", "push")
ROOM = 2**24  # weights in memory at once


@dataclass(frozen=True, kw_only=True)
class Key:
    """Which maps: attention of `query`, or the direct projection on direction `name` that it takes from each key; `run`
    1 is the second image's."""

    query: int
    kind: str = "attention"
    name: str = ""
    run: int = 0

    @classmethod
    def read(cls, asked: Mapping[str, Any]) -> Key:
        """Read a key as a page sends it. Raises: ValueError for anything else."""
        try:
            key = cls(
                query=int(asked["query"]),
                kind=str(asked.get("kind", "attention")),
                name=str(asked.get("name", "")),
                run=int(asked.get("run", 0)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"No maps under {dict(asked)!r}: a key has query, kind, name and run.") from error
        if key.kind not in KINDS or key.run not in (0, 1):
            raise ValueError(f"No maps of kind {key.kind!r}, run {key.run}; kinds: {', '.join(KINDS)}, runs: 0, 1.")
        return key


@dataclass(frozen=True, kw_only=True, eq=False)
class Bundle:
    """The maps of one key: `maps` [layer head pos]; a single head is the mean over all of them."""

    key: Key
    maps: Coded

    @property
    def size(self) -> int:
        """Return the number of bytes."""
        return self.maps.values.numel() + 4 * self.maps.scales.numel()


def pack_bundles(bundles: Iterable[Bundle], header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Pack bundles behind further arrays in one binary; `header["bundles"]` lists them."""
    listed, every = [], dict(arrays)
    for i, bundle in enumerate(bundles):
        every[f"maps{i}"] = bundle.maps.values.numpy()
        every[f"scales{i}"] = bundle.maps.scales.numpy()
        listed.append(
            {
                "query": bundle.key.query,
                "kind": bundle.key.kind,
                "name": bundle.key.name,
                "run": bundle.key.run,
                "signed": bundle.maps.is_signed,
                "maps": f"maps{i}",
                "scales": f"scales{i}",
            }
        )
    return pack({**header, "bundles": listed}, every)


def attention_bundles(
    rows: Rows, queries: Sequence[int], is_image: Bool[Tensor, " pos"], n_whole: int, run: int = 0
) -> list[Bundle]:
    """Collect the attention of each query: every head for the first `n_whole`, the mean over heads for the others."""
    whole, rest = list(queries[:n_whole]), list(queries[n_whole:])
    out = []
    for mine, by_head in ((whole, True), (rest, False)):
        size = max(1, ROOM // (rows.n_heads * len(is_image)))
        for start in range(0, len(mine), size):
            part = sorted(mine[start : start + size])  # rows come in the order of the sequence
            layers: list[list[Coded]] = [[] for _ in range(rows.n_layers)]

            def keep(
                layer: int,
                at: slice,
                weights: Float[Tensor, "head n key_pos"],
                by_head: bool = by_head,
                layers: list[list[Coded]] = layers,
            ) -> None:
                seen = weights.transpose(0, 1)
                layers[layer].append(encode(seen if by_head else seen.mean(1, keepdim=True), is_image))

            rows.stream(part, keep)
            values, scales = (
                torch.stack([torch.cat([getattr(c, what) for c in parts]) for parts in layers], 1)
                for what in ("values", "scales")
            )
            out += [
                Bundle(key=Key(query=q, run=run), maps=Coded(values=values[i], scales=scales[i]))
                for i, q in enumerate(part)
            ]
    return out


def push_bundle(
    model: HookedVLM,
    inputs: MultimodalInputs,
    interventions: Sequence[Any],
    direction: Float[Tensor, ...],
    query: int,
    name: str,
) -> Bundle:
    """Map what the heads write along `direction` at `query` from each cell of each image."""
    maps = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, inputs.shape[1])
    for image in range(inputs.n_images[0]):
        tiles = inputs.token_tiles[0][image] if inputs.token_tiles else ()
        for grid in ("grid", "whole") if any(t > 0 for t in tiles) else ("grid",):
            with model.intervene(list(interventions)):
                scores = direct_attribution_map(model, inputs, direction, [query], image=image, grid=grid)
            maps[..., _places(inputs, image, grid)] = scores.values[0].flatten(-2).float().cpu()
    coded = encode(maps, inputs.image_mask[0], is_signed=True)
    return Bundle(key=Key(query=query, kind="push", name=name), maps=coded)


def _places(inputs: MultimodalInputs, image: int, grid: str) -> list[int]:
    from veena_lens.circuits.image_cells import image_cells

    return image_cells(inputs, image, grid, "push").index[0].flatten().tolist()
