"""Two runs of a sweep side by side: which positions, pictures and keys of one correspond to those of the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veena_lens.hook_table import row_of
from veena_lens.inputs import MultimodalInputs
from veena_lens.positions import Tile, position_mask
from veena_lens.sweeps.layout import Layout
from veena_lens.sweeps.pictures import PicturePlaces, picture_places, picture_rows
from veena_lens.sweeps.rows import AnyRow, BaseRun, Row
from veena_lens.vision.blocks import reached_from


class Pair:
    """One pair: the run that is patched (`base`), the source of the patches, and which positions correspond.

    Raises: ValueError where they do not correspond one to one."""

    def __init__(
        self,
        cfg: Any,
        base: MultimodalInputs,
        source: MultimodalInputs,
        row: int,
        positions: Any,
        layout: Layout,
    ) -> None:
        self.cfg = cfg
        self.base, self.source, self.is_each = base[row].trimmed(), source[row].trimmed(), is_each(positions)
        mine, theirs = (positions_of_row(batch, positions, row) for batch in (base, source))
        self.here: dict[str, PicturePlaces] = {}  # by site on pictures; "" for the text
        self.there: dict[str, PicturePlaces] = {}
        for name in layout.sites if layout.on_pictures else [""]:
            self.here[name], self.there[name] = (
                picture_places(cfg, run, name, chosen, self.is_each) if name else _text_places(run, chosen)
                for run, chosen in ((self.base, mine), (self.source, theirs))
            )
            self._require_correspondence(name, positions)
        sizes = {name: len(places.places) for name, places in self.here.items()}
        if self.is_each and len(set(sizes.values())) > 1:
            raise ValueError(
                f"positions='each' needs sites with the same positions; these have {sizes}: sweep them apart."
            )
        self.n_groups = next(iter(sizes.values())) if self.is_each else 1
        for name in () if layout.on_pictures else layout.sites:
            if "key_pos" in row_of(name).axis_names and self.base.shape[1] != self.source.shape[1]:
                raise ValueError(
                    f"{name} has keys at other positions in the source ({self.base.shape[1]} against "
                    f"{self.source.shape[1]} tokens); both prompts must have one length. Patch hook_z instead."
                )

    def _require_correspondence(self, name: str, positions: Any) -> None:
        """Raises: ValueError where the chosen places of a site do not correspond one to one."""
        here, there = self.here[name], self.there[name]
        if here.pictures is not None:  # tower and connector: picture by picture
            if not _same_shapes(self.base, self.source):
                raise _unequal(name, positions, self.base, self.source)
            return
        mine, theirs = (_images_of(run, p) for run, p in ((self.base, here), (self.source, there)))
        whole_view = isinstance(positions, Tile) and positions.tile == 0 and bool(self.base.token_tiles)
        for image in {i for i in (*mine, *theirs) if i is not None}:
            if not whole_view and _layout(self.base, image) != _layout(self.source, image):
                raise _unequal(name, positions, self.base, self.source)
        if len(mine) != len(theirs):
            raise ValueError(
                f"positions={positions!r} are {len(mine)} in the run that is patched and {len(theirs)} in the source: "
                "they must correspond one to one."
            )
        if mine != theirs:
            raise ValueError(
                f"positions={positions!r} are tokens of a picture in one run and of the text (or another picture) in "
                "the other: they must correspond one to one. Choose positions by words, such as 'query'."
            )

    def _groups(self, name: str) -> list[list[int]]:
        together = list(range(len(self.here[name].places)))
        return [[i] for i in together] if self.is_each else [together]

    def empty_rows(self, layout: Layout) -> list[AnyRow]:
        """The rows without values, for a plan."""
        return self._rows(layout, {})

    @torch.no_grad()
    def rows(self, model: Any, layout: Layout, sites_read: Sequence[str]) -> tuple[list[AnyRow], BaseRun]:
        """The rows with the source's values, and what the metrics need of the source's own run."""
        logits, cache = model.run_with_cache(self.source, names_filter=sorted({*layout.sites, *sites_read}))
        seen = {site: cache[site][0] for site in sites_read}
        source = BaseRun(self.source, [], [], [], logits[0, -1], seen)
        return self._rows(layout, {name: cache[name] for name in layout.sites}), source

    def _rows(self, layout: Layout, values: dict[str, Tensor]) -> list[AnyRow]:
        if layout.on_pictures:
            return [
                row
                for name, here in self.here.items()
                for row in picture_rows(
                    name, values.get(name), here, self.there[name], layout.units, self._groups(name)
                )
            ]
        rows: list[AnyRow] = []
        here, there = self.here[""].places, self.there[""].places
        first = reached_from(self.cfg, self.base)
        for name in layout.sites:
            axes, value = row_of(name).axis_names[1:], values.get(name)
            if value is not None:
                value = value[0].movedim(axes.index("pos") if "pos" in axes else axes.index("query_pos"), 0)
            for unit in layout.units:
                for g in self._groups(""):
                    taken = torch.empty(0) if value is None else value[there[g].to(value.device)]
                    rows.append(Row(name, here[g], taken, unit, first=int(first[here[g]].min())))
        return rows


def is_each(positions: Any) -> bool:
    """True where every position is patched alone."""
    return isinstance(positions, str) and positions == "each"


def positions_of_row(batch: MultimodalInputs, positions: Any, row: int) -> Any:
    """A selection as one row without its pads reads it: a mask [batch pos] is cut to the row's own positions.

    Raises: ValueError for a mask of another shape."""
    if not isinstance(positions, Tensor) or positions.dtype != torch.bool or positions.ndim != 2:
        return positions
    if positions.shape != batch.shape:
        raise ValueError(f"A mask of positions must be {list(batch.shape)}, as the batch, not {list(positions.shape)}.")
    return positions[row].to(batch.device)[batch.attention_mask[row]]


def _text_places(inputs: MultimodalInputs, positions: Any) -> PicturePlaces:
    places = position_mask(inputs, "all" if is_each(positions) else positions)[0].nonzero().flatten().cpu()
    if not len(places):
        raise ValueError(f"positions={positions!r} select nothing in {inputs!r}.")
    return PicturePlaces(places, None, places)


def _images_of(inputs: MultimodalInputs, chosen: PicturePlaces) -> list[int | None]:
    """Of each chosen position of the text the image whose token it is, None for text."""
    owner: dict[int, int] = {}
    for image, span in enumerate(inputs.spans[0].images):
        inside = inputs.image_mask[0, span].nonzero().flatten() + span.start
        owner |= dict.fromkeys(inside.tolist(), image)
    return [owner.get(p) for p in chosen.starts.tolist()]


def _layout(inputs: MultimodalInputs, image: int) -> Any:
    """How the tokens of an image lie in it; None where the row has no such image."""
    if image >= len(inputs.grids[0]):
        return None
    tiles = inputs.token_tiles[0][image] if inputs.token_tiles else ()
    return inputs.grids[0][image], tiles


def _same_shapes(a: MultimodalInputs, b: MultimodalInputs) -> bool:
    """True where the pictures of two rows have one number and the same shapes."""
    if a.pixel_values is None or b.pixel_values is None or a.grids != b.grids or a.token_tiles != b.token_tiles:
        return False
    grids = a.picture_grids is None or b.picture_grids is None or torch.equal(a.picture_grids, b.picture_grids)
    return a.pixel_values.shape == b.pixel_values.shape and grids


def _unequal(name: str, positions: Any, base: MultimodalInputs, source: MultimodalInputs) -> ValueError:
    """The error of pictures that have no common grid, with both."""

    def shown(run: MultimodalInputs) -> str:
        grids = ", ".join(f"{h} x {w}" for h, w in run.grids[0]) or "none"
        n = 0 if run.picture_rows is None else len(run.picture_rows)
        return f"{grids} tokens ({n} tiles)" if run.token_tiles and n != len(run.grids[0]) else f"{grids} tokens"

    where = f" at {name}" if name else ""
    return ValueError(
        f"positions={positions!r}{where}: the pictures of both runs must have one grid to be patched into each other; "
        f"the run that is patched has {shown(base)}, the source {shown(source)}. Prepare both pictures at one size "
        "(image.resize(other.size)), or patch what both have: 'last' or 'query' at hooks of the decoder's blocks."
    )
