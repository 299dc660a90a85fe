"""Two runs of a sweep side by side: which positions, images and keys of one correspond to those of the other.

Numbers and words of positions are resolved in each row without its pads. An edit of the tower, the connector or the
features reaches the text at the first token of its image (of its tile, where images have tiles), in block 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from veena_lens.hook_table import row_of
from veena_lens.images.layout import arranged_image, reached_from
from veena_lens.inputs import MultimodalInputs
from veena_lens.positions import Tile, position_mask
from veena_lens.sweeps.rows import AnyRow, BaseRun, PictureRow, Row
from veena_lens.sweeps.sites import SweepSites

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM


def is_each(positions: Any) -> bool:
    """Return True where every position is patched alone."""
    return isinstance(positions, str) and positions == "each"


def bare(inputs: MultimodalInputs) -> MultimodalInputs:
    """Return the inputs without their pixels: enough to find positions, and to go on from a residual."""
    return replace(inputs, pixel_values=None)


def positions_of_row(batch: MultimodalInputs, positions: Any, row: int) -> Any:
    """Return a selection as one row without its pads reads it: a mask [batch pos] is cut to the row's own positions.

    Raises: ValueError for a mask of another shape."""
    if not isinstance(positions, Tensor) or positions.dtype != torch.bool or positions.ndim != 2:
        return positions
    if positions.shape != batch.shape:
        raise ValueError(f"A mask of positions must be {list(batch.shape)}, as the batch, not {list(positions.shape)}.")
    return positions[row].to(batch.device)[batch.attention_mask[row]]


def chosen_in(inputs: MultimodalInputs, positions: Any, of: str = "") -> Int[Tensor, " n"]:
    """Return the chosen positions of a single row without pads, in order; `of` names the row in messages.

    Raises: ValueError where they select nothing."""
    places = position_mask(inputs, "all" if is_each(positions) else positions)[0].nonzero().flatten()
    if not len(places):
        raise ValueError(f"positions={positions!r} select nothing in {of or repr(inputs)}.")
    return places


def places_of(inputs: MultimodalInputs, row: int, positions: Any) -> Int[Tensor, " n"]:
    """Return the chosen positions of one row, in the padded sequence; numbers count in the row without its pads.

    Raises: ValueError where they select nothing."""
    alone = bare(inputs)[row].without_padding()
    chosen = chosen_in(alone, positions_of_row(inputs, positions, row), f"row {row} of {inputs!r}")
    return inputs.attention_mask[row].nonzero().flatten()[chosen]


def corresponding(
    base: MultimodalInputs, source: MultimodalInputs, positions: Any
) -> tuple[list[Int[Tensor, " n"]], list[Int[Tensor, " n"]]]:
    """Return each pair's chosen positions in the run that is patched and in the source; the k-th of one is the k-th of
    the other.

    Raises: ValueError where their numbers differ."""
    here, there = ([places_of(run, i, positions) for i in range(len(run))] for run in (base, source))
    for pair, (mine, theirs) in enumerate(zip(here, there, strict=True)):
        _require_as_many(positions, len(mine), len(theirs), pair if len(base) > 1 else None)
    return here, there


def _require_as_many(positions: Any, here: int, there: int, pair: int | None) -> None:
    if here != there:
        of_pair = "" if pair is None else f" of pair {pair}"
        raise ValueError(
            f"positions={positions!r}{of_pair} are {here} in the run that is patched and {there} in the source: "
            "they must correspond one to one."
        )


def _text_places(inputs: MultimodalInputs, positions: Any) -> ImagePlaces:
    places = chosen_in(inputs, positions).cpu()
    return ImagePlaces(places, None, places)


class RunPair:
    """One pair of runs: the one that is patched (`base`), the source of the patches, and which positions correspond.

    Raises: ValueError where they do not correspond one to one."""

    def __init__(
        self,
        cfg: Any,
        base: MultimodalInputs,
        source: MultimodalInputs,
        row: int,
        positions: Any,
        sites: SweepSites,
    ) -> None:
        self.cfg, self.pair = cfg, row if len(base) > 1 else None
        self.base, self.source, self.is_each = (
            base[row].without_padding(),
            source[row].without_padding(),
            is_each(positions),
        )
        mine, theirs = (positions_of_row(batch, positions, row) for batch in (base, source))
        self.here: dict[str, ImagePlaces] = {}  # by site on images; "" for the text
        self.there: dict[str, ImagePlaces] = {}
        for name in sites.sites if sites.on_images else [""]:
            self.here[name], self.there[name] = (
                places_on_images(cfg, run, name, chosen, self.is_each) if name else _text_places(run, chosen)
                for run, chosen in ((self.base, mine), (self.source, theirs))
            )
            self._require_correspondence(name, positions)
        sizes = {name: len(places.places) for name, places in self.here.items()}
        if self.is_each and len(set(sizes.values())) > 1:
            raise ValueError(
                f"positions='each' needs sites with the same positions; these have {sizes}: sweep them apart."
            )
        self.n_groups = next(iter(sizes.values())) if self.is_each else 1
        for name in () if sites.on_images else sites.sites:
            if "key_pos" in row_of(name).axis_names and self.base.shape[1] != self.source.shape[1]:
                raise ValueError(
                    f"{name} has keys at other positions in the source ({self.base.shape[1]} against "
                    f"{self.source.shape[1]} tokens); both prompts must have one length. Patch hook_z instead."
                )

    def _require_correspondence(self, name: str, positions: Any) -> None:
        """Raise ValueError where the chosen places of a site do not correspond one to one."""
        here, there = self.here[name], self.there[name]
        if here.pictures is not None:  # tower and connector: image by image
            if not _same_shapes(self.base, self.source):
                raise _unequal(name, positions, self.base, self.source)
            return
        mine, theirs = (_images_of(run, p) for run, p in ((self.base, here), (self.source, there)))
        whole_view = isinstance(positions, Tile) and positions.tile == 0 and bool(self.base.token_tiles)
        for image in {i for i in (*mine, *theirs) if i is not None}:
            if not whole_view and _layout(self.base, image) != _layout(self.source, image):
                raise _unequal(name, positions, self.base, self.source)
        _require_as_many(positions, len(mine), len(theirs), self.pair)
        if mine != theirs:
            raise ValueError(
                f"positions={positions!r} are tokens of an image in one run and of the text (or another image) in "
                "the other: they must correspond one to one. Choose positions by words, such as 'query'."
            )

    def _groups(self, name: str) -> list[list[int]]:
        together = list(range(len(self.here[name].places)))
        return [[i] for i in together] if self.is_each else [together]

    def empty_rows(self, sites: SweepSites) -> list[AnyRow]:
        """Return the rows without values, for a plan."""
        return self._rows(sites, {})

    @torch.no_grad()
    def rows(self, model: HookedVLM, sites: SweepSites, sites_read: Sequence[str]) -> tuple[list[AnyRow], BaseRun]:
        """Return the rows with the source's values, and what the metrics need of the source's own run."""
        logits, cache = model.run_with_cache(self.source, names_filter=sorted({*sites.sites, *sites_read}))
        seen = {site: cache[site][0] for site in sites_read}
        source = BaseRun(self.source, [], [], [], logits[0, -1], seen)
        return self._rows(sites, {name: cache[name] for name in sites.sites}), source

    def _rows(self, sites: SweepSites, values: dict[str, Tensor]) -> list[AnyRow]:
        if sites.on_images:
            return [
                row
                for name, here in self.here.items()
                for row in crop_rows(name, values.get(name), here, self.there[name], sites.units, self._groups(name))
            ]
        rows: list[AnyRow] = []
        here, there = self.here[""].places, self.there[""].places
        first = reached_from(self.cfg, self.base)
        for name in sites.sites:
            axes, value = row_of(name).axis_names[1:], values.get(name)
            if value is not None:
                value = value[0].movedim(axes.index("pos") if "pos" in axes else axes.index("query_pos"), 0)
            for unit in sites.units:
                for g in self._groups(""):
                    taken = torch.empty(0) if value is None else value[there[g].to(value.device)]
                    rows.append(Row(name, here[g], taken, unit, first=int(first[here[g]].min())))
        return rows


def _images_of(inputs: MultimodalInputs, chosen: ImagePlaces) -> list[int | None]:
    """Return for each chosen position of the text the image whose token it is, None for text."""
    owner: dict[int, int] = {}
    for image, span in enumerate(inputs.spans[0].images):
        inside = inputs.image_mask[0, span].nonzero().flatten() + span.start
        owner |= dict.fromkeys(inside.tolist(), image)
    return [owner.get(p) for p in chosen.starts.tolist()]


def _layout(inputs: MultimodalInputs, image: int) -> Any:
    """Return how the tokens of an image lie in it; None where the row has no such image."""
    if image >= len(inputs.grids[0]):
        return None
    tiles = inputs.token_tiles[0][image] if inputs.token_tiles else ()
    return inputs.grids[0][image], tiles


def _same_shapes(a: MultimodalInputs, b: MultimodalInputs) -> bool:
    """Return True where the images of two rows have one number and the same shapes."""
    if a.pixel_values is None or b.pixel_values is None or a.grids != b.grids or a.token_tiles != b.token_tiles:
        return False
    grids = a.crop_grids is None or b.crop_grids is None or torch.equal(a.crop_grids, b.crop_grids)
    return a.pixel_values.shape == b.pixel_values.shape and grids


def _unequal(name: str, positions: Any, base: MultimodalInputs, source: MultimodalInputs) -> ValueError:
    """Return the error of images that have no common grid, with both."""

    def shown(run: MultimodalInputs) -> str:
        grids = ", ".join(f"{h} x {w}" for h, w in run.grids[0]) or "none"
        n = 0 if run.crop_rows is None else len(run.crop_rows)
        return f"{grids} tokens ({n} tiles)" if run.token_tiles and n != len(run.grids[0]) else f"{grids} tokens"

    where = f" at {name}" if name else ""
    return ValueError(
        f"positions={positions!r}{where}: the images of both runs must have one grid to be patched into each other; "
        f"the run that is patched has {shown(base)}, the source {shown(source)}. Prepare both images at one size "
        "(image.resize(other.size)), or patch what both have: 'last' or 'query' at hooks of the decoder's blocks."
    )


@dataclass(frozen=True, eq=False)
class ImagePlaces:
    """Chosen places of a site on images: positions, crops (None for image tokens), and the first position of the text
    that each reaches."""

    places: Tensor
    pictures: Tensor | None
    starts: Tensor


def sizes_at(cfg: Any, inputs: MultimodalInputs, name: str) -> list[int]:
    """Return how many positions each image has at a site of the tower or the connector, padding left out."""
    assert inputs.crop_rows is not None
    in_tower = name.startswith("vision.")
    if inputs.crop_grids is None:
        return [cfg.vision.n_positions if in_tower else cfg.vision.n_features] * len(inputs.crop_rows)
    sizes = inputs.crop_grids.prod(-1)
    return (sizes if in_tower else sizes // cfg.vision.merge_size**2).tolist()


def first_tokens(inputs: MultimodalInputs) -> list[int]:
    """Return for each crop the first position of the text that reads it; the last position where none does."""
    found = []
    for image, span in enumerate(inputs.spans[0].images):
        tokens = (inputs.image_mask[0, span].nonzero().flatten() + span.start).tolist()
        starts = arranged_image(inputs, 0, image).crop_starts()
        found += [tokens[start] if start < len(tokens) else inputs.shape[1] - 1 for start in starts]
    return found


def places_on_images(cfg: Any, inputs: MultimodalInputs, name: str, positions: Any, is_each: bool) -> ImagePlaces:
    """Return where a site on images is edited.

    Words and regions choose image tokens (of features); at the tower and the connector, numbers and slices count
    positions of every image, and "all" or "each" takes them all.

    Raises: ValueError for a selection that the site does not have."""
    if inputs.crop_rows is None or inputs.crop_images is None:
        raise ValueError(f"{name}: {inputs!r} holds no images to patch.")
    tokens, reached = inputs.image_mask[0].nonzero().flatten(), reached_from(cfg, inputs)
    if row_of(name).of_features:
        chosen = position_mask(inputs, "image" if is_each else positions)[0][tokens]
        places = chosen.nonzero().flatten().cpu()
        if not len(places):
            raise ValueError(f"positions={positions!r} select no image token for {name} in {inputs!r}.")
        return ImagePlaces(places, None, reached[tokens.cpu()[places]])
    whole = is_each or (isinstance(positions, str) and positions in ("all", "image"))
    asked: list[int] | None = None
    if isinstance(positions, int):
        asked = [positions]
    elif isinstance(positions, (list, tuple)) and all(isinstance(p, int) for p in positions):
        asked = [int(p) for p in positions]
    if not (whole or asked is not None or isinstance(positions, slice)):
        raise ValueError(
            f"positions={positions!r} name tokens of the text; {name} lies on images: give 'all', 'each', numbers "
            "or a slice of its own positions, or patch hook_image_features, what the decoder reads."
        )
    first = reached[first_tokens(inputs)].tolist()
    places, pictures, starts = [], [], []
    for picture, size in enumerate(sizes_at(cfg, inputs, name)):
        every = list(range(size))
        if asked is None:
            chosen = every[positions] if isinstance(positions, slice) else every
        elif all(-size <= p < size for p in asked):
            chosen = [every[p] for p in asked]
        else:
            raise ValueError(f"positions={positions!r}: image {picture} has {size} positions at {name}.")
        places += chosen
        pictures += [picture] * len(chosen)
        starts += [first[picture]] * len(chosen)
    if not places:
        raise ValueError(f"positions={positions!r} select nothing at {name}.")
    return ImagePlaces(torch.tensor(places), torch.tensor(pictures), torch.tensor(starts))


def crop_rows(
    name: str,
    value: Tensor | None,
    here: ImagePlaces,
    there: ImagePlaces,
    units: Sequence[int | None],
    groups: Sequence[Sequence[int]],
) -> list[PictureRow]:
    """Return the rows of a site; `value` is the source's whole activation (None: a plan), `there` the places in it."""
    axes = row_of(name).axis_names
    if value is not None and here.pictures is not None:
        value = value.movedim(axes.index("query_pos") if "query_pos" in axes else 1, 1)
    rows = []
    for unit in units:
        for group in groups:
            chosen = list(group)
            pictures = None if here.pictures is None else here.pictures[chosen]
            taken = torch.empty(0)
            if value is not None:
                at = there.places[chosen].to(value.device)
                taken = value[at] if pictures is None else value[pictures.to(value.device), at]
            rows.append(PictureRow(name, here.places[chosen], pictures, taken, int(here.starts[chosen].min()), unit))
    return rows
