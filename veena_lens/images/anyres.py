"""Images of any resolution, cut into tiles that fill one run of tokens (LLaVA-NeXT, LLaVA-OneVision).

A processor gives the crops of every image, padded to the most of any, with the images' original sizes. LLaVA-OneVision
cuts an image into tiles only if it is alone in its prompt: one among several is padded to a square and is one crop, as
is each frame of a video; the processor says how many images each prompt has. Images and videos may alternate in a row,
so tokens are walked in reading order and take the next image or video of their own kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from veena_lens.config import HookedVLMConfig
from veena_lens.images.base import (
    ArrangedBatch,
    LayoutDefaults,
    Size,
    cell_boxes,
    crop_shape,
    has_crops,
    require_pixels,
)
from veena_lens.images.canvas import AnyresImage, anyres_image, resampled_grid
from veena_lens.inputs import MultimodalInputs


@dataclass(frozen=True, kw_only=True)
class OneCropImage:
    """An image that is one crop in a model that cuts others: one of several images of a prompt, or a video's frame.

    size: (height, width) of the original image in pixels. base: side of the tower's grid. side: that of the grid of
    tokens. has_newline: whether a newline vector ends it. is_padded: padded to a square (else squeezed into one).
    """

    size: Size
    base: int
    side: int
    has_newline: bool
    is_padded: bool

    @property
    def n_crops(self) -> int:
        return 1

    @property
    def n_tokens(self) -> int:
        """Return the number of tokens in the sequence: the grid, and a newline where it has one."""
        return self.side**2 + self.has_newline

    @property
    def grid(self) -> Size:
        """Return (height, width) in tokens."""
        return self.side, self.side

    @property
    def patch_grid(self) -> None:
        return None

    def grid_places(self) -> list[int]:
        return list(range(self.side**2))

    def token_crops(self) -> list[int]:
        """Return 0 for every token of the grid, -1 for the newline."""
        return [0] * self.side**2 + [-1] * self.has_newline

    def crop_starts(self) -> list[int]:
        return [0]

    def patch_cells(self) -> Int[Tensor, "crop patch"]:
        """Return the cell of the grid in which each patch's centre lies."""
        at = (2 * torch.arange(self.base) + 1) * self.side // (2 * self.base)
        return (at[:, None] * self.side + at).flatten()[None]

    def boxes(self, size: Size | None = None, image_processor: Any = None) -> Float[Tensor, "n_tokens 4"]:
        """Return the pixel box of each token: cells in the padding are cut to nothing, a newline has none (NaN).

        Both arguments are known from the layout.
        """
        height, width = self.size
        out = torch.full((self.n_tokens, 4), float("nan"))
        n = self.side**2
        if not self.is_padded:
            out[:n] = cell_boxes((width, height), self.grid)
            return out
        longest = max(height, width)
        boxes = cell_boxes((longest, longest), self.grid)
        boxes -= torch.tensor([(longest - width) // 2, (longest - height) // 2] * 2)
        out[:n] = boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2, dtype=boxes.dtype))
        return out

    def pack(
        self, features: Float[Tensor, "one pos d_model"], newline: Float[Tensor, " d_model"]
    ) -> Float[Tensor, "n_tokens d_model"]:
        """Return the features of the crop as the text reads them."""
        out = features[0]
        if self.side != self.base:
            grid = features.unflatten(1, (self.base, self.base))
            out = resampled_grid(grid, self.grid)[0].flatten(0, 1)
        return torch.cat([out, newline.to(out)[None]]) if self.has_newline else out


CutImage: TypeAlias = AnyresImage | OneCropImage


def image_among_several(size: Size, base: int) -> OneCropImage:
    """Return the record of an image that shares its prompt with others."""
    return OneCropImage(size=size, base=base, side=base, has_newline=True, is_padded=True)


def video_frame(size: Size, base: int, is_last: bool) -> OneCropImage:
    """Return the record of a video's frame: its grid is halved, and a newline ends the last."""
    return OneCropImage(size=size, base=base, side=math.ceil(base / 2), has_newline=is_last, is_padded=False)


def image_in_tiles(cfg: HookedVLMConfig, size: Sequence[int]) -> AnyresImage:
    """Return the record of an image of (height, width) pixels that a model cuts into tiles."""
    assert cfg.vision is not None
    height, width = (int(s) for s in size)
    return anyres_image(
        (height, width), cfg.image_pinpoints, cfg.vision.image_size, cfg.vision.patch_size, cfg.max_tiles
    )


