"""Attribution patching: activation patching to first order, for every component at the price of one backward.

Replacing a component's activation x by x' moves a metric m by about (x' - x) . dm/dx. The clean run is listened to
once, the corrupted one is run with gradients from the sites on, and one call of `torch.autograd.grad` gives every
site's gradient at once. With `steps`, each site's gradient is averaged along the straight line between both runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from veena_lens.circuits.gradients import (
    PICTURE_SITES,
    TOWER_SITE,
    Places,
    batch_places,
    patches_of,
    products,
    recorded_at,
)
from veena_lens.hook_table import row_of
from veena_lens.inputs import MultimodalInputs
from veena_lens.long_runs import counting
from veena_lens.positions import parse
from veena_lens.scores import ReferenceRuns, Scores
from veena_lens.sweeps.alignment import corresponding, is_each
from veena_lens.sweeps.measuring import (
    effect,
    measure_of,
    padded,
    parts,
    patched_and_source,
    rank_correlation,
    reference_runs,
    require_pairs,
    require_rows,
    side_by_side,
    wide,
)
from veena_lens.sweeps.patching import patch_sweep
from veena_lens.sweeps.plan import require_options
from veena_lens.sweeps.sites import SweepSites, sweep_sites

if TYPE_CHECKING:
    from veena_lens.config import HookedVLMConfig
    from veena_lens.model.model import HookedVLM


class BatchOptions(TypedDict, total=False):
    """How pairs run. max_rows: pairs that run together, default 16. progress: show a bar, default False."""

    max_rows: int
    progress: bool


def _options(who: str, options: Mapping[str, Any]) -> tuple[int, bool]:
    """Return (max_rows, progress). Raises: TypeError for another option; ValueError for max_rows below 1."""
    require_options(who, options, BatchOptions)
    max_rows = options.get("max_rows", 16)
    require_rows(who, max_rows)
    return max_rows, options.get("progress", False)


def _text_sites(
    who: str, cfg: HookedVLMConfig, sites: Any, layers: Sequence[int] | None, units: Sequence[int] | None
) -> SweepSites:
    """Return the sites of an attribution. Raises: ValueError as `sweep_sites`, or for hooks outside the decoder's
    blocks."""
    found = sweep_sites(who, cfg, sites, layers, units)
    for name in found.sites:
        if not name.startswith(("blocks.", "hook_embed")) or not row_of(name).of_text:
            raise ValueError(
                f"{who}: {name!r} is not a hook of the decoder's blocks; `image_attribution` goes to images."
            )
    return found


def attribution_patching(
    model: HookedVLM,
    clean: MultimodalInputs,
    corrupted: MultimodalInputs,
    sites: Any = "heads",
    positions: Any = "last",
    metric: Any = None,
    direction: str = "denoising",
    *,
    steps: int = 0,
    layers: Any = None,
    units: Any = None,
    relative: bool = False,
    **options: Unpack[BatchOptions],
) -> Scores:
    """Estimate the effect of patching each component, to first order: E_c = sum_p (x'_c[p] - x_c[p]) . dm/dx_c[p].

    x is the run that is patched (denoising: the corrupted one, where the gradient is taken), x' the other; p runs over
    `positions`. Denoising estimates m_patched - m_corrupted, noising m_clean - m_patched.

    clean, corrupted: pairs of rows. sites, positions, direction, layers, units: as in `patch_sweep`; sites lie in the
    decoder. metric: as there, or a list with one per pair. steps: 0 takes the gradient of x itself (default); n takes
    integrated gradients, the gradient averaged over the n midpoints of the straight line from x to x' of the whole site
    (all its heads or neurons, at all chosen positions; the rest of the run stays as it is), so that the entries of a
    site add up to the exact effect of patching it whole as n grows, at one forward and backward per step and site.
    relative: divide by clean - corrupted, as `Scores.scores` (NaN where the runs do not differ); default the metric's
    unit. options: see `BatchOptions`.
    Returns Scores with axes in patch_sweep's order, pair always kept: ([site,] pair, layer, head or neuron, pos); pos
    only for positions="each". meta holds the metric of both runs of each pair.
    Raises: ValueError for batches of unequal size, positions that do not correspond, an unknown site or unit, a metric
    that is not one finite number per row or has no gradient; IndexError for a position outside the sequence.
    Source: Nanda 2023, "Attribution patching"; Syed et al. 2023, arXiv 2310.10348; steps: Sundararajan et al. 2017,
    arXiv 1703.01365, and Hanna et al. 2024, arXiv 2403.17806.
    """
    who = "attribution_patching"
    require_pairs(who, clean, corrupted, direction)
    max_rows, progress = _options(who, options)
    _require_steps(who, steps)
    chosen = _text_sites(who, model.cfg, sites, layers, units)
    measure = measure_of(who, model, metric, len(clean))
    each = is_each(positions)
    where = "all" if each else positions
    parse(where)
    base, source = patched_and_source(direction, clean, corrupted)
    here, there = corresponding(base, source, where)
    if each and len({len(p) for p in here}) > 1:
        raise ValueError(f"{who}: positions='each' over several pairs needs prompts of one length; go one by one.")
    if base.shape[1] != source.shape[1] or not torch.equal(base.attention_mask, source.attention_mask):
        keyed = [name for name in chosen.sites if "key_pos" in row_of(name).axis_names]
        if keyed:
            raise ValueError(
                f"{who}: {keyed[0]} has keys at other positions in the source; prompts must be of one length."
            )
    with counting(len(base), "pairs", progress) as advance:
        found, of_base, of_source = [], [], []
        for rows in parts(len(base), max_rows):
            mine, other = (Places(*padded([side[i] for i in rows])) for side in (here, there))
            with torch.no_grad(), recorded_at(model, chosen.sites, other) as theirs:
                of_source.append(measure(source[rows], rows, plain=True))
            plain, terms = products(measure, base[rows], rows, chosen.sites, theirs, mine, steps)
            of_base.append(plain)
            found.append(torch.stack([_summed(term, chosen, mine.exists, each).to(wide(plain)) for term in terms]))
            advance(len(rows))
    runs = reference_runs(direction, torch.cat(of_base), torch.cat(of_source))
    by_pair = effect(torch.cat(found, 1).transpose(0, 1), runs, relative)  # [pair site unit pos]
    unit = chosen.unit or "unit"
    values, axes = by_pair, ["pair", "layer", unit, "pos"]
    labels = {"layer": chosen.layers or [], unit: chosen.units, "pos": list(range(by_pair.shape[-1]))}
    if chosen.layers is None:
        values, axes, labels = by_pair.transpose(0, 1), ["site", "pair", unit, "pos"], labels | {"site": chosen.given}
    drop = {"unit"} | (set() if each else {"pos"})
    kept = tuple(axis for axis in axes if axis not in drop)
    return Scores(
        values[tuple(0 if axis in drop else slice(None) for axis in axes)],
        kept,
        {axis: labels[axis] for axis in kept if axis in labels},
        name="attribution",
        unit="share of the effect" if relative else "metric",
        meta={
            "method": "integrated gradients" if steps else "attribution patching",
            "steps": steps,
            "sites": sites if isinstance(sites, str) else chosen.given,
            "positions": str(positions),
            "direction": direction,
            "clean": runs.clean.tolist(),
            "corrupted": runs.corrupted.tolist(),
        },
    )


def image_attribution(
    model: HookedVLM,
    clean: MultimodalInputs,
    corrupted: MultimodalInputs,
    metric: Any = None,
    direction: str = "denoising",
    *,
    image: int = 0,
    site: str = "hook_image_features",
    deepstack: bool = True,
    steps: int = 0,
    relative: bool = False,
    **options: Unpack[BatchOptions],
) -> Scores:
    """Estimate the effect of patching each patch of an image, to first order, as a map over its token grid.

    E[cell] = sum over its entries of (f' - f) . dm/df.

    clean, corrupted: pairs of rows whose `image`-th images (default the first) have one grid. metric, direction, steps,
    relative, options: as in `attribution_patching`. site: what f is: the image features where they are made
    ("hook_image_features", default) or merged ("hook_embed"), two names of the same numbers, one entry per cell; or the
    tower's patch embeddings ("vision.hook_embed"), which depend on the cell's own pixels alone, whereas features hold
    what the tower's attention carried there from the whole image. deepstack: add, for features, the product for what
    inner tower layers add to early decoder layers (Qwen3-VL), so that the map counts all that the cell brings.
    Returns Scores with axes (pair, height, width), grids of unequal size padded and masked; unit and sign as in
    `attribution_patching`. meta["elsewhere"] is, per pair, what the image's entries outside the grid add (the whole
    view and newlines of a tiled image): map and elsewhere sum to the estimate for the whole image.
    Raises: ValueError for a model or rows without that image, grids that differ, or as `attribution_patching`.
    Source: as `attribution_patching`.
    """
    who = "image_attribution"
    require_pairs(who, clean, corrupted, direction)
    max_rows, progress = _options(who, options)
    _require_steps(who, steps)
    if site not in PICTURE_SITES:
        raise ValueError(f"{who}: site={site!r} must be one of {', '.join(PICTURE_SITES)}.")
    measure = measure_of(who, model, metric, len(clean))
    base, source = patched_and_source(direction, clean, corrupted)
    cfg = model.cfg
    here, there = ([patches_of(who, cfg, side, i, image, site) for i in range(len(side))] for side in (base, source))
    for i in range(len(base)):
        if here[i].grid != there[i].grid or len(here[i].places) != len(there[i].places):
            raise ValueError(
                f"{who}: the images of pair {i} have grids {here[i].grid} and {there[i].grid}; "
                "patches correspond only on one grid. Give both images one size."
            )
    inner = range(cfg.n_deepstack if deepstack and site != TOWER_SITE else 0)
    sites = [site, *(f"deepstack.{i}.hook_out" for i in inner)]
    with counting(len(base), "pairs", progress) as advance:
        found: list[Tensor] = []
        of_base, of_source = [], []
        for rows in parts(len(base), max_rows):
            mine, other = (
                batch_places(x[rows], [y[i] for i in rows], image) for x, y in ((base, here), (source, there))
            )
            with torch.no_grad(), recorded_at(model, sites, other) as theirs:
                of_source.append(measure(source[rows], rows, plain=True))
            plain, terms = products(measure, base[rows], rows, sites, theirs, mine, steps, together=True)
            of_base.append(plain)
            total = torch.stack([wide(term).sum(-1).to(wide(plain)) for term in terms if term is not None]).sum(0)
            found += [row[keep] for row, keep in zip(total, mine.exists.to(plain.device), strict=True)]
            advance(len(rows))
    runs = reference_runs(direction, torch.cat(of_base), torch.cat(of_source))
    values, mask = side_by_side([patches.map_of(x) for patches, x in zip(here, found, strict=True)])
    whole = torch.stack([x.sum() for x in found])
    values, all_of_it = effect(values, runs, relative), effect(whole, runs, relative)
    elsewhere = all_of_it - values.flatten(1).sum(1)
    return Scores(
        values,
        ("pair", "height", "width"),
        name="image attribution",
        unit="share of the effect" if relative else "metric",
        mask=None if bool(mask.all()) else mask,
        meta={
            "method": "integrated gradients" if steps else "attribution patching",
            "steps": steps,
            "site": site,
            "deepstack": len(sites) > 1,
            "image": image,
            "direction": direction,
            "elsewhere": elsewhere.tolist(),
            "clean": runs.clean.tolist(),
            "corrupted": runs.corrupted.tolist(),
        },
    )


def check_attribution(
    model: HookedVLM,
    clean: MultimodalInputs,
    corrupted: MultimodalInputs,
    sites: Any = "heads",
    positions: Any = "last",
    metric: Any = None,
    direction: str = "denoising",
    *,
    top: int = 30,
    sample: int = 30,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> Scores:
    """Compare the largest entries of `attribution_patching` with their exact effects by `patch_sweep`.

    clean, corrupted, sites, positions, metric, direction: as there. top: how many entries of largest |mean over pairs|
    are checked. sample: how many others, drawn at random by `seed`. progress: show a bar. settings: go to
    `attribution_patching`.
    Returns Scores with axes (pair, entry, method), methods "attribution" and "patching"; entries are named as "layer 3
    head 2"; unit as there. meta: "rank_correlation" (Spearman, of the means over pairs, over all checked entries),
    "rank_correlation_top", "rank_correlation_sample" (over drawn entries alone, free of selection by size; None with
    fewer than three), "sign_agreement" (share of the top entries whose signs agree), "n_top".
    Raises: ValueError for top below 2 or sample below 0, or as both functions.
    """
    who = "check_attribution"
    if top < 2 or sample < 0:
        raise ValueError(f"{who}: top={top} must be at least 2 and sample={sample} at least 0.")
    guess = attribution_patching(model, clean, corrupted, sites, positions, metric, direction, **settings)
    relative = bool(settings.get("relative", False))
    lead = [axis for axis in guess.axes if axis != "pair"]
    table = guess.values.movedim(guess.axes.index("pair"), 0)
    flat = table.flatten(1).double().cpu()
    order = flat.nanmean(0).abs().nan_to_num(-1).argsort(descending=True, stable=True)
    n_top = min(top, len(order))
    drawn = order[n_top:][torch.randperm(len(order) - n_top, generator=torch.Generator().manual_seed(seed))[:sample]]
    entries = torch.cat([order[:n_top], drawn])
    spots = torch.stack(torch.unravel_index(entries, table.shape[1:]), -1).tolist()
    with counting(len(spots) * len(clean), "patches", progress) as advance:
        exact = torch.empty(len(clean), len(spots), dtype=torch.float64)
        metrics = list(metric) if isinstance(metric, (list, tuple)) else [metric] * len(clean)
        for members, call in _sweeps(guess, sites, positions, lead, spots):
            for i in range(len(clean)):
                swept = patch_sweep(
                    model, clean[i], corrupted[i], metric=metrics[i], direction=direction, progress=False, **call
                )
                change = swept.values - patched_and_source(direction, swept.clean, swept.corrupted)[0]
                runs = ReferenceRuns(swept.clean, swept.corrupted, direction)
                exact[i, members] = effect(change.reshape(1, -1), runs, relative)[0].double().cpu()
                advance(len(members))
    both = torch.stack([flat[:, entries], exact], -1)
    mean = both.nanmean(0)
    names = [" ".join(f"{axis} {guess.labels[axis][k]}" for axis, k in zip(lead, spot, strict=True)) for spot in spots]

    def correlation(part: slice) -> float | None:
        found = rank_correlation(mean[part, 0], mean[part, 1])
        return None if len(mean[part]) < 3 or found != found else found

    meta = {
        **guess.meta,
        "n_top": n_top,
        "rank_correlation": correlation(slice(None)),
        "rank_correlation_top": correlation(slice(0, n_top)),
        "rank_correlation_sample": correlation(slice(n_top, None)),
        "sign_agreement": float((mean[:n_top, 0].sign() == mean[:n_top, 1].sign()).double().mean()),
    }
    labels = {"entry": names, "method": ["attribution", "patching"]}
    return Scores(both, ("pair", "entry", "method"), labels, "attribution checked", guess.unit, meta=meta)


def _sweeps(
    guess: Scores, sites: Any, positions: Any, lead: list[str], spots: list[list[int]]
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Yield the entries that one call of patch_sweep checks together (heads or neurons of one layer), and its
    arguments."""
    unit = next((axis for axis in lead if axis in ("head", "neuron")), None)
    groups: dict[tuple[int, ...], list[int]] = {}
    for entry, spot in enumerate(spots):
        groups.setdefault(tuple(k for axis, k in zip(lead, spot) if axis != unit), []).append(entry)
    for members in groups.values():
        label = {axis: guess.labels[axis][k] for axis, k in zip(lead, spots[members[0]])}
        call: dict[str, Any] = {"sites": sites, "positions": label.get("pos", positions)}
        if "site" in label:
            call["sites"] = [label["site"]]
        else:
            call["layers"] = [label["layer"]]
        if unit is not None:
            call["units"] = [guess.labels[unit][spots[entry][lead.index(unit)]] for entry in members]
        yield members, call


def _summed(
    term: Float[Tensor, "batch n ..."] | None, chosen: SweepSites, exists: Bool[Tensor, "batch n"], each: bool
) -> Float[Tensor, "batch unit place"]:
    """Return the entries of one site: summed within a unit, and over positions unless each is kept."""
    if term is None:
        return torch.zeros(len(exists), len(chosen.units), exists.shape[1] if each else 1, device=exists.device)
    term, units = wide(term), [unit for unit in chosen.units if unit is not None]
    if chosen.unit == "head":
        table = term.sum(-1)[..., units]
    elif chosen.unit == "neuron":
        table = term[..., units]
    else:
        table = term.flatten(2).sum(-1, keepdim=True)
    table = torch.where(exists.to(table.device)[..., None], table, torch.zeros_like(table)).transpose(1, 2)
    return table if each else table.sum(-1, keepdim=True)


def _require_steps(who: str, steps: int) -> None:
    if steps < 0 or steps != int(steps):
        raise ValueError(f"{who}: steps={steps} must be 0 (the gradient of the run itself) or a number of points.")
