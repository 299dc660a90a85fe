"""What a model runs on: tokens, images, and where the images lie among the tokens.

`MultimodalInputs` stands in for a token tensor (shape, ndim, device, row indexing), so that functions written
for `[batch, pos]` tokens run with images unchanged. Plain data: a processor makes it, a model reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veena_lens.spans import ImageRecord, Spans


def text_positions(mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Return the position of each token, counted over real tokens only; pads get 0, as in Hugging Face's `generate`."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def is_any_of(tokens: Int[Tensor, "*axes"], ids: Sequence[int]) -> Bool[Tensor, "*axes"]:
    """Return True where a token is one of `ids`."""
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
    """Return the spans of every row.

    Args:
        tokens: the padded ids.
        mask: True at real tokens.
        image_tokens: the ids of tokens that images fill; None without images.
        image_lengths: per row, how many tokens each image fills (images may touch).
        answer_lengths: per row, how many tokens at its end are the answer; None without an answer.
    """
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

    A crop is what the tower reads at once: an image, a tile of one (the whole view first), or a frame or a pair of
    frames of a video, which counts as an image.

    tokens: ids, with every image expanded to its tokens. attention_mask: False on pads. position_ids: [batch pos], or
    [3 batch pos] for multimodal rotary positions. image_token_id, video_token_id: the tokens whose places images fill.
    pad_token_id: the token at pads. pixel_values: what the tower reads, one entry per crop, row after row; crops of any
    size are [crop patch numbers], padded. patch_mask: False at patches of the square that a smaller crop does not have;
    None if all are whole. layouts: per row, one record per image, from which grids and owners of crops follow. spans:
    where things lie in each row. patch_boxes: per row and image, (left, top, right, bottom) of each token in pixels of
    the original image [n_tokens 4]; None where the original is not known. end_token_ids: tokens that end an answer.
    tokenize: text to ids without special tokens, for answers.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"]
    position_ids: Int[Tensor, "*streams batch pos"]
    image_token_id: int | None = None
    video_token_id: int | None = None
    pad_token_id: int = 0
    pixel_values: Float[Tensor, "crop ..."] | None = None
    patch_mask: Bool[Tensor, "crop patch"] | None = None
    layouts: tuple[tuple[ImageRecord, ...], ...] = ()
    spans: tuple[Spans, ...] = ()
    patch_boxes: tuple[tuple[Any, ...], ...] | None = None
    end_token_ids: tuple[int, ...] = ()
    tokenize: Callable[[str], list[int]] | None = field(default=None, repr=False)

    # --- standing in for a token tensor ---------------------------------------------------------------
    @property
    def shape(self) -> torch.Size:
        """Return (batch, pos)."""
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
        """Return the size of one axis, or of both."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 2

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> MultimodalInputs:
        """Return the chosen rows with their images: an int (a batch of one), slice, list, or index or bool tensor."""
        if isinstance(rows, tuple):
            raise IndexError("MultimodalInputs is indexed by rows only; use .tokens to pick positions.")
        if isinstance(rows, int):
            rows = range(len(self))[rows]
            rows = slice(rows, rows + 1)
        chosen = torch.arange(len(self))[rows.cpu() if isinstance(rows, Tensor) else rows].flatten().tolist()
        index = torch.tensor(chosen, dtype=torch.long, device=self.device)
        crops = self._crops_of(chosen)
        part = replace(
            self,
            tokens=self.tokens[index],
            attention_mask=self.attention_mask[index],
            position_ids=self.position_ids[..., index, :],
            pixel_values=_take(self.pixel_values, crops),
            patch_mask=_take(self.patch_mask, crops),
            layouts=tuple(self.layouts[i] for i in chosen) if self.layouts else (),
            spans=tuple(self.spans[i] for i in chosen),
            patch_boxes=None if self.patch_boxes is None else tuple(self.patch_boxes[i] for i in chosen),
        )
        if part.pixel_values is None or part.crop_grids is None:
            return part
        longest = int(part.crop_grids.prod(-1).max())  # pads beyond the longest crop that is left go
        return replace(part, pixel_values=part.pixel_values[:, :longest])

    def _crops_of(self, rows: Sequence[int]) -> list[int]:
        """Return the indices of the crops that some rows own, in the order of these rows."""
        numbers = [sum(image.n_crops for image in row) for row in self.layouts] or [0] * len(self)
        return [i for row in rows for i in range(sum(numbers[:row]), sum(numbers[: row + 1]))]

    def to(self, device: torch.device | str) -> MultimodalInputs:
        """Return the same inputs with every tensor on `device`."""
        names = ("tokens", "attention_mask", "position_ids", "pixel_values", "patch_mask")
        given = {name: getattr(self, name) for name in names}
        return replace(self, **{name: x.to(device) for name, x in given.items() if x is not None})

    # --- images ----------------------------------------------------------------------------------------
    @cached_property
    def grids(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Return, per row and image, (height, width) of its token grid."""
        return tuple(tuple(image.grid for image in row) for row in self.layouts)

    @cached_property
    def grid_places(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Return, per row and image, which of its tokens are the cells of the grid, row by row.

        The others are a class token, a whole view, newlines.
        """
        return tuple(tuple(tuple(image.grid_places()) for image in row) for row in self.layouts)

    @cached_property
    def token_tiles(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Return, per row and image, the tile of each token (0 the whole view, -1 a newline); empty without tiles."""
        found = [[image.token_crops() for image in row] for row in self.layouts]
        if not any(found) or any(crops is None for row in found for crops in row):
            return ()
        return tuple(tuple(tuple(crops) for crops in row if crops is not None) for row in found)

    @cached_property
    def crop_rows(self) -> Int[Tensor, " crop"] | None:
        """Return the row that owns each crop; None without images."""
        return self._per_image(lambda row, number, image: [row] * image.n_crops)

    @cached_property
    def crop_images(self) -> Int[Tensor, " crop"] | None:
        """Return which of its row's images each crop belongs to; None without images."""
        return self._per_image(lambda row, number, image: [number] * image.n_crops)

    @cached_property
    def crop_grids(self) -> Int[Tensor, "crop 2"] | None:
        """Return (height, width) in patches of each crop, where images have any size; None where all have one."""
        if any(image.patch_grid is None for row in self.layouts for image in row):
            return None
        return self._per_image(lambda row, number, image: [image.patch_grid])

    @cached_property
    def image_rows(self) -> Int[Tensor, " image"] | None:
        """Return the row that owns each image; None without images."""
        return self._per_image(lambda row, number, image: [row])

    def _per_image(self, values: Callable[[int, int, ImageRecord], list[Any]]) -> Tensor | None:
        """Return a tensor of values of all images, in reading order; None without images."""
        images = [(row, number, image) for row, mine in enumerate(self.layouts) for number, image in enumerate(mine)]
        found = [value for image in images for value in values(*image)]
        return torch.tensor(found, device=self.device) if found else None

    @property
    def crop_shapes(self) -> Tensor | None:
        """Return what a tower must know of its crops in addition to their pixels: the grids of those of any size, or
        the patches that smaller ones have; None where all are alike."""
        return self.patch_mask if self.crop_grids is None else self.crop_grids

    def crop_lengths(self, in_tokens: bool = False) -> list[int] | None:
        """Return the number of patches of each crop, or of tokens that it fills; None where crops are not padded."""
        if self.crop_grids is None:
            return None
        if in_tokens:
            return [height * width for row in self.grids for height, width in row]
        return self.crop_grids.prod(-1).tolist()

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        """Return the ids of the tokens whose places images fill."""
        return tuple(i for i in (self.image_token_id, self.video_token_id) if i is not None)

    @property
    def image_mask(self) -> Bool[Tensor, "batch pos"]:
        """Return True at the tokens that images fill (an image token that a model generates is text like any other)."""
        mask = torch.zeros_like(self.attention_mask)
        for row, spans in enumerate(self.spans):
            for span in spans.images:
                mask[row, span] = is_any_of(self.tokens[row, span], self.image_token_ids)
        return mask & self.attention_mask

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Return the number of real tokens per row."""
        return self.attention_mask.sum(-1)

    @property
    def n_images(self) -> list[int]:
        """Return the number of images per row."""
        return [len(s.images) for s in self.spans]

    # --- answers and padding ---------------------------------------------------------------------------
    def with_answer(self, answer: str | Sequence[str] | Sequence[Sequence[int]] | Tensor) -> MultimodalInputs:
        """Return the same rows with an answer appended; `spans` gain `.answer`.

        Args:
            answer: one text for all rows, one text per row, or token ids: a list per row, or a `[batch new]` tensor
                as `generate(return_type="tokens")` gives. Ids are appended up to their end token, without the pads at
                their end; texts go through the tokenizer without special tokens.

        Raises:
            ValueError: a text without a tokenizer, or a number of answers other than that of rows.
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
        """Return every row lengthened by generated tokens [batch new], the pads of finished rows included.

        They join an answer that the inputs already have. Rows must end at the last position.
        """
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
        """Return the same rows with their pads moved to the left; the inputs themselves if they are there already."""
        if bool(self.attention_mask[:, -1].all()):
            return self
        order = torch.argsort(self.attention_mask.long(), dim=-1, stable=True)
        last = self.shape[1] - 1
        return replace(
            self,
            tokens=self.tokens.gather(1, order),
            attention_mask=self.attention_mask.gather(1, order),
            position_ids=self.position_ids.gather(-1, order.expand(self.position_ids.shape)),
            spans=tuple(spans.moved(last - int(order[row, -1])) for row, spans in enumerate(self.spans)),
        )

    def without_padding(self) -> MultimodalInputs:
        """Return a single row without its pads.

        Raises:
            ValueError: the batch has several rows.
        """
        if len(self) != 1:
            raise ValueError(f"without_padding takes one row, not a batch of {len(self)}.")
        moved = self.left_padded()
        pads = self.shape[1] - int(self.lengths[0])
        return replace(
            moved,
            tokens=moved.tokens[:, pads:],
            attention_mask=moved.attention_mask[:, pads:],
            position_ids=moved.position_ids[..., pads:],
            spans=(moved.spans[0].moved(-pads),),
        )

    def grid_tokens(self, row: int, image: int = 0) -> Int[Tensor, "height width"]:
        """Return the positions of one image's grid cells in the sequence.

        Raises:
            IndexError: the row has no such image, or the image no whole grid.
        """
        if not 0 <= row < len(self) or not 0 <= image < len(self.spans[row].images):
            raise IndexError(f"No image {image} in row {row}; images per row: {self.n_images}.")
        height, width = self.grids[row][image]
        cells = self.grid_places[row][image]
        if len(cells) != height * width:
            raise IndexError(
                "These images have no whole grid: the feature strategy drops a patch of a tower without a class token."
            )
        span = self.spans[row].images[image]
        places = torch.arange(span.start, span.stop, device=self.tokens.device)[self.image_mask[row, span]]
        return places[list(cells)].reshape(height, width)

    def count_image_tokens(self, row: int, span: slice) -> int:
        """Return the number of image tokens inside a span of a row."""
        return int(self.image_mask[row, span].sum())

    def _answer_ids(self, answer: Any) -> list[list[int]]:
        stops = set(self.end_token_ids) | set(getattr(answer, "end_token_ids", ()))
        if isinstance(answer, Tensor):
            answer = answer.tolist()
        if isinstance(answer, str):
            answer = [answer] * len(self)
        if len(answer) != len(self):
            raise ValueError(f"{len(answer)} answers for {len(self)} rows; give one per row, or one text for all.")
        rows = []
        for item in answer:
            if isinstance(item, str):
                if self.tokenize is None:
                    raise ValueError("with_answer: these inputs have no tokenizer; give token ids instead of text.")
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
        shown = f"{images[0]} image{'s' * (images[0] != 1)} per row" if len(set(images)) == 1 else f"images {images}"
        lines = [f"MultimodalInputs({n} row{'s' * (n != 1)}, {length} positions, {shown}"]
        for i, (spans, grids) in enumerate(zip(self.spans[:3], self.grids[:3], strict=False)):
            cells = ", ".join(f"{h}x{w}" for h, w in grids)
            lines.append(f"  row {i}: {int(self.lengths[i])} tokens, grids [{cells}], {spans}")
        if n > 3:
            lines.append(f"  ... {n - 3} more")
        return "\n".join(lines) + ")"


def _take(x: Tensor | None, index: list[int]) -> Tensor | None:
    """Return the chosen entries of a tensor of crops; None if there are none."""
    return None if x is None or not index else x[torch.tensor(index, device=x.device)]
