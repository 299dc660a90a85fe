"""Random controls for chosen heads, neurons and directions: what the same amount of editing does in the same place.

A random set is as large as the chosen one, layer by layer, and shares no unit with it while a layer has others left:
unmatched draws flatter a method, since layers differ more than the units inside one. Neurons can be matched on the
size of what they write, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.config import HookedVLMConfig
from veena_lens.inputs import MultimodalInputs
from veena_lens.interventions.base import require_layer, require_unit
from veena_lens.positions import position_mask
from veena_lens.residual_parts import neuron_rows

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

Unit = tuple[int, int]  # (layer, head) or (layer, neuron)
N_NEAREST = 8  # how many neurons of nearest size a matched one is drawn from


@dataclass(frozen=True)
class RandomUnits(Sequence[list[Unit]]):
    """Random sets of (layer, unit), one list per draw. `crowded`: layers without room to avoid the chosen units, with
    how many of them every draw shares with the chosen set there."""

    draws: tuple[list[Unit], ...]
    kind: str = "head"
    crowded: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, i: Any) -> Any:
        return self.draws[i]

    def __iter__(self) -> Iterator[list[Unit]]:
        return iter(self.draws)

    @property
    def n_distinct(self) -> int:
        """Return the number of different sets among the draws: few where the chosen units leave a layer little
        choice."""
        return len({tuple(sorted(draw)) for draw in self.draws})

    def __repr__(self) -> str:
        size = len(self.draws[0]) if self.draws else 0
        lines = [f"RandomUnits({len(self)} draws of {size} {self.kind}s, {self.n_distinct} distinct)"]
        lines += [
            f"  layer {layer} has too few others: {n} of its chosen {self.kind}s are in every draw"
            for layer, n in self.crowded[:8]
        ]
        return "\n".join(lines)


def random_heads(heads: Sequence[Unit], cfg: HookedVLMConfig, draws: int = 20, seed: int = 0) -> RandomUnits:
    """Draw random sets of as many (layer, head) in each layer as `heads` has there, avoiding them where there is room.

    A layer without room gives all its other heads and fills up with chosen ones; `.crowded` and the repr say so.

    Args:
        heads: the chosen (layer, head).
        cfg: the model's configuration.
        draws: how many sets.
        seed: of the draws.

    Raises: ValueError for no heads, one twice or outside the model, or no draws."""
    return _random_units(heads, cfg, cfg.n_heads, "head", draws, seed, None)


def random_neurons(
    neurons: Sequence[Unit],
    cfg: HookedVLMConfig,
    draws: int = 20,
    seed: int = 0,
    sizes: Float[Tensor, "layer d_mlp"] | None = None,
) -> RandomUnits:
    """Draw random sets of as many (layer, neuron) in each layer as `neurons` has there, avoiding them where there is
    room.

    sizes: what each neuron writes, as `neuron_sizes` gives it. Then each chosen neuron has its counterpart among the
    8 others of its layer that are nearest in log size and not yet taken. The rest as in `random_heads`.
    Raises: ValueError for no neurons, one twice or outside the model, no draws, or sizes of another shape."""
    if sizes is not None and tuple(sizes.shape) != (cfg.n_layers, cfg.d_mlp):
        raise ValueError(f"random_neurons: sizes must be [{cfg.n_layers} {cfg.d_mlp}], not {list(sizes.shape)}.")
    return _random_units(neurons, cfg, cfg.d_mlp, "neuron", draws, seed, sizes)


@torch.no_grad()
def neuron_sizes(model: HookedVLM, inputs: MultimodalInputs, positions: Any = "last") -> Float[Tensor, "layer d_mlp"]:
    """Return how much each neuron writes: mean |a_n| over the chosen positions of all rows, times ||W_out[n]||.

    Raises: ValueError where `positions` select nothing."""
    prepared = model.as_inputs(inputs)
    at = position_mask(prepared, positions)
    if not bool(at.any()):
        raise ValueError(f"neuron_sizes: positions {positions!r} select nothing in {prepared!r}.")
    means: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        means[hook.name] = activation[at.to(activation.device)].abs().float().mean(0).cpu()

    names = [f"blocks.{layer}.mlp.hook_post" for layer in range(model.cfg.n_layers)]
    model.run_with_hooks(prepared, return_type=None, fwd_hooks=[(name, keep) for name in names])
    written = [neuron_rows(block).detach().float().norm(dim=-1).cpu() for block in model.blocks]
    return torch.stack([means[name] * norm for name, norm in zip(names, written, strict=True)])


def random_directions(
    direction: Float[Tensor, "*layer d_model"], draws: int = 20, seed: int = 0
) -> Float[Tensor, "draw *layer d_model"]:
    """Draw random directions with the norms of the given one (of each layer's), uniform on the sphere.

    Args:
        direction: one vector, or one per layer.
        draws: how many directions.
        seed: of the draws.

    Raises: ValueError for no draws."""
    _require_draws("random_directions", draws)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(draws, *direction.shape, generator=generator, dtype=torch.float64)
    unit = noise / noise.norm(dim=-1, keepdim=True)
    return (unit * direction.detach().cpu().double().norm(dim=-1, keepdim=True)).to(direction)


def _random_units(
    units: Sequence[Unit],
    cfg: HookedVLMConfig,
    n: int,
    kind: str,
    draws: int,
    seed: int,
    sizes: Tensor | None,
) -> RandomUnits:
    who = f"random_{kind}s"
    _require_draws(who, draws)
    chosen = [
        (require_layer(int(layer), cfg.n_layers, who), require_unit(int(unit), n, who, kind)) for layer, unit in units
    ]
    if not chosen:
        raise ValueError(f"{who}: the list of {kind}s is empty; there is nothing to match.")
    twice = [unit for unit, count in Counter(chosen).items() if count > 1]
    if twice:
        raise ValueError(f"{who}: {kind}s {twice[:5]} are listed more than once.")
    layers: dict[int, list[int]] = {}
    for layer, unit in sorted(chosen):
        layers.setdefault(layer, []).append(unit)
    generator = torch.Generator().manual_seed(seed)
    found = [
        [
            (layer, unit)
            for layer, mine in layers.items()
            for unit in _one_layer(mine, n, generator, None if sizes is None else sizes[layer])
        ]
        for _ in range(draws)
    ]
    crowded = tuple((layer, 2 * len(mine) - n) for layer, mine in layers.items() if 2 * len(mine) > n)
    return RandomUnits(tuple(found), kind, crowded)


def _one_layer(mine: list[int], n: int, generator: torch.Generator, sizes: Tensor | None) -> list[int]:
    """Return as many units as `mine`, others first."""
    taken = set(mine)
    others = [unit for unit in range(n) if unit not in taken]
    short = len(mine) - len(others)
    if short > 0:
        return sorted(others + _pick(mine, short, generator))
    if sizes is None:
        return sorted(_pick(others, len(mine), generator))
    log = sizes.double().clamp(min=torch.finfo(torch.float32).tiny).log()
    found = []
    for unit in _pick(mine, len(mine), generator):  # in random order: none always chooses last
        distance = (log[others] - log[unit]).abs()
        nearest = distance.argsort(stable=True)[:N_NEAREST]
        place = int(nearest[_index(len(nearest), generator)])
        found.append(others.pop(place))
    return sorted(found)


def _pick(units: list[int], k: int, generator: torch.Generator) -> list[int]:
    order = torch.randperm(len(units), generator=generator)[:k]
    return [units[i] for i in order.tolist()]


def _index(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (1,), generator=generator))


def _require_draws(who: str, draws: int) -> None:
    if draws < 1:
        raise ValueError(f"{who}: draws={draws} must be at least 1.")
