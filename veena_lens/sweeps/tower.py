"""Encodes the images that rows of a sweep edit again, from the block of the edit on, and no others.

The tower has no causal order, so an edit reaches every patch of its own image, but no other image and no earlier
block. Edited images of many rows go through the tower together, each joining the batch at the block of its edit (a
staircase, as in the decoder); what the base run knows of the other images is put beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from veena_lens.hook_table import layer_of
from veena_lens.inputs import MultimodalInputs
from veena_lens.model.forward import ResidualState, pack
from veena_lens.sweeps.rows import AnyRow, BaseRun, PictureRow, SeenPictures

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

FEATURE_SITES = ("hook_image_features",)
EMBEDDING = -1  # depth of what lies before the tower's first block


def depth_of(site: str, n_layers: int) -> int:
    """Return where an edit of images leaves the base run: -1 before block 0 of the tower, its block, n_layers after the
    last block, n_layers + 1 in the connector, n_layers + 2 where features enter the text."""
    if site in FEATURE_SITES or site.startswith("deepstack."):
        return n_layers + 2
    if site.startswith("connector."):
        return n_layers + 1
    if site.startswith("vision.ln_post."):
        return n_layers
    layer = layer_of(site)
    return EMBEDDING if layer is None else layer


def blocks_again(site: str, n_layers: int) -> int:
    """Return how many blocks of the tower an edited image passes."""
    return n_layers - min(max(depth_of(site, n_layers), 0), n_layers)


def names_to_keep(model: HookedVLM, sites: Sequence[str]) -> dict[str, str]:
    """Return the hooks that a base run must keep so that edits at these sites can start there, by a name for each."""
    tower, n = model.vision, model.vision.cfg.n_layers
    depths = {depth_of(site, n) for site in sites}
    if min(depths, default=n + 2) > n + 1:
        return {}
    names = {f"enter {i}": f"vision.blocks.{i}.hook_resid_pre" for i in sorted(depths) if 0 <= i < n}
    if n in depths:
        names[f"enter {n}"] = f"vision.blocks.{n - 1}.hook_resid_post"
    names |= {f"kept {i}": name for i, name in tower.kept_names().items()}
    return names | {"features": "connector.hook_in", "projected": "connector.hook_out"}


@torch.no_grad()
def seen_pictures(model: HookedVLM, found: dict[str, Tensor]) -> SeenPictures:
    """Return what the base run's tower and connector made of all images, from the hooks of `names_to_keep`."""

    def part(word: str) -> dict[int, Tensor]:
        return {int(name.split()[1]): x for name, x in found.items() if name.startswith(word)}

    kept = part("kept")
    layers = model.vision.cfg.deepstack_layers[: model.cfg.n_deepstack]
    merged = [model.deepstack[i](kept[layer]) for i, layer in enumerate(layers)]
    return SeenPictures(part("enter"), kept, found["features"], found["projected"], merged)


def encode_again(model: HookedVLM, base: BaseRun, rows: Sequence[AnyRow]) -> ResidualState:
    """Return what enters block 0 of each row, under the row's edit of the images.

    Features are edited where they lie in the sequence; for tower and connector the images that a row edits run again
    from the edited place on, and their features take the place of the base run's."""
    n, tokens = len(rows), base.inputs.image_mask[0].nonzero().flatten()
    resid = base.resid[0].expand(n, -1, -1).clone()
    deepstack = {layer: added.expand(n, -1, -1).clone() for layer, added in base.deepstack.items()}
    entries = []
    for i, row in enumerate(rows):
        assert isinstance(row, PictureRow)
        if row.pictures is not None:
            entries.append((i, row))
            continue
        stream = resid if row.site in FEATURE_SITES else deepstack[(layer_of(row.site) or 0) + 1]
        stream[i, tokens] = row.edit(stream[i, tokens], 0)
    if entries:
        n_layers = model.vision.cfg.n_layers
        entries.sort(key=lambda entry: depth_of(entry[1].site, n_layers))
        _Again(model, base, [row for _, row in entries]).put([i for i, _ in entries], resid, deepstack, tokens)
    return ResidualState(resid, deepstack)


