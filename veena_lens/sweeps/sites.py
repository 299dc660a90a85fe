"""Which hooks, heads, neurons and layers a sweep visits, in the order of its axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from veena_lens.hook_table import hooks_of, require_hook, row_of
from veena_lens.interventions.base import HEAD_AXES, require_unit
from veena_lens.positions import listed

if TYPE_CHECKING:
    from veena_lens.config import HookedVLMConfig

# Name of a group of sites -> the hook in each block, and what is visited one by one there.
KINDS = {
    "heads": ("attn.hook_z", "head"),
    "resid": ("hook_resid_pre", None),
    "attn_out": ("hook_attn_out", None),
    "mlp_out": ("hook_mlp_out", None),
    "neurons": ("mlp.hook_post", "neuron"),
}
STARTS = ("blocks.", "hook_", "vision.", "connector.", "deepstack.")


@dataclass(frozen=True)
class SweepSites:
    """What a sweep visits.

    sites: full names of hooks. given: the same as the caller wrote them. layers: their layers, None for named sites.
    unit: "head" or "neuron" where units are visited one by one, else None. units: their numbers, [None] for whole
    activations.
    """

    sites: list[str]
    given: list[str]
    layers: list[int] | None
    unit: str | None
    units: list[int | None]

    @property
    def on_images(self) -> bool:
        """Return True where the sites lie in the tower, in the connector, or on the features."""
        return not row_of(self.sites[0]).of_text


def sweep_sites(who: str, cfg: HookedVLMConfig, sites: Any, layers: Any, units: Any) -> SweepSites:
    """Return what `sites`, `layers` and `units` name.

    sites: a key of `KINDS`, one hook name, or a list of them. layers: with a key of `KINDS`, default all. units: heads
    or neurons; default all with "heads" and "neurons", whole activations with named sites.
    Raises: ValueError for unknown sites, layers or units, or none of them."""
    if isinstance(sites, str) and sites in KINDS:
        part, unit = KINDS[sites]
        chosen = listed(layers, cfg.n_layers, f"{who}: layers")
        at = [require_unit(i, cfg.n_layers, who, "layer") for i in chosen]
        names = [f"blocks.{i}.{part}" for i in at]
        if units is not None and unit is None:
            raise ValueError(f"units={units}: sites={sites!r} has neither heads nor neurons.")
        wanted: list[int | None] = [None]
        if unit is not None:
            n = cfg.n_heads if unit == "head" else cfg.d_mlp
            wanted = [require_unit(u, n, who, unit) for u in listed(units, n, f"{who}: units")]
        found = SweepSites(names, names, at, unit, wanted)
    else:
        if isinstance(sites, str) and not sites.startswith(STARTS):
            raise ValueError(f"{who}: sites={sites!r}: give one of {', '.join(KINDS)}, or a list of hook names.")
        given = [sites] if isinstance(sites, str) else list(sites)
        names = [require_hook(name, hooks_of(cfg)) for name in given]
        if layers is not None:
            raise ValueError(f"layers={layers} goes with sites such as 'heads'; named sites name their layer.")
        found = SweepSites(names, given, None, None, [None])
        if units is not None:
            unit, wanted = _units_of(who, cfg, names, units)
            found = replace(found, unit=unit, units=wanted)
    if not found.sites or not found.units:
        raise ValueError(f"{who}: no site to visit; layers, units and sites must not be empty.")
    return found


def patchable_sites(found: SweepSites) -> SweepSites:
    """Return the sites as a patched run visits them: the merged embedding is what enters block 0.

    Raises: ValueError for the last norm and the unembedding, or for sites in the text beside others on images."""
    found = replace(found, sites=[_site_before_the_head(name) for name in found.sites])
    if any(row_of(name).of_text == found.on_images for name in found.sites):
        raise ValueError(
            "patch_sweep: sites on images and in the text count other positions; sweep them one after another, "
            f"not {found.sites}."
        )
    return found


def _units_of(who: str, cfg: HookedVLMConfig, sites: Sequence[str], units: Any) -> tuple[str, list[int | None]]:
    """Return ("head" or "neuron", the chosen ones) of named sites. Raises: ValueError where a site has none, or not
    these."""
    kinds: set[str] = set()
    chosen: list[list[int | None]] = []
    for name in sites:
        axes = row_of(name).axis_names
        axis = next((a for a in axes if a in (*HEAD_AXES, "d_mlp")), None)
        if axis is None:
            raise ValueError(f"units={units}: {name} has axes {' '.join(axes)}, neither heads nor neurons.")
        of = cfg.vision if name.startswith("vision.") else cfg
        kinds.add("neuron" if axis == "d_mlp" else "head")
        n = getattr(of, axis)
        chosen.append([require_unit(u, n, f"{who}: {name}", max(kinds)) for u in listed(units, n, f"{who}: units")])
    if len(kinds) > 1 or any(one != chosen[0] for one in chosen):
        raise ValueError(f"units={units} mean other heads or neurons at {', '.join(sites)}; sweep them apart.")
    return kinds.pop(), chosen[0]


def _site_before_the_head(name: str) -> str:
    if name == "hook_embed":
        return "blocks.0.hook_resid_pre"
    if name.startswith(("ln_final.", "unembed.")):
        raise ValueError(
            f"patch_sweep patches hooks of the decoder's blocks, hook_embed and hooks on images, not {name!r}."
        )
    return name
