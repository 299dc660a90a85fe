"""Images of any size: each is one crop of as many patches as its size gives (Qwen2-VL, Qwen2.5-VL, Qwen3-VL).

A processor gives the patches of all images in one tensor and those of all videos in another, with a grid
(time, height, width in patches) each. Images and videos may alternate in a row, so tokens are walked in reading
order and each run of one kind takes the next grids of that kind. Every frame (or pair of frames) of a video is a crop
and counts as an image.

Patches come square by square: a square of `merge` x `merge` patches lies together, since one token reads it, and
the squares follow row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NoReturn

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from veena_lens.config import HookedVLMConfig, VisionConfig
from veena_lens.images.base import ArrangedBatch, LayoutDefaults, Size, cell_boxes
from veena_lens.inputs import MultimodalInputs


def to_merge_order(x: Int[Tensor, "height width"], merge: int) -> Int[Tensor, " patch"]:
    """Return the values of a grid in the order of the patches: squares of `merge` x `merge` patches row by row, and
    inside a square row by row."""
    return rearrange(x, "(h a) (w b) -> (h w a b)", a=merge, b=merge)


def raster_order(grid: Size, merge: int) -> Int[Tensor, "height width"]:
    """Return, for every cell of a grid, the place of its patch in that order."""
    n = grid[0] * grid[1]
    at = torch.empty(n, dtype=torch.long)
    at[to_merge_order(torch.arange(n).view(*grid), merge)] = torch.arange(n)
    return at.view(*grid)


@dataclass(frozen=True)
class DynamicImage:
    """An image, or what counts as one of a video: `patch_grid` is (height, width) in patches, `merge` of them per side
    make one token."""

    patch_grid: Size
    merge: int

    @property
    def n_crops(self) -> int:
        return 1

    @property
    def grid(self) -> Size:
        """Return (height, width) in tokens."""
        return self.patch_grid[0] // self.merge, self.patch_grid[1] // self.merge

    @property
    def n_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def grid_places(self) -> range:
        return range(self.n_tokens)

    def token_crops(self) -> None:
        return None

    def crop_starts(self) -> tuple[int, ...]:
        return (0,)

    def patch_cells(self) -> Int[Tensor, "crop patch"]:
        """Return the cell of each patch: those of a square follow one another."""
        return (torch.arange(self.patch_grid[0] * self.patch_grid[1]) // self.merge**2)[None]

    def boxes(self, size: Size, image_processor: Any = None) -> Float[Tensor, "n_tokens 4"]:
        """Return the pixel box of each token: the grid covers the whole image of (height, width)."""
        return cell_boxes((size[1], size[0]), self.grid)


@dataclass(frozen=True, eq=False)
class DynamicLayout(LayoutDefaults):
    """Images have any size; their grids decide how many tokens they fill, and the positions of these."""

    cfg: HookedVLMConfig

    reads_token_types = True

    @property
    def keys(self) -> tuple[str, ...]:
        times = () if self.cfg.positions_per_second is None else ("second_per_grid_ts",)
        return (*self.image_keys, *times)

    @property
    def image_keys(self) -> tuple[str, ...]:
        return "image_grid_thw", "pixel_values_videos", "video_grid_thw"

    def require_processor(self, processor: Any) -> None:
        for name in ("patch_size", "merge_size", "temporal_patch_size"):
            found, wanted = getattr(processor.image_processor, name, None), getattr(self.vision, name)
            if found != wanted:
                raise ValueError(
                    f"The processor ({type(processor.image_processor).__name__}) has {name}={found}, but the model's "
                    f"vision tower expects {wanted}. Use the processor of this checkpoint."
                )

    def arrange(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"],
        pixel_values: Any,
        extras: Mapping[str, Any],
    ) -> ArrangedBatch:
        """Match runs of tokens with grids; positions of all tokens follow from where they lie."""
        images = Source("image", self.cfg.image_token_id, pixel_values, extras.get("image_grid_thw"), False)
        videos = Source(
            "video",
            self.cfg.video_token_id,
            extras.get("pixel_values_videos"),
            extras.get("video_grid_thw"),
            self.cfg.frames_as_images,
            self._steps(extras),
        )
        rows = match_tokens(self.vision, tokens, mask, [images, videos])
        crops = [[crop for placed in row for crop in placed.run.crops] for row in rows]
        return ArrangedBatch(
            pixels=pad_sequence([crop.patches for row in crops for crop in row], batch_first=True),
            images=tuple(tuple(crop.image for crop in row) for row in crops),
            position_ids=multimodal_positions(mask, rows),
        )

    def pack(
        self,
        features: Float[Tensor, "crop pos d_model"],
        images: Sequence[DynamicImage],
        newline: Float[Tensor, " d_model"] | None,
    ) -> Float[Tensor, "n_image_tokens d_model"]:
        """Drop the padding: crops are padded to the longest of the batch."""
        return torch.cat([x[: image.n_tokens] for x, image in zip(features, images, strict=True)])

    def expects(self) -> str:
        merge = self.vision.merge_size
        return f"[crops patches {self.vision.patch_width}], {merge} x {merge} patches per token"

    def fits(self, inputs: MultimodalInputs) -> bool:
        assert inputs.pixel_values is not None
        merge = self.vision.merge_size
        own = all(isinstance(image, DynamicImage) and image.merge == merge for row in inputs.layouts for image in row)
        return own and tuple(inputs.pixel_values.shape[2:]) == (self.vision.patch_width,)

    def as_hf(self, inputs: MultimodalInputs, pixels: Float[Tensor, "crop ..."]) -> dict[str, Tensor]:
        assert inputs.crop_grids is not None
        grids = inputs.crop_grids
        return {
            "pixel_values": torch.cat([x[: h * w] for x, (h, w) in zip(pixels, grids.tolist(), strict=True)]),
            "image_grid_thw": torch.cat([torch.ones_like(grids[:, :1]), grids], 1),
            "mm_token_type_ids": inputs.image_mask.long(),
        }

    def draw(self, counts: Sequence[int], generator: torch.Generator) -> tuple[dict[str, Tensor], list[int]]:
        n, merge = sum(counts), self.vision.merge_size
        sides = torch.randint(1, 5, (n, 2), generator=generator) * merge
        grids = torch.cat([torch.ones(n, 1, dtype=torch.long), sides], 1)
        pixels = torch.randn(int(grids.prod(-1).sum()), self.vision.patch_width, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": grids}, (grids.prod(-1) // merge**2).tolist()

    def _steps(self, extras: Mapping[str, Any]) -> list[Any] | None:
        """Return the positions in time from one crop of each video to its next; None where crops are counted.

        Without `second_per_grid_ts` every crop stands for a second, as Hugging Face takes it.

        Raises:
            ValueError: times are not positive numbers.
        """
        rate = self.cfg.positions_per_second
        if rate is None or extras.get("video_grid_thw") is None:
            return None
        seconds = extras.get("second_per_grid_ts")
        if seconds is None:
            return [rate] * len(extras["video_grid_thw"])
        times = torch.as_tensor(seconds)
        if times.ndim != 1 or not bool((times.isfinite() & (times > 0)).all()):
            raise ValueError(
                f"second_per_grid_ts={times.tolist()} must hold the seconds that one crop of each video stands for "
                "(temporal_patch_size / frames per second), all positive."
            )
        return [rate * s for s in seconds]


# --- runs of tokens and their crops ------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Source:
    """A processor's patches of one kind.

    kind: "image" or "video". frames_apart: each crop of a video has its own run of tokens. steps: positions in time
    from one crop of a video to its next, one number per video; None for 1.
    """

    kind: str
    token_id: int | None
    pixels: Any
    grids: Any
    frames_apart: bool
    steps: Sequence[Any] | None = None


@dataclass(frozen=True, eq=False)
class Crop:
    """One crop: its patches [patch numbers], and its record."""

    patches: Tensor
    image: DynamicImage


@dataclass(frozen=True, eq=False)
class CropRun:
    """Crops that share a run of tokens: an image, or the crops of a video.

    step: positions in time from one crop to the next, a number or one in a tensor (rounding follows its dtype).
    """

    crops: list[Crop]
    step: Any = 1

    @property
    def times(self) -> tuple[int, ...]:
        """Return the place in time of each crop, in whole positions (rounded down)."""
        return tuple((torch.arange(len(self.crops)) * self.step).long().tolist())

    @property
    def grid(self) -> Size:
        """Return (height, width) in tokens, of each crop."""
        return self.crops[0].image.grid

    @property
    def n_tokens(self) -> int:
        return len(self.crops) * self.crops[0].image.n_tokens


@dataclass(frozen=True, eq=False)
class PlacedRun:
    """A run, and the place of its first token among its row's real tokens."""

    start: int
    run: CropRun