class _Again:
    """Edited images of rows, in the order in which they leave the base run; `pictures` of all rows one after another.

    projected: what the connector makes of them; merged: what the mergers of inner layers make of them."""

    def __init__(self, model: HookedVLM, base: BaseRun, rows: Sequence[PictureRow]) -> None:
        assert base.pictures is not None
        self.model, self.base, self.rows, self.known = model, base, rows, base.pictures
        self.held = [row.held for row in rows]
        self.pictures = torch.tensor([p for held in self.held for p in held])
        self.ends = [0]
        for held in self.held:
            self.ends.append(self.ends[-1] + len(held))
        n = model.vision.cfg.n_layers
        self.depths = [depth_of(row.site, n) for row in rows]
        features, inner = self._through_tower(n)
        with model.hooks(self._edits(n + 1)):
            self.projected = model.connector(features)
        mergers = list(model.deepstack)[: len(self.known.merged)] if self.known.merged else []
        self.merged = [merger(x) for merger, x in zip(mergers, inner, strict=False)]

    def _entries(self, depth: int) -> tuple[int, int]:
        """Return rows that leave the base run at a depth: first and one past the last."""
        first = sum(d < depth for d in self.depths)
        return first, first + self.depths.count(depth)

    def _edits(self, depth: int) -> list[tuple[str, Callable[..., Any]]]:
        """Return hooks that edit the rows of one depth, which lie in the batch at their own places."""
        first, stop = self._entries(depth)
        by_site: dict[str, list[int]] = {}
        for i in range(first, stop):
            by_site.setdefault(self.rows[i].site, []).append(i)

        def make(members: list[int]) -> Callable[..., Any]:
            def edit(tensor: Tensor, hook: Any) -> Tensor:
                out = tensor.clone()
                for i in members:
                    at = slice(self.ends[i], self.ends[i + 1])
                    out[at] = self.rows[i].edit(tensor[at], 0)
                return out

            return edit

        return [(site, make(members)) for site, members in by_site.items()]

    def _of(self, value: Shaped[Tensor, "crop ..."], first: int, stop: int) -> Shaped[Tensor, "entry ..."]:
        """Return the base run's value of the images of rows first .. stop - 1."""
        at = self.pictures[self.ends[first] : self.ends[stop]]
        return value[at.to(value.device)]

    def _through_tower(self, n: int) -> tuple[Tensor, list[Tensor]]:
        """Return (features, outputs of inner layers) of every entry."""
        tower, known, total = self.model.vision, self.known, len(self.rows)
        inputs = self.base.inputs
        assert inputs.pixel_values is not None
        n_inner = len(model_layers := self.model.vision.cfg.deepstack_layers)
        past = sum(d <= n for d in self.depths)  # the others begin in the connector
        after = self._of(known.features, past, total)
        inner_after = [self._of(known.kept[layer], past, total) for layer in model_layers]
        if not past:
            return after, inner_after
        shapes = inputs.crop_shapes
        _, joined = self._entries(EMBEDDING)
        resid, context = None, None
        if joined:
            pixels = inputs.pixel_values.to(tower.patch_embed.weight.device)
            with self.model.hooks(self._edits(EMBEDDING)):
                mine = None if shapes is None else self._of(shapes, 0, joined)
                resid = tower.embed(self._of(pixels, 0, joined), mine)
        kept: dict[int, Tensor] = {}
        for layer in range(self.depths[0] if not joined else 0, n):
            first, stop = self._entries(layer)
            if stop > first:
                resid = _with(resid, self._of(known.entering[layer], first, stop))
                joined, context = stop, None
            assert resid is not None
            if context is None:
                mine = None if shapes is None else self._of(shapes, 0, joined)
                context = tower.context(mine, resid.shape[1], resid.device)
            fresh: dict[int, Tensor] = {}
            with self.model.hooks(self._edits(layer)):
                resid = tower.step(layer, resid, context, fresh)
            for name, value in fresh.items():
                kept[name] = _with(value, self._of(known.kept[name], joined, past))
        if past > joined:
            resid = _with(resid, self._of(known.entering[n], joined, past))
        kept = {name: kept.get(name, self._of(value, 0, past)) for name, value in known.kept.items()}
        assert resid is not None
        with self.model.hooks(self._edits(n)):
            seen = tower.leave(resid, kept)
        inner = [torch.cat([seen.inner[i], inner_after[i]]) for i in range(n_inner)]
        return _with(seen.features, after), inner

    def put(self, rows: Sequence[int], resid: Tensor, deepstack: dict[int, Tensor], tokens: Tensor) -> None:
        """Write the features of each row over the base run's, in `resid` and `deepstack` [rows pos d_model]."""
        inputs = self.base.inputs
        for place, i in enumerate(rows):
            at = slice(self.ends[place], self.ends[place + 1])
            resid[i, tokens] = self._packed(self.known.projected, self.projected[at], place, inputs).to(resid)
            for number, (known, fresh) in enumerate(zip(self.known.merged, self.merged, strict=True)):
                stream = deepstack[number + 1]
                stream[i, tokens] = self._packed(known, fresh[at], place, inputs).to(stream)

    def _packed(self, known: Tensor, fresh: Tensor, place: int, inputs: MultimodalInputs) -> Tensor:
        """Return the features of the image tokens of a row: the base run's, but for the images that it edits."""
        whole = known.clone()
        whole[self.held[place]] = fresh
        return pack(self.model, whole, inputs)


def _with(first: Tensor | None, more: Tensor) -> Tensor:
    return more if first is None else torch.cat([first, more])
