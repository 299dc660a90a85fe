"""Which sites, units and positions a sweep visits, in the order of its axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veena_lens.hook_table import hooks_of, require_hook, row_of
from veena_lens.interventions.base import HEAD_AXES, require_unit
from veena_lens.sweeps.pictures import is_picture_site

KINDS = {
    "heads": ("attn.hook_z", "head"),
    "resid": ("hook_resid_pre", None),
    "attn_out": ("hook_attn_out", None),
    "mlp_out": ("hook_mlp_out", None),
    "neurons": ("mlp.hook_post", "neuron"),
}


class Layout:
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
                "patch_sweep: sites on pictures and in the text count other positions; sweep them one after another, "
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
    """A hook on pictures or inside the decoder's blocks; the merged embedding is what enters block 0."""
    if name == "hook_embed":
        return "blocks.0.hook_resid_pre"
    if name.startswith(("ln_final.", "unembed.")):
        raise ValueError(
            f"patch_sweep patches hooks of the decoder's blocks, hook_embed and hooks on pictures, not {name!r}."
        )
    return name
