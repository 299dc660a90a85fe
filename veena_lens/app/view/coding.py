"""Maps as bytes: one uint8 a cell, a scale a map, many of them in one binary that a browser reads without parsing.

A map of attention has a few large cells and many small ones, so a byte holds the square root: v = s (u / 255)^2, and
with a sign v = s |w| w with w = (u - 128) / 127. The smallest step is s / 65025; a cell of s / 100 is right to 4 %.
Image and text positions have scales of their own, else one sink among the text would blank the whole picture.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

MAGIC = b"VEEN"
ALIGN = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Coded:
    """`values` [..., pos] as bytes and `scales` [..., 2]: that of text positions, that of image positions."""

    values: UInt8[Tensor, "*maps pos"]
    scales: Float[Tensor, "*maps 2"]
    is_signed: bool = False

    def decode(self, is_image: Bool[Tensor, " pos"]) -> Float[Tensor, "*maps pos"]:
        """The maps as numbers again: what the page computes."""
        scale = self.scales[..., is_image.long()]
        if not self.is_signed:
            return scale * (self.values.float() / 255) ** 2
        w = (self.values.float() - 128) / 127
        return scale * w * w.abs()


def encode(values: Float[Tensor, "*maps pos"], is_image: Bool[Tensor, " pos"], is_signed: bool = False) -> Coded:
    """Maps over all positions of a row as bytes. NaN counts as 0; unsigned maps must not be negative."""
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
    """One binary: magic, length of the header, the header as JSON with an index of the arrays, the arrays themselves.

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
    """What `pack` wrote. Raises: ValueError for other bytes, or a file that was cut short."""
    if data[:4] != MAGIC or len(data) < 8:
        raise ValueError("These bytes are no packed view of veena_lens.")
    start = 8 + struct.unpack("<I", data[4:8])[0]
    if len(data) < start:
        raise ValueError(f"The view was cut short: its header ends at byte {start}, the data at {len(data)}.")
    header = json.loads(data[8:start])
    arrays = {}
    for name, about in header.pop("arrays").items():
        dtype = np.dtype(about["dtype"]).newbyteorder("<")
        n = int(np.prod(about["shape"], dtype=np.int64))
        first = start + about["at"]
        if first + n * dtype.itemsize > len(data):
            raise ValueError(f"The view was cut short: array {name!r} ends past byte {len(data)}.")
        arrays[name] = np.frombuffer(data, dtype, n, first).reshape(about["shape"])
    return header, arrays
