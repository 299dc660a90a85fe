"""What a model runs on: tokens, images, and where the images lie among the tokens.

`MultimodalInputs` stands in for a token tensor (shape, ndim, device, row indexing), so that functions written
for `[batch, pos]` tokens run with images unchanged. Plain data: a processor makes it, a model reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """Where things lie in one row, as positions of the padded sequence.

    `images`: a slice an image; `query`: the text after the last image (the whole prompt where there is none),
    without the answer; `last`: the last prompt token; `answer`: the answer's tokens, None without one.
    """

    images: list[slice]
    query: slice
    last: int
    answer: slice | None = None

    def __repr__(self) -> str:
        def show(s: slice) -> str:
            return f"{s.start}:{s.stop}"

        images = ", ".join(map(show, self.images))
        answer = "" if self.answer is None else f", answer={show(self.answer)}"
        return f"Spans(images=[{images}], query={show(self.query)}, last={self.last}{answer})"


def text_positions(mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Position of each token counted over real tokens only; pads get 0 (as Hugging Face's `generate` does)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def to_merge_order(x: Int[Tensor, "height width"], merge: int) -> Int[Tensor, " patch"]:
    """Values of a grid in the order in which images of any size have their patches: squares of `merge` x `merge`
    patches row by row, and inside a square row by row."""
    return rearrange(x, "(h a) (w b) -> (h w a b)", a=merge, b=merge)


def raster_order(grid: tuple[int, int], merge: int) -> Int[Tensor, "height width"]:
    """For every cell of a grid the place of its patch in that order."""
    n = grid[0] * grid[1]
    at = torch.empty(n, dtype=torch.long)
    at[to_merge_order(torch.arange(n).view(*grid), merge)] = torch.arange(n)
    return at.view(*grid)


def is_any_of(tokens: Int[Tensor, "*axes"], ids: Sequence[int]) -> Bool[Tensor, "*axes"]:
    """True where a token is one of `ids`."""
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for token in ids:
        found |= tokens == token
    return found


def find_spans(
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    image_tokens: int | Sequence[int] | None,
    image_lengths: Sequence[Sequence[int]],
    answer_lengths: Sequence[int] | None = None,
) -> tuple[Spans, ...]:
    """Spans of every row, given how many tokens each of its images fills (images may touch)."""
    ids = () if image_tokens is None else (image_tokens,) if isinstance(image_tokens, int) else tuple(image_tokens)
    found = []
    for row in range(len(tokens)):
        real = mask[row].nonzero().flatten().tolist()
        end = real[-1] + 1
        n_answer = answer_lengths[row] if answer_lengths is not None else 0
        prompt_end = end - n_answer
        places = (is_any_of(tokens[row], ids) & mask[row]).nonzero().flatten().tolist()
        images, at = [], 0
        for length in image_lengths[row] if row < len(image_lengths) else ():
            # A tiled image may be interrupted by its own row separators, so the slice runs from first to last.
            images.append(slice(places[at], places[at + length - 1] + 1))
            at += length
        start = images[-1].stop if images else real[0]
        answer = slice(prompt_end, end) if answer_lengths is not None else None
        found.append(Spans(images, slice(start, prompt_end), prompt_end - 1, answer))
    return tuple(found)


@dataclass(frozen=True, kw_only=True, eq=False)
class MultimodalInputs:
    """A batch of prompts with images, ready for a model.

    tokens: [batch pos] ids with every image expanded to its tokens. attention_mask: [batch pos], False on pads.
    position_ids: [batch pos], or [3 batch pos] for multimodal rotary. pixel_values: what the tower reads,
    [crop ...] (any size: [crop patch numbers], padded); crop_rows: the row that owns each crop; crop_images: which of
    the row's images it belongs to; crop_grids: (height, width) in patches of each, where images have any size;
    patch_mask: [crop patch], False at patches of the square that a smaller image does not have, None where all are
    whole; image_rows: the row of each image. A crop is what the tower reads at once: an image, a tile of one (the whole
    view first), or a frame or a pair of frames of a video, which counts as an image of its own.
    extras: further tensors of a processor with one entry an image. grids: a row's (height, width) in tokens,
    one an image; grid_places: which of an image's tokens are the cells of that grid, row by row (the others are a
    class token, a whole view, newlines). token_tiles: the tile of each of an image's tokens (0 the whole view, -1 a
    newline), where images have tiles. patch_boxes: a row's boxes, one [n_tokens 4] tensor an image: (left,
    top, right, bottom) in pixels of the original image, or None where the original is not known.
    end_token_ids: tokens that end an answer.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"]
    position_ids: Int[Tensor, "*streams batch pos"]
    image_token_id: int | None = None
    video_token_id: int | None = None
    pad_token_id: int = 0
    pixel_values: Float[Tensor, "crop ..."] | None = None
    crop_rows: Int[Tensor, " crop"] | None = None
    crop_images: Int[Tensor, " _"] | None = None
    crop_grids: Int[Tensor, "crop 2"] | None = None
    patch_mask: Bool[Tensor, "crop patch"] | None = None
    image_rows: Int[Tensor, " image"] | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    spans: tuple[Spans, ...] = ()
    grids: tuple[tuple[tuple[int, int], ...], ...] = ()
    grid_places: tuple[tuple[tuple[int, ...], ...], ...] = ()
    token_tiles: tuple[tuple[tuple[int, ...], ...], ...] = ()
    patch_boxes: tuple[tuple[Any, ...], ...] | None = None
    end_token_ids: tuple[int, ...] = ()
    tokenize: Callable[[str], list[int]] | None = field(default=None, repr=False)

    # --- standing in for a token tensor ---------------------------------------------------------------
    @property
    def shape(self) -> torch.Size:
        """(batch, pos)."""
        return self.tokens.shape

    @property
    def ndim(self) -> int:
        return 2

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tokens.dtype

    def size(self, dim: int | None = None) -> Any:
        """Size of one axis, or of both."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 2

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> MultimodalInputs:
        """The chosen rows with their images: an int (a batch of one), slice, list, or index or bool tensor."""
        if isinstance(rows, tuple):
            raise IndexError("MultimodalInputs is indexed by rows only; use .tokens to pick positions.")
        if isinstance(rows, int):
            rows = range(len(self))[rows]
            rows = slice(rows, rows + 1)
        index = torch.arange(len(self))[rows.cpu() if isinstance(rows, Tensor) else rows]
        chosen = index.flatten().tolist()
        on = self.tokens.device
        index = torch.tensor(chosen, dtype=torch.long, device=on)
        pictures, new_picture_rows = _belonging(self.crop_rows, chosen)
        images, new_image_rows = _belonging(self.image_rows, chosen)
        pixels, crop_grids = _take(self.pixel_values, pictures), _take(self.crop_grids, pictures)
        if pixels is not None and crop_grids is not None:  # padded to the longest image that is left
            pixels = pixels[:, : int(crop_grids.prod(-1).max())]
        return replace(
            self,
            tokens=self.tokens[index],
            attention_mask=self.attention_mask[index],
            position_ids=self.position_ids[..., index, :],
            pixel_values=pixels,
            crop_rows=new_picture_rows,
            crop_images=_take(self.crop_images, pictures),
            crop_grids=crop_grids,
            patch_mask=_take(self.patch_mask, pictures),
            image_rows=new_image_rows,
            extras={k: v[images.to(v.device)] if images is not None else v for k, v in self.extras.items()},
            spans=tuple(self.spans[i] for i in chosen),
            grids=tuple(self.grids[i] for i in chosen),
            grid_places=tuple(self.grid_places[i] for i in chosen) if self.grid_places else (),
            token_tiles=tuple(self.token_tiles[i] for i in chosen) if self.token_tiles else (),
            patch_boxes=None if self.patch_boxes is None else tuple(self.patch_boxes[i] for i in chosen),
        )

    def to(self, device: torch.device | str) -> MultimodalInputs:
        """The same inputs with every tensor on `device`."""

        def move(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        return replace(
            self,
            **{
                name: move(getattr(self, name))
                for name in (
                    "tokens",
                    "attention_mask",
                    "position_ids",
                    "pixel_values",
                    "crop_rows",
                    "crop_images",
                    "crop_grids",
                    "patch_mask",
                    "image_rows",
                )
            },
            extras={k: move(v) for k, v in self.extras.items()},
        )

    # --- what the rows hold --------------------------------------------------------------------------
    @property
    def picture_shapes(self) -> Tensor | None:
        """What a tower must know of its images beside their pixels: grids of those of any size, or the patches that
        smaller ones have; None where all are alike."""
        return self.patch_mask if self.crop_grids is None else self.crop_grids

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        """Tokens whose places images fill."""
        return tuple(i for i in (self.image_token_id, self.video_token_id) if i is not None)

    @property
    def image_mask(self) -> Bool[Tensor, "batch pos"]:
        """True at the tokens that images fill (an image token that a model says is text like any other)."""
        mask = torch.zeros_like(self.attention_mask)
        for row, spans in enumerate(self.spans):
            for span in spans.images:
                mask[row, span] = is_any_of(self.tokens[row, span], self.image_token_ids)
        return mask & self.attention_mask

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Real tokens a row."""
        return self.attention_mask.sum(-1)

    @property
    def n_images(self) -> list[int]:
        """Images a row."""
        return [len(s.images) for s in self.spans]

    def picture_lengths(self, in_tokens: bool = False) -> list[int] | None:
        """Patches of each image, or tokens that it fills; None where images are not padded."""
        if self.crop_grids is None:
            return None
        if in_tokens:
            return [height * width for row in self.grids for height, width in row]
        return self.crop_grids.prod(-1).tolist()

    def with_answer(self, answer: str | Sequence[str] | Sequence[Sequence[int]] | Tensor) -> MultimodalInputs:
        """The same rows with an answer appended; `spans` gain `.answer`. One text serves every row.

        Token ids (a list a row, or a `[batch new]` tensor as `generate(return_type="tokens")` gives) are
        appended up to their end token, pads at their end dropped; texts go through the tokenizer without
        special tokens.
        Raises: ValueError for a text without a tokenizer, or a number of answers other than that of rows.
        """
        rows = self._answer_ids(answer)
        prompts = []
        for row, spans in enumerate(self.spans):
            keep = self.attention_mask[row].clone()
            keep[spans.last + 1 :] = False  # an earlier answer is replaced
            prompts.append(keep.nonzero().flatten())
        length = max(len(p) + len(a) for p, a in zip(prompts, rows, strict=True))
        on, n = self.tokens.device, len(self)
        tokens = torch.full((n, length), self.pad_token_id, dtype=self.tokens.dtype, device=on)
        mask = torch.zeros(n, length, dtype=torch.bool, device=on)
        positions = torch.zeros(*self.position_ids.shape[:-1], length, dtype=torch.long, device=on)
        for i, (prompt, ids) in enumerate(zip(prompts, rows, strict=True)):
            start, middle = length - len(prompt) - len(ids), length - len(ids)
            tokens[i, start:middle] = self.tokens[i, prompt]
            tokens[i, middle:] = torch.tensor(ids, dtype=self.tokens.dtype, device=on)
            mask[i, start:] = True
            old = self.position_ids[..., i, :][..., prompt]
            positions[..., i, start:middle] = old
            positions[..., i, middle:] = old[..., -1:] + 1 + torch.arange(len(ids), device=on)
        lengths = [[self.count_image_tokens(i, s) for s in spans.images] for i, spans in enumerate(self.spans)]
        spans = find_spans(tokens, mask, self.image_token_ids, lengths, [len(a) for a in rows])
        return replace(self, tokens=tokens, attention_mask=mask, position_ids=positions, spans=spans)

    def with_new_tokens(self, new: Int[Tensor, "batch new"]) -> MultimodalInputs:
        """Every row lengthened by generated tokens as they are, pads of finished rows included.

        They join an answer that the inputs already have. Rows must end at the last position."""
        n_new = new.shape[1]
        # After the last token, not after the largest position: the frames of a long video may reach further.
        steps = self.position_ids[..., -1:] + 1 + torch.arange(n_new, device=new.device)
        end = self.shape[1] + n_new
        spans = tuple(replace(s, answer=slice(s.answer.start if s.answer else s.last + 1, end)) for s in self.spans)
        return replace(
            self,
            tokens=torch.cat([self.tokens, new], 1),
            attention_mask=torch.cat([self.attention_mask, torch.ones_like(new, dtype=torch.bool)], 1),
            position_ids=torch.cat([self.position_ids, steps], -1),
            spans=spans,
        )

    def left_padded(self) -> MultimodalInputs:
        """The same rows with their pads moved to the left; the inputs themselves where they are there already."""
        if bool(self.attention_mask[:, -1].all()):
            return self
        order = torch.argsort(self.attention_mask.long(), dim=-1, stable=True)
        mask = self.attention_mask.gather(1, order)
        shift = [int(order[i, -1]) for i in range(len(self))]
        moved = []
        for spans, last in zip(self.spans, shift, strict=True):
            by = self.shape[1] - 1 - last

            def move(s: slice, by: int = by) -> slice:
                return slice(s.start + by, s.stop + by)

            answer = None if spans.answer is None else move(spans.answer)
            moved.append(Spans([move(i) for i in spans.images], move(spans.query), spans.last + by, answer))
        positions = self.position_ids.gather(-1, order.expand(self.position_ids.shape))
        return replace(
            self,
            tokens=self.tokens.gather(1, order),
            attention_mask=mask,
            position_ids=positions,
            spans=tuple(moved),
        )

    def without_padding(self) -> MultimodalInputs:
        """A single row without its pads. Raises: ValueError for a batch of several rows."""
        if len(self) != 1:
            raise ValueError(f"without_padding takes one row, not a batch of {len(self)}.")
        moved = self.left_padded()
        pads = self.shape[1] - int(self.lengths[0])

        def shift(s: slice) -> slice:
            return slice(s.start - pads, s.stop - pads)

        spans = moved.spans[0]
        answer = None if spans.answer is None else shift(spans.answer)
        return replace(
            moved,
            tokens=moved.tokens[:, pads:],
            attention_mask=moved.attention_mask[:, pads:],
            position_ids=moved.position_ids[..., pads:],
            spans=(Spans([shift(i) for i in spans.images], shift(spans.query), spans.last - pads, answer),),
        )

    def grid_tokens(self, row: int, image: int = 0) -> Int[Tensor, "height width"]:
        """Positions of one image's grid cells in the sequence.

        Raises: IndexError when the row has no such image."""
        if not 0 <= row < len(self) or not 0 <= image < len(self.spans[row].images):
            raise IndexError(f"No image {image} in row {row}; images a row: {self.n_images}.")
        height, width = self.grids[row][image]
        cells = self.grid_places[row][image] if self.grid_places else range(height * width)
        if len(cells) != height * width:
            raise IndexError(
                "These images have no whole grid: the feature strategy drops a patch of a tower without a class token."
            )
        span = self.spans[row].images[image]
        places = torch.arange(span.start, span.stop, device=self.tokens.device)[self.image_mask[row, span]]
        return places[list(cells)].reshape(height, width)

    def count_image_tokens(self, row: int, span: slice) -> int:
        """Image tokens inside a span of a row."""
        return int(self.image_mask[row, span].sum())

    def _answer_ids(self, answer: Any) -> list[list[int]]:
        stops = set(self.end_token_ids) | set(getattr(answer, "end_token_ids", ()))
        if isinstance(answer, Tensor):
            answer = answer.tolist()
        if isinstance(answer, str):
            answer = [answer] * len(self)
        if len(answer) != len(self):
            raise ValueError(f"{len(answer)} answers for {len(self)} rows; give one a row, or one text for all.")
        rows = []
        for item in answer:
            if isinstance(item, str):
                if self.tokenize is None:
                    raise ValueError("with_answer: these inputs know no tokenizer; give token ids instead of text.")
                rows.append(list(self.tokenize(item)))
            else:
                ids = [int(i) for i in item]
                ends = [i for i, token in enumerate(ids) if token in stops]
                if ends:  # what follows the end of a generated row pads the batch
                    ids = ids[: ends[0] + 1]
                while ids and ids[-1] == self.pad_token_id and ids[-1] not in stops:
                    ids.pop()
                rows.append(ids)
        return rows

    def __repr__(self) -> str:
        n, length = self.shape
        images = self.n_images
        shown = f"{images[0]} image{'s' * (images[0] != 1)} a row" if len(set(images)) == 1 else f"images {images}"
        lines = [f"MultimodalInputs({n} row{'s' * (n != 1)}, {length} positions, {shown}"]
        for i, (spans, grids) in enumerate(zip(self.spans[:3], self.grids[:3], strict=False)):
            cells = ", ".join(f"{h}x{w}" for h, w in grids)
            lines.append(f"  row {i}: {int(self.lengths[i])} tokens, grids [{cells}], {spans}")
        if n > 3:
            lines.append(f"  ... {n - 3} more")
        return "\n".join(lines) + ")"


def _belonging(owner: Tensor | None, rows: list[int]) -> tuple[Tensor | None, Tensor | None]:
    """Indices of the images that the chosen rows own, in the rows' order, and their new owners."""
    if owner is None:
        return None, None
    places, owners = [], []
    for new, old in enumerate(rows):
        mine = (owner == old).nonzero().flatten().tolist()
        places += mine
        owners += [new] * len(mine)
    return (
        torch.tensor(places, dtype=torch.long, device=owner.device),
        torch.tensor(owners, dtype=torch.long, device=owner.device),
    )


def _take(x: Tensor | None, index: Tensor | None) -> Tensor | None:
    if x is None or index is None:
        return x
    return x[index.to(x.device)] if len(index) else None