@dataclass(frozen=True, eq=False)
class _Crops:
    """The crops of an image or a frame [crop channel height width], and its record."""

    pixels: Tensor
    image: CutImage


@dataclass(frozen=True, eq=False)
class AnyresLayout(LayoutDefaults):
    """Images are cut into tiles that fill one run of tokens, or are one crop each.

    Raises:
        ValueError: the configuration names no canvases.
    """

    cfg: HookedVLMConfig

    has_newline = True

    def __post_init__(self) -> None:
        if not self.cfg.image_pinpoints:
            raise ValueError("HookedVLMConfig: image_layout='anyres' needs image_pinpoints, its canvases.")

    @property
    def keys(self) -> tuple[str, ...]:
        numbers = ("batch_num_images",) if self.cfg.tiles_single_images_only else ()
        return ("image_sizes", *numbers, *self.image_keys)

    @property
    def image_keys(self) -> tuple[str, ...]:
        return () if self.cfg.video_token_id is None else ("pixel_values_videos",)

    def ask(self, images: list[Any]) -> list[Any]:
        """Nest the images where a flat list would be prompts of one image each."""
        return [images] if images and self.cfg.tiles_single_images_only else images

    def arrange(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"],
        pixel_values: Any,
        extras: Mapping[str, Any],
    ) -> ArrangedBatch:
        """Take images, and frames of videos, in the order in which the text reads them."""
        waiting = {self.cfg.image_token_id: [[image] for image in self._images(pixel_values, extras)]}
        if self.cfg.video_token_id is not None:
            waiting[self.cfg.video_token_id] = self._videos(extras.get("pixel_values_videos"))
        rows = _in_reading_order(self.cfg, tokens, mask, waiting)
        pixels = torch.cat([crops.pixels for row in rows for crops in row])
        require_pixels(self.vision, pixels)
        return ArrangedBatch(pixels=pixels, images=tuple(tuple(crops.image for crops in row) for row in rows))

    def pack(
        self,
        features: Float[Tensor, "crop pos d_model"],
        images: Sequence[CutImage],
        newline: Float[Tensor, " d_model"] | None,
    ) -> Float[Tensor, "n_image_tokens d_model"]:
        assert newline is not None
        crops = features.split([image.n_crops for image in images])
        return torch.cat([image.pack(mine, newline) for mine, image in zip(crops, images, strict=True)])

    def expects(self) -> str:
        return f"[crops {' '.join(map(str, crop_shape(self.vision)))}]"

    def fits(self, inputs: MultimodalInputs) -> bool:
        return has_crops(inputs, (AnyresImage, OneCropImage), crop_shape(self.vision))

    def as_hf(self, inputs: MultimodalInputs, pixels: Float[Tensor, "crop ..."]) -> dict[str, Tensor]:
        """Return the crops of each image, padded to the most of any, and the original sizes."""
        images: list[Any] = [image for row in inputs.layouts for image in row]
        crops = pixels.split([image.n_crops for image in images])
        given = {
            "pixel_values": pad_sequence(list(crops), batch_first=True),
            "image_sizes": torch.tensor([image.size for image in images], device=pixels.device),
        }
        if any(isinstance(image, OneCropImage) for image in images):
            given["batch_num_images"] = torch.tensor([n for n in inputs.n_images if n])
        return given

    def draw(self, counts: Sequence[int], generator: torch.Generator) -> tuple[dict[str, Tensor], list[int]]:
        n = sum(counts)
        sizes = torch.randint(1, 3 * self.vision.image_size, (n, 2), generator=generator)
        several = [self.cfg.tiles_single_images_only and count > 1 for count in counts for _ in range(count)]
        images = [self._image(size, among) for size, among in zip(sizes.tolist(), several, strict=True)]
        most = max(image.n_crops for image in images)
        pixels = torch.randn(n, most, *crop_shape(self.vision), generator=generator)
        given = {"pixel_values": pixels, "image_sizes": sizes}
        if self.cfg.tiles_single_images_only:
            given["batch_num_images"] = torch.tensor(counts)
        return given, [image.n_tokens for image in images]

    def _image(self, size: Sequence[int], is_among_several: bool) -> CutImage:
        """Return the record of an image of (height, width) pixels."""
        if is_among_several:
            return image_among_several((int(size[0]), int(size[1])), self.vision.grid[0])
        return image_in_tiles(self.cfg, size)

    def _images(self, pixel_values: Any, extras: Mapping[str, Any]) -> list[_Crops]:
        """Return the images of a processor, without the crops that pad them.

        Raises:
            ValueError: sizes or numbers of images do not fit the pixels.
        """
        if pixel_values is None:
            return []
        pixels, sizes = torch.as_tensor(pixel_values), extras.get("image_sizes")
        if sizes is None:
            raise ValueError("Any-resolution images need image_sizes, (height, width) of each original image.")
        sizes = torch.as_tensor(sizes).long().reshape(-1, 2)
        if pixels.ndim != 5 or len(pixels) != len(sizes):
            raise ValueError(
                f"pixel_values must be [images tiles channel height width] for {len(sizes)} image_sizes, not "
                f"{list(pixels.shape)}; the checkpoint's own processor makes them so."
            )
        several = _are_among_several(extras.get("batch_num_images"), len(sizes))
        found = []
        for crops, size, among in zip(pixels, sizes.tolist(), several, strict=True):
            image = self._image(size, among)
            if image.n_crops > len(crops):
                raise ValueError(
                    f"An image of {size[1]} x {size[0]} pixels needs {image.n_crops} tiles; pixel_values hold "
                    f"{len(crops)}. Processor and checkpoint do not match (image_grid_pinpoints)"
                    + (", or batch_num_images was left out." if self.cfg.tiles_single_images_only else ".")
                )
            found.append(_Crops(crops[: image.n_crops], image))
        return found

    def _videos(self, pixel_values: Any) -> list[list[_Crops]]:
        """Return the frames of each video; their original size is not known, and the tower's stands for it.

        Raises:
            ValueError: the pixels have another shape.
        """
        if pixel_values is None:
            return []
        pixels = torch.as_tensor(pixel_values)
        if pixels.ndim != 5 or not pixels.shape[1]:
            raise ValueError(
                f"pixel_values_videos must be [videos frames channel height width], not {list(pixels.shape)}; videos "
                "of one batch have the same number of frames."
            )
        size, n = (self.vision.image_size, self.vision.image_size), pixels.shape[1]
        frames = [video_frame(size, self.vision.grid[0], is_last=i == n - 1) for i in range(n)]
        return [[_Crops(video[i : i + 1], frame) for i, frame in enumerate(frames)] for video in pixels]


