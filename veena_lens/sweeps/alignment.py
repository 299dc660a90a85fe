"""Which places of images correspond in two runs, and the rows that edit them.

An edit of the tower, the connector or the features reaches the text at the first token of its image (of its tile,
where images have tiles), in block 0.

Which sites, units and positions a sweep visits, in the order of its axes.

Two runs of a sweep side by side: which positions, images and keys of one correspond to those of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veena_lens.hook_table import hooks_of, require_hook, row_of
from veena_lens.images.layout import arranged_image, reached_from
from veena_lens.inputs import MultimodalInputs
from veena_lens.interventions.base import HEAD_AXES, require_unit
from veena_lens.positions import Tile, position_mask
from veena_lens.sweeps.rows import AnyRow, BaseRun, PictureRow, Row

KINDS = {
    "heads": ("attn.hook_z", "head"),
    "resid": ("hook_resid_pre", None),
    "attn_out": ("hook_attn_out", None),
    "mlp_out": ("hook_mlp_out", None),
    "neurons": ("mlp.hook_post", "neuron"),
}


class SweepSites:
    """Which sites, units and positions a sweep visits, in the order of its axes."""

    def __init__(self, model: Any, sites: Any, layers: Sequence[int] | None, units: Sequence[int] | None) -> None:
        cfg = model.cfg
        self.unit: str | None = None
        self.units: list[int | None] = [None]
        if isinstance(sites, str) and sites in KINDS:
            part, self.unit = KINDS[sites]
            chosen = (
                range(cfg.n_layers)
                if layers is None
                else [require_unit(i, cfg.n_layers, "patch_sweep", "layer") for i in layers]
            )
            self.sites = [f"blocks.{i}.{part}" for i in chosen]
            self.named = False
            self.layers = list(chosen)
            if units is not None and self.unit is None:
                raise ValueError(f"units={list(units)}: sites={sites!r} has neither heads nor neurons.")
            if self.unit is not None:
                n = cfg.n_heads if self.unit == "head" else cfg.d_mlp
                self.units = [
                    require_unit(u, n, "patch_sweep", self.unit) for u in (range(n) if units is None else units)
                ]
        else:
            if isinstance(sites, str) and not sites.startswith(
                ("blocks.", "hook_", "vision.", "connector.", "deepstack.")
            ):
                raise ValueError(f"sites={sites!r}: give one of {', '.join(KINDS)}, or a list of hook names.")
            names = [sites] if isinstance(sites, str) else list(sites)
            known = hooks_of(cfg)
            self.sites = [_site_before_the_head(require_hook(n, known)) for n in names]
            self.names, self.named = names, True
            if layers is not None:
                raise ValueError(
                    f"layers={list(layers)} goes with sites such as 'heads'; named sites name their layer."
                )
            if units is not None:
                self.unit, self.units = _units_of(cfg, self.sites, units)
        if not self.sites or not self.units:
            raise ValueError("patch_sweep: no site to patch; layers, units and sites must not be empty.")
        self.on_pictures = is_picture_site(self.sites[0])
        if any(is_picture_site(name) != self.on_pictures for name in self.sites):
            raise ValueError(
                "patch_sweep: sites on images and in the text count other positions; sweep them one after another, "
                f"not {self.sites}."
            )


def _units_of(cfg: Any, sites: Sequence[str], units: Sequence[int]) -> tuple[str, list[int | None]]:
    """("head" or "neuron", the chosen ones) of named sites. Raises: ValueError where a site has none, or not these."""
    kinds, chosen = set(), []
    for name in sites:
        axes = row_of(name).axis_names
        axis = next((a for a in axes if a in (*HEAD_AXES, "d_mlp")), None)
        if axis is None:
            raise ValueError(f"units={list(units)}: {name} has axes {' '.join(axes)}, neither heads nor neurons.")
        of = cfg.vision if name.startswith("vision.") else cfg
        kinds.add("neuron" if axis == "d_mlp" else "head")
        chosen.append([require_unit(u, getattr(of, axis), f"patch_sweep: {name}", max(kinds)) for u in units])
    if len(kinds) > 1 or any(one != chosen[0] for one in chosen):
        raise ValueError(f"units={list(units)} mean other heads or neurons at {', '.join(sites)}; sweep them apart.")
    return kinds.pop(), list(chosen[0])


def _site_before_the_head(name: str) -> str:
    """A hook on images or inside the decoder's blocks; the merged embedding is what enters block 0."""
    if name == "hook_embed":
        return "blocks.0.hook_resid_pre"
    if name.startswith(("ln_final.", "unembed.")):
        raise ValueError(
            f"patch_sweep patches hooks of the decoder's blocks, hook_embed and hooks on images, not {name!r}."
        )
    return name