def match_tokens(
    vision: VisionConfig, tokens: Tensor, mask: Tensor, sources: Sequence[Source]
) -> list[list[PlacedRun]]:
    """Return the runs that the tokens of each row [batch pos] stand for, in reading order.

    Raises:
        ValueError: patches, grids and tokens do not fit.
    """
    by_id = {source.token_id: list(crop_runs(vision, source)) for source in sources}
    names = {source.token_id: source.kind for source in sources}
    given = {token: len(mine) for token, mine in by_id.items()}
    rows = []
    for row, keep in zip(tokens, mask, strict=True):
        placed, at = [], 0
        for token, same in groupby(row[keep].tolist()):
            length = len(list(same))
            if token in by_id:
                start, end = at, at + length
                while start < end:
                    run = by_id[token].pop(0) if by_id[token] else None
                    if run is None or start + run.n_tokens > end:
                        _refuse_run(names[token], length, run, given[token])
                    placed.append(PlacedRun(start, run))
                    start += run.n_tokens
            at += length
        rows.append(placed)
    for token, left in by_id.items():
        if left:
            raise ValueError(
                f"{len(left)} of {given[token]} {names[token]} grids have no tokens in the prompt: put one placeholder "
                f"for each {names[token]}."
            )
    return rows


def _refuse_run(kind: str, length: int, run: CropRun | None, given: int) -> NoReturn:
    if run is None:
        raise ValueError(
            f"The prompt holds more {kind} tokens than the {given} {kind}s given fill: a run of {length} is left over. "
            f"Give one {kind} for each placeholder, through the checkpoint's own processor."
        )
    t, (h, w) = len(run.crops), run.grid
    raise ValueError(
        f"A run of {length} {kind} tokens meets a grid of {t} x {h} x {w} = {run.n_tokens} tokens. Processor and "
        "checkpoint do not match (merge_size, patch_size), or the prompt was not made by the processor."
    )


