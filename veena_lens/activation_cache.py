"""Activations of a run by hook name: transformer_lens's ActivationCache that knows where the images are.

Adds positions ("last", "query", "image"), image grids, saving without pickle, and errors that say what the
cache lacks. Vision activations have images on their first axis, so batch operations leave them alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformer_lens import utilities as tl
from transformer_lens.utilities import Slice

from veena_lens.hook_table import axes_of, canonical, near_names, row_of
from veena_lens.images.dynamic import raster_order
from veena_lens.input_files import PREFIX, describe_inputs, input_tensors, restore_inputs
from veena_lens.inputs import MultimodalInputs
from veena_lens.long_runs import save_tensors
from veena_lens.own_files import opened, require_words, tensors_of, words_of
from veena_lens.positions import padded_places, position_mask
from veena_lens.residual_parts import ResidualParts


class MissingActivation(KeyError):
    """Raised where the cache does not hold an activation that was asked for."""

    def __str__(self) -> str:
        return str(self.args[0])


class ActivationCache(ResidualParts):
    """`cache["resid_post", 5]`, `cache["blocks.5.attn.hook_z"]`, `cache["vision.blocks.3.attn.hook_pattern"]`.

    `inputs` is what the model ran on; `at` and `image_grid` need it. `attn.hook_result` is computed when it is asked
    for, where the run did not store it.
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: Any = None,
        has_batch_dim: bool = True,
        inputs: MultimodalInputs | None = None,
    ) -> None:
        super().__init__(cache_dict, model, has_batch_dim=has_batch_dim)
        self.inputs = inputs

    def __getitem__(self, key: Any) -> Tensor:
        name = self._full_name(key)
        if name not in self.cache_dict:
            made = self._head_outputs(name)
            if made is not None:
                return made
            hint = near_names(name, self.cache_dict) or f"; it holds {len(self)} activations, see .keys()"
            raise MissingActivation(f"The cache holds no {name!r}{hint}. Name it in names_filter to cache it.")
        return self.cache_dict[name]

    def _head_outputs(self, name: str) -> Tensor | None:
        """Return heads' outputs in the residual stream, which are large, of `hook_z` and the model's W_O; None for
        another name, or where either is missing."""
        z = self._source_of_head_outputs(name)
        if z is None:
            return None
        with torch.no_grad():
            weight = self.model.get_submodule(name.removesuffix(".hook_result")).W_O
            return torch.einsum("...hd,hdm->...hm", z, weight.to(z))

    def _source_of_head_outputs(self, name: str) -> Tensor | None:
        """Return the `hook_z` that an `attn.hook_result` can be computed of."""
        is_asked = name.endswith(".attn.hook_result") and self.model is not None
        return self.cache_dict.get(name.removesuffix("hook_result") + "hook_z") if is_asked else None

    def __contains__(self, key: object) -> bool:
        name = self._full_name(key)
        return name in self.cache_dict or self._source_of_head_outputs(name) is not None

    def _full_name(self, key: Any) -> str:
        """Return the hook name of a key: a full name, a short name, or (short name, layer[, layer type])."""
        if isinstance(key, str):
            return key if key in self.cache_dict else canonical(tl.get_act_name(key))
        name, *rest = key
        if rest and isinstance(rest[0], int) and rest[0] < 0:
            rest[0] += self._n_layers()
        return canonical(tl.get_act_name(name, *rest))

    def _n_layers(self) -> int:
        if self.model is not None:
            return self.model.cfg.n_layers
        found = [int(n.split(".")[1]) for n in self.cache_dict if n.startswith("blocks.")]
        return max(found, default=-1) + 1

    # --- batch operations ----------------------------------------------------------------------------
    def _is_text(self, name: str) -> bool:
        try:
            return row_of(name).of_text
        except ValueError:
            return True

    def _batch_size(self) -> int:
        return next((len(v) for n, v in self.cache_dict.items() if self._is_text(n)), 1)

    def remove_batch_dim(self, batch_size: int | None = None) -> ActivationCache:
        """Drop the batch axis of a single row, in place, and return the cache; activations of images keep theirs.

        Raises: ValueError where there are other than one row."""
        if not self.has_batch_dim:
            return self
        n = self._batch_size() if batch_size is None else batch_size
        if n != 1:
            raise ValueError(f"remove_batch_dim asks for one row; the cache has {n}.")
        for name, value in self.cache_dict.items():
            if self._is_text(name):
                self.cache_dict[name] = value[0]
        self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> ActivationCache:
        """Return the cache of some rows, with the images that they own.

        Raises: ValueError for a cache without batch axis."""
        if not self.has_batch_dim:
            raise ValueError("This cache has no batch axis to slice.")
        chosen = batch_slice if isinstance(batch_slice, Slice) else Slice(batch_slice)
        rows = torch.arange(self._batch_size())[chosen.slice]
        kept = [int(rows)] if rows.ndim == 0 else rows.tolist()
        inputs = self.inputs[torch.tensor(kept)] if self.inputs is not None else None
        new: dict[str, Tensor] = {}
        for name, value in self.cache_dict.items():
            if self._is_text(name):
                new[name] = chosen.apply(value, dim=0)
            elif self.inputs is not None:
                owner = self._owners(name, len(value))
                places = [i for row in kept for i in (owner == row).nonzero().flatten().tolist()]
                new[name] = _shortened(name, value[places], inputs)
            else:
                new[name] = value
        return ActivationCache(new, self.model, has_batch_dim=chosen.mode != "int", inputs=inputs)

    def _owners(self, name: str, n: int) -> Tensor:
        """Return the row that owns each entry of an image activation's first axis."""
        assert self.inputs is not None
        if row_of(name).of_features:
            return self.inputs.image_mask.nonzero()[:, 0].cpu()
        owners = self.inputs.crop_rows
        return torch.zeros(n, dtype=torch.long) if owners is None else owners.cpu()

    # --- positions -----------------------------------------------------------------------------------
    def _need_inputs(self, asked: str) -> MultimodalInputs:
        if self.inputs is None:
            raise ValueError(f"{asked} needs the inputs of the run; this cache was sliced or made without them.")
        return self.inputs

    def at(self, positions: Any, name: str, layer: int | None = None) -> Tensor:
        """Return an activation at chosen positions: "last" [batch ...], else [batch n ...], zero-padded at the end.

        positions: any selection. name, layer: as in `cache[name, layer]`. Scores and patterns are picked by query
        position. The returned tensor has an attribute `.mask`, [batch] or [batch n], True where a position exists.
        Raises: MissingActivation; ValueError for an activation on images, or a cache without its inputs.
        """
        inputs = self._need_inputs("cache.at")
        key = name if layer is None else (name, layer)
        full, value = self._full_name(key), self[key]
        axes = axes_of(full)
        if axes[0] != "batch":
            raise ValueError(f"cache.at picks text positions; {full} lies on images: use cache.image_grid.")
        if not self.has_batch_dim:
            value = value[None]
        axis = axes.index("pos") if "pos" in axes else axes.index("query_pos")
        value = value.movedim(axis, 1)
        chosen = position_mask(inputs, positions).to(value.device)
        if positions == "last":
            out = value[torch.arange(len(value), device=value.device), chosen.long().argmax(-1)]
            mask = chosen.any(-1)
        else:
            index, mask = padded_places(chosen)
            rows = torch.arange(len(value), device=value.device)[:, None]
            out = value[rows, index]
            out = out * mask.view(*mask.shape, *[1] * (out.ndim - 2)).to(out.dtype)
            if axis != 1:
                out = out.movedim(1, axis)
        cast(Any, out).mask = mask
        return out

    def image_grid(
        self, name: str, layer: int | None = None, row: int = 0, image: int = 0, query: int | str = "last"
    ) -> Tensor:
        """Return an activation at one image's tokens as a grid: [height width ...].

        name, layer: as in `cache[name, layer]`. row, image: which image. query: for patterns and scores, which give
        [n_heads height width], the position that reads the image, or "last". A vision activation gives the grid of the
        image itself in patches, the class token left out; of tiles, that of the whole view.
        Raises: MissingActivation; IndexError where there is no such image; ValueError for a pattern of the tower, or a
        cache without its inputs.
        """
        inputs = self._need_inputs("cache.image_grid")
        inputs.grid_tokens(row, image)  # raises where there is no such image
        key = name if layer is None else (name, layer)
        full, value = self._full_name(key), self[key]
        axes = row_of(full).axis_names
        height, width = inputs.grids[row][image]
        if axes[0] == "crop":
            return self._crop_grid(value, row, image, full)
        if axes[0] == "n_image_tokens":
            # Features stand in the order of the image tokens that they fill.
            order = inputs.image_mask.flatten().long().cumsum(0).view(inputs.shape) - 1
            cells = inputs.grid_tokens(row, image)
            return value[order[row][cells].to(value.device)]
        if self.has_batch_dim:
            value = value[row]
        tokens = inputs.grid_tokens(row, image).flatten().to(value.device)
        if "key_pos" in axes:
            position = inputs.spans[row].last if query == "last" else int(query)
            return value[:, position, tokens].unflatten(-1, (height, width))
        return value[tokens].unflatten(0, (height, width))

    def _crop_grid(self, value: Tensor, row: int, image: int, name: str) -> Tensor:
        inputs = self._need_inputs("cache.image_grid")
        if inputs.crop_rows is None or inputs.crop_images is None:
            raise ValueError(f"{name}: these inputs hold no images.")
        mine = (inputs.crop_rows == row) & (inputs.crop_images == image)
        crop = int(mine.nonzero().flatten()[0])
        axes = row_of(name).axis_names
        one = value[crop]
        if "query_pos" in axes:
            raise ValueError(f"{name}: a pattern of the tower has two grids; index it directly.")
        if inputs.crop_grids is not None:
            height, width = inputs.grids[row][image]
            if name.startswith("connector."):
                return one[: height * width].unflatten(0, (height, width))
            in_patches = tuple(int(n) for n in inputs.crop_grids[crop].tolist())
            return one[raster_order((in_patches[0], in_patches[1]), in_patches[0] // height).to(one.device)]
        side = int(one.shape[0] ** 0.5)
        extra = one.shape[0] - side * side  # CLIP's class token stands first
        return one[extra:].unflatten(0, (side, side))

    # --- files ---------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> Path:
        """Write the activations, and where the images lie, to one safetensors file, and return its path."""
        path = Path(path)
        tensors = dict(self.cache_dict)
        about: dict[str, Any] = {"has_batch_dim": self.has_batch_dim, "format": "veena_lens.ActivationCache"}
        if self.inputs is not None:
            about["inputs"] = describe_inputs(self.inputs)
            tensors |= input_tensors(self.inputs)
        save_tensors(path, tensors, {"veena_lens": json.dumps(about)})
        return path

    @classmethod
    def load(cls, path: str | Path, model: Any = None, device: str = "cpu") -> ActivationCache:
        """Return the cache that `save` wrote; `model` is only needed for methods that use its weights.

        Raises: FileNotFoundError; ValueError when the file was cut short, or is not such a cache."""
        with opened(path, "an activation cache", device) as f:
            about = words_of(f, "veena_lens", {"format?": str}, path)
            if about.get("format") != "veena_lens.ActivationCache":
                raise ValueError(f"{path} is a safetensors file, but no activation cache of veena_lens.")
            require_words(about, {"has_batch_dim": bool, "inputs?": (None, dict)}, str(path))
            tensors = tensors_of(f)
            inputs = restore_inputs(about.get("inputs"), tensors)
            kept = {n: v for n, v in tensors.items() if not n.startswith(PREFIX)}
            cache = cls(kept, model, has_batch_dim=about["has_batch_dim"], inputs=inputs)
            _require_shapes(cache)
            return cache

    def __repr__(self) -> str:
        size = sum(v.numel() * v.element_size() for v in self.cache_dict.values()) / 2**20
        layers = {n.split(".")[1] for n in self.cache_dict if n.startswith("blocks.")}
        rows = f"{self._batch_size()} rows" if self.has_batch_dim else "one row"
        on_images = sum(not self._is_text(n) for n in self.cache_dict)
        return (
            f"ActivationCache({len(self)} activations, {size:.1f} MiB, {rows}, "
            f"{len(layers)} decoder layers, {on_images} on images)"
        )


def _require_shapes(cache: ActivationCache) -> None:
    """Check that the activations of text have the rows and positions of the inputs. Raises: ValueError, naming one."""
    if cache.inputs is None:
        return
    rows, length = cache.inputs.shape
    for name, value in cache.cache_dict.items():
        axes = axes_of(name)
        if axes[0] != "batch":
            continue
        for axis, found in zip(axes if cache.has_batch_dim else axes[1:], value.shape, strict=False):
            wanted = {"batch": rows, "pos": length, "query_pos": length}.get(axis)
            # Fewer there are where the run kept a slice of positions.
            if wanted is not None and found > wanted:
                raise ValueError(f"{name} has {found} entries along {axis}; its inputs have {wanted}.")


def _shortened(name: str, value: Tensor, inputs: MultimodalInputs | None) -> Tensor:
    """Cut an activation of some images to the longest of them."""
    lengths = None if inputs is None else inputs.crop_lengths(in_tokens=name.startswith("connector."))
    if lengths is None or not len(value):
        return value
    for axis, what in enumerate(row_of(name).axis_names):
        if what in ("pos", "query_pos", "key_pos"):
            value = value.narrow(axis, 0, max(lengths))
    return value


__all__ = ["ActivationCache", "MissingActivation"]