def _are_among_several(batch_num_images: Any, n_images: int) -> list[bool]:
    """Return whether each image shares its prompt with others; without their numbers all are cut into tiles.

    Raises:
        ValueError: the numbers do not add up to that of the images.
    """
    if batch_num_images is None:
        return [False] * n_images
    counts = torch.as_tensor(batch_num_images).flatten().tolist()
    if sum(counts) != n_images or min(counts, default=0) < 0:
        raise ValueError(
            f"batch_num_images {counts} must add up to the {n_images} images of pixel_values: the number of each "
            "prompt's images."
        )
    return [n != 1 for n in counts for _ in range(n)]


def _in_reading_order(
    cfg: HookedVLMConfig, tokens: Tensor, mask: Tensor, waiting: Mapping[int | None, list[list[_Crops]]]
) -> list[list[_Crops]]:
    """Return the images and frames of each row; `waiting` holds those of each token id, and is used up.

    Raises:
        ValueError: they do not fill the image tokens.
    """
    given = {token: [sum(part.image.n_tokens for part in whole) for whole in mine] for token, mine in waiting.items()}
    rows = []
    for row, keep in zip(tokens, mask, strict=True):
        found, left, kind = [], 0, None
        for token in (t for t in row[keep].tolist() if t in waiting):
            if not left:
                if not waiting[token]:
                    _refuse(cfg, tokens, mask, given)
                whole, kind = waiting[token].pop(0), token
                left = sum(part.image.n_tokens for part in whole)
                found += whole
            if token != kind:
                _refuse(cfg, tokens, mask, given)
            left -= 1
        if left:
            _refuse(cfg, tokens, mask, given)
        rows.append(found)
    if any(waiting.values()):
        _refuse(cfg, tokens, mask, given)
    return rows


def _refuse(cfg: HookedVLMConfig, tokens: Tensor, mask: Tensor, given: Mapping[int | None, Sequence[int]]) -> NoReturn:
    """Raise ValueError naming the image tokens of each row and what the images fill."""
    parts = []
    for token, filled in given.items():
        kind = "video" if token == cfg.video_token_id else "image"
        counts = ((tokens == token) & mask).sum(-1).tolist()
        if filled or any(counts):
            parts.append(f"Rows hold {counts} {kind} tokens; the {len(filled)} {kind}s given fill {filled}")
    raise ValueError(
        f"{'. '.join(parts)}. Use the checkpoint's own processor, one image for each placeholder"
        + (", and pass on its batch_num_images." if cfg.tiles_single_images_only else ".")
    )