def crop_runs(vision: VisionConfig, source: Source) -> Iterator[CropRun]:
    """Yield the images or videos of a source, their patches cut out.

    Raises:
        ValueError: patches came without grids or grids without patches, or patches have another number or width than
            grids and tower say.
    """
    keys = ("pixel_values", "image_grid_thw") if source.kind == "image" else ("pixel_values_videos", "video_grid_thw")
    if source.pixels is None and source.grids is None:
        return
    if source.pixels is None:
        raise ValueError(f"{keys[1]} came without {keys[0]}, the patches of each {source.kind}.")
    if source.grids is None:
        raise ValueError(f"{keys[0]} came without {keys[1]}, the (time, height, width) of each {source.kind}.")
    pixels, grids = torch.as_tensor(source.pixels), torch.as_tensor(source.grids).long()
    if grids.ndim != 2 or grids.shape[1] != 3:
        raise ValueError(
            f"{keys[1]} must be [{source.kind}s 3], the (time, height, width) of each in patches, not "
            f"{list(grids.shape)}."
        )
    merge, width = vision.merge_size, vision.patch_width
    if pixels.ndim != 2 or pixels.shape[1] != width or not pixels.is_floating_point():
        raise ValueError(
            f"{keys[0]} must be floats [patches {width}] ({vision.n_channels} channels, {vision.temporal_patch_size} "
            f"frames, {vision.patch_size} x {vision.patch_size} pixels), not {pixels.dtype} {list(pixels.shape)}. "
            "Processor and checkpoint do not match (patch_size, temporal_patch_size)."
        )
    bad = [g for g in grids.tolist() if min(g) < 1 or g[1] % merge or g[2] % merge]
    if bad:
        raise ValueError(
            f"{keys[1]} holds {bad[0]}: time must be at least 1, height and width multiples of merge_size={merge}."
        )
    wanted = int(grids.prod(-1).sum())
    if wanted != len(pixels):
        raise ValueError(f"{keys[1]} {grids.tolist()} asks for {wanted} patches; {keys[0]} holds {len(pixels)}.")
    if source.steps is not None and len(source.steps) != len(grids):
        raise ValueError(
            f"second_per_grid_ts holds {len(source.steps)} times for {len(grids)} {source.kind}s; give one per "
            f"{source.kind}."
        )
    at = 0
    for i, (t, h, w) in enumerate(grids.tolist()):
        image = DynamicImage((h, w), merge)
        crops = [Crop(pixels[at + j * h * w : at + (j + 1) * h * w], image) for j in range(t)]
        at += t * h * w
        if source.frames_apart:
            yield from (CropRun([crop]) for crop in crops)
        else:
            yield CropRun(crops, 1 if source.steps is None else source.steps[i])


def multimodal_positions(
    mask: Bool[Tensor, "batch pos"], rows: Sequence[Sequence[PlacedRun]]
) -> Int[Tensor, "streams batch pos"]:
    """Return the position of every token in three streams (time, height, width); pads get 0.

    Text advances all streams together. A run of h x w image tokens per crop starts where the text stopped and counts
    its times, rows and columns; the text goes on after max(h, w) further positions, whatever its times are.
    """
    positions = torch.zeros(3, *mask.shape, dtype=torch.long)
    for row, mine in enumerate(rows):
        real = mask[row].nonzero().flatten().cpu()
        parts, token, position = [], 0, 0
        for placed in mine:
            h, w = placed.run.grid
            parts.append((torch.arange(placed.start - token) + position).expand(3, -1))
            position += placed.start - token
            times = torch.tensor(placed.run.times)
            parts.append(torch.cartesian_prod(times, torch.arange(h), torch.arange(w)).T + position)
            position, token = position + max(h, w), placed.start + len(times) * h * w
        parts.append((torch.arange(len(real) - token) + position).expand(3, -1))
        positions[:, row, real] = torch.cat(parts, 1)
    return positions.to(mask.device)