class RunPair:
    """One pair: the run that is patched (`base`), the source of the patches, and which positions correspond.

    Raises: ValueError where they do not correspond one to one."""

    def __init__(
        self,
        cfg: Any,
        base: MultimodalInputs,
        source: MultimodalInputs,
        row: int,
        positions: Any,
        layout: SweepSites,
    ) -> None:
        self.cfg = cfg
        self.base, self.source, self.is_each = (
            base[row].without_padding(),
            source[row].without_padding(),
            is_each(positions),
        )
        mine, theirs = (positions_of_row(batch, positions, row) for batch in (base, source))
        self.here: dict[str, PicturePlaces] = {}  # by site on images; "" for the text
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
        if here.pictures is not None:  # tower and connector: image by image
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
                f"positions={positions!r} are tokens of an image in one run and of the text (or another image) in "
                "the other: they must correspond one to one. Choose positions by words, such as 'query'."
            )

    def _groups(self, name: str) -> list[list[int]]:
        together = list(range(len(self.here[name].places)))
        return [[i] for i in together] if self.is_each else [together]

    def empty_rows(self, layout: SweepSites) -> list[AnyRow]:
        """The rows without values, for a plan."""
        return self._rows(layout, {})

    @torch.no_grad()
    def rows(self, model: Any, layout: SweepSites, sites_read: Sequence[str]) -> tuple[list[AnyRow], BaseRun]:
        """The rows with the source's values, and what the metrics need of the source's own run."""
        logits, cache = model.run_with_cache(self.source, names_filter=sorted({*layout.sites, *sites_read}))
        seen = {site: cache[site][0] for site in sites_read}
        source = BaseRun(self.source, [], [], [], logits[0, -1], seen)
        return self._rows(layout, {name: cache[name] for name in layout.sites}), source

    def _rows(self, layout: SweepSites, values: dict[str, Tensor]) -> list[AnyRow]:
        if layout.on_pictures:
            return [
                row
                for name, here in self.here.items()
                for row in crop_rows(name, values.get(name), here, self.there[name], layout.units, self._groups(name))
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
    """True where the images of two rows have one number and the same shapes."""
    if a.pixel_values is None or b.pixel_values is None or a.grids != b.grids or a.token_tiles != b.token_tiles:
        return False
    grids = a.crop_grids is None or b.crop_grids is None or torch.equal(a.crop_grids, b.crop_grids)
    return a.pixel_values.shape == b.pixel_values.shape and grids


def _unequal(name: str, positions: Any, base: MultimodalInputs, source: MultimodalInputs) -> ValueError:
    """The error of images that have no common grid, with both."""

    def shown(run: MultimodalInputs) -> str:
        grids = ", ".join(f"{h} x {w}" for h, w in run.grids[0]) or "none"
        n = 0 if run.crop_rows is None else len(run.crop_rows)
        return f"{grids} tokens ({n} tiles)" if run.token_tiles and n != len(run.grids[0]) else f"{grids} tokens"

    where = f" at {name}" if name else ""
    return ValueError(
        f"positions={positions!r}{where}: the pictures of both runs must have one grid to be patched into each other; "
        f"the run that is patched has {shown(base)}, the source {shown(source)}. Prepare both pictures at one size "
        "(image.resize(other.size)), or patch what both have: 'last' or 'query' at hooks of the decoder's blocks."
    )


def is_picture_site(name: str) -> bool:
    """True for hooks of the tower, the connector and the features."""
    return row_of(name).axis_names[0] != "batch"


@dataclass(frozen=True, eq=False)
class PicturePlaces:
    """Places of an image site that correspond in two runs: places, images (None for image tokens) and the first
    position of the text that each reaches."""

    places: Tensor
    pictures: Tensor | None
    starts: Tensor


def sizes_at(cfg: Any, inputs: MultimodalInputs, name: str) -> list[int]:
    """How many positions each image has at a site of the tower or the connector, padding left out."""
    assert inputs.crop_rows is not None
    in_tower = name.startswith("vision.")
    if inputs.crop_grids is None:
        return [cfg.vision.n_positions if in_tower else cfg.vision.n_features] * len(inputs.crop_rows)
    sizes = inputs.crop_grids.prod(-1)
    return (sizes if in_tower else sizes // cfg.vision.merge_size**2).tolist()


def first_tokens(inputs: MultimodalInputs) -> list[int]:
    """Return, for each crop, the first position of the text that reads it; the last position if none does."""
    found = []
    for image, span in enumerate(inputs.spans[0].images):
        tokens = (inputs.image_mask[0, span].nonzero().flatten() + span.start).tolist()
        starts = arranged_image(inputs, 0, image).crop_starts()
        found += [tokens[start] if start < len(tokens) else inputs.shape[1] - 1 for start in starts]
    return found


def picture_places(cfg: Any, inputs: MultimodalInputs, name: str, positions: Any, is_each: bool) -> PicturePlaces:
    """Where a site on images is edited. Words and regions choose image tokens (of features); at the tower and the
    connector, numbers and slices count positions of every image, and "all" or "each" takes them all.

    Raises: ValueError for a selection that the site does not have."""
    if inputs.crop_rows is None or inputs.crop_images is None:
        raise ValueError(f"{name}: {inputs!r} holds no images to patch.")
    tokens, reached = inputs.image_mask[0].nonzero().flatten(), reached_from(cfg, inputs)
    if row_of(name).axis_names[0] == "n_image_tokens":
        chosen = position_mask(inputs, "image" if is_each else positions)[0][tokens]
        places = chosen.nonzero().flatten().cpu()
        if not len(places):
            raise ValueError(f"positions={positions!r} select no image token for {name} in {inputs!r}.")
        return PicturePlaces(places, None, reached[tokens.cpu()[places]])
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
    return PicturePlaces(torch.tensor(places), torch.tensor(pictures), torch.tensor(starts))


def crop_rows(
    name: str,
    value: Tensor | None,
    here: PicturePlaces,
    there: PicturePlaces,
    units: Sequence[int | None],
    groups: Sequence[Sequence[int]],
) -> list[PictureRow]:
    """The rows of a site; `value` is the source's whole activation (None: a plan), `there` the places in it."""
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
