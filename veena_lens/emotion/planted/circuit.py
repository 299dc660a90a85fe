"""A planted circuit: a model whose emotion circuit is known, because it was written into it.

The decoder's weights are drawn anew, so that nothing of the trained circuit is left; tower and connector stay, so that
images still carry their emotion to the image tokens. Then, and only there,
1. chosen heads write one direction u_e per emotion: W_O[h] += w_e u_e^T, w_e fitted (ridge) so that the change of the
   head's z between twins, seen through w_e, is 1 on pairs of e and 0 on others. Nothing else writes along any u_e.
2. as many decoy heads get weights of the same norm, on what hardly changes between twins, along other directions.
3. chosen later neurons read u_e and write the words of e, and the model names the emotion. Decoy neurons again.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from veena_lens.circuits.reading import read
from veena_lens.emotion.methods import batches, prepared

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

Unit = tuple[int, int]  # (layer, head) or (layer, neuron)
_WHO = "plant_circuit"
_LOUD = 4.0  # what a planted neuron's gate sees in the mean on images of its emotion
_SHARP = 3.0  # how much wider queries and keys are drawn than trained: heads then differ in where they look


@dataclass(frozen=True, eq=False, kw_only=True)
class Plant:
    """A model and the circuit written into it.

    `heads` with the emotions that each serves; `decoys`, heads as heavy that are blind to emotion; `neurons` with the
    emotion that each names; `directions` u_e; the `layer` where all heads have written. `gain`: the direct projection
    on u_e for a pair of e, in units of the residual stream; `natural`: how far twins differ there without the plant.
    """

    model: HookedVLM
    heads: Mapping[Unit, tuple[str, ...]]
    decoys: list[Unit]
    neurons: Mapping[Unit, str]
    emotions: list[str]
    directions: Float[Tensor, "emotion d_model"]
    layer: int
    strength: float
    gain: float
    natural: float
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def general(self) -> list[Unit]:
        """Return the heads that serve every emotion."""
        return [head for head, served in self.heads.items() if len(served) == len(self.emotions)]

    def __repr__(self) -> str:
        heads = ", ".join(
            f"L{a}H{h} ({'all' if (a, h) in self.general else '+'.join(e)})" for (a, h), e in self.heads.items()
        )
        return (
            f"Plant: heads {heads}; {len(self.neurons)} neurons; push {self.gain:.3g} at layer {self.layer}, "
            f"{self.strength:g} times how far twins differ anyway"
        )


def plant_circuit(
    model: HookedVLM,
    pairs: Sequence[Any],
    words: Mapping[str, Sequence[str]],
    *,
    general: int = 3,
    specific: int = 1,
    neurons: int = 2,
    layer: int | None = None,
    strength: float | int = 1.0,
    seed: int = 0,
    scramble: bool = True,
    batch_size: int = 16,
) -> Plant:
    """Return a copy of the model with a circuit for the emotions of `words` (emotion -> its words, single tokens).

    `general` heads serve all emotions, `specific` heads per emotion one alone; `neurons` per emotion name it. Heads lie
    in layers 1 .. `layer` (default: the middle), one of them in `layer`; neurons after it. The projection on u_e for a
    pair of e is `strength` times the mean norm of what twins differ by there anyway.

    Args:
        model: the model that is copied.
        pairs: emotional images with their neutral twins.
        words: the words of each emotion, single tokens.
        general, specific, neurons: how many of each are planted, as above.
        layer: the last layer of planted heads; by default the middle.
        strength: of the projection, as above.
        seed: of every draw.
        scramble: draw the decoder anew.
        batch_size: pairs in a batch.

    Raises: ValueError for too little room, an emotion without pairs, words that are no tokens, or a model whose norms
    follow attention and MLP.
    """
    emotions = list(words)
    key: int = model.cfg.n_layers // 2 if layer is None else layer
    n_heads = general + specific * len(emotions)
    _require_room(model, pairs, emotions, key, n_heads, neurons, strength)
    model = copy.deepcopy(model)
    rng, generator = random.Random(f"plant {seed}"), torch.Generator().manual_seed(seed)
    if scramble:
        _scramble(model, generator)
    mine = [pair for pair in pairs if pair.emotion in words]
    served = [tuple(emotions)] * general + [(e,) for e in emotions for _ in range(specific)]
    places = [(a, h) for a in range(1, key) for h in range(model.cfg.n_heads)]
    last = (key, rng.randrange(model.cfg.n_heads))
    drawn = rng.sample(places, min(len(places), 2 * n_heads - 1))
    heads = dict(zip([last, *drawn[: n_heads - 1]], rng.sample(served, n_heads), strict=True))
    decoys = drawn[n_heads - 1 :]
    spots = [(a, n) for a in range(key + 1, model.cfg.n_layers) for n in range(model.cfg.d_mlp)]
    named = [e for e in emotions for _ in range(neurons)]
    chosen = dict(zip(rng.sample(spots, len(named)), named, strict=True))

    twins = _Twins.of(model, mine, batch_size)
    every = range(model.cfg.n_layers)
    plus, minus = (twins.states(side, "hook_resid_post", every) for side in ("emotional", "neutral"))
    natural = float((plus - minus)[key].norm(dim=-1).mean())
    unembed = {e: _word_direction(model, words[e]) for e in emotions}
    u = _fresh_directions(len(emotions), torch.cat([minus.mean(1), torch.stack(list(unembed.values()))]), generator)
    _silence(model, u)
    _plant_heads(twins, heads, decoys, emotions, u, float(strength) * natural, generator)
    _plant_neurons(twins, chosen, emotions, u, unembed, generator)
    return Plant(
        model=model,
        heads=dict(sorted(heads.items())),
        decoys=sorted(decoys),
        neurons=dict(sorted(chosen.items())),
        emotions=emotions,
        directions=u,
        layer=key,
        strength=float(strength),
        gain=float(strength) * natural,
        natural=natural,
        meta={"seed": seed, "scramble": scramble, "pairs": len(mine)},
    )


def _require_room(
    model: HookedVLM,
    pairs: Sequence[Any],
    emotions: Sequence[str],
    layer: int,
    heads: int,
    neurons: int,
    strength: float,
) -> None:
    cfg = model.cfg
    if cfg.post_norms:
        raise ValueError(
            f"{_WHO}: a planted head or neuron writes one direction; this model norms what its attention and MLP give "
            "before it joins the residual, all heads together. Plant in a model without such norms."
        )
    if not 1 < layer < cfg.n_layers - 1:
        raise ValueError(f"{_WHO}: layer={layer} must leave a layer before and after it, 2 .. {cfg.n_layers - 2}.")
    if not 1 <= heads <= (layer - 1) * cfg.n_heads:
        raise ValueError(f"{_WHO}: {heads} heads do not fit layers 1 .. {layer} of {cfg.n_heads} heads each.")
    if len(emotions) * neurons > (cfg.n_layers - layer - 1) * cfg.d_mlp or neurons < 1:
        raise ValueError(f"{_WHO}: neurons={neurons} an emotion do not fit after layer {layer}.")
    missing = [e for e in emotions if not any(pair.emotion == e for pair in pairs)]
    if len(emotions) < 2 or missing:
        raise ValueError(f"{_WHO}: needs pairs of two emotions or more; none of {', '.join(missing) or emotions}.")
    if strength < 0:
        raise ValueError(f"{_WHO}: strength={strength} must be 0 or more.")


@torch.no_grad()
def _scramble(model: HookedVLM, generator: torch.Generator) -> None:
    """Draw every matrix of the decoder's blocks anew at its own scale, queries and keys wider."""
    for block in model.blocks:
        parts = [block.attn.v, block.attn.o, block.mlp.up, block.mlp.down]
        parts += [block.mlp.gate] if block.mlp.gate is not None else []
        for part in (*parts, block.attn.q, block.attn.k):
            width = _SHARP if part is block.attn.q or part is block.attn.k else 1.0
            noise = torch.randn(part.weight.shape, generator=generator, dtype=torch.float64)
            part.weight.copy_(noise * part.weight.double().std() * width)


@dataclass(frozen=True, eq=False)
class _Twins:
    """The pairs, with prompts prepared once: planting runs the model over them again and again."""

    model: HookedVLM
    labels: list[str]
    sides: Mapping[str, list[Any]]

    @staticmethod
    def of(model: HookedVLM, pairs: Sequence[Any], batch_size: int) -> _Twins:
        sides = {
            side: [prepared(model, [getattr(pair, side) for pair in some]) for some in batches(pairs, batch_size)]
            for side in ("emotional", "neutral")
        }
        return _Twins(model, [pair.emotion for pair in pairs], sides)

    def states(self, side: str, hook: str, layers: Sequence[int]) -> Float[Tensor, "layer pair ..."]:
        """Return a hook's values at the last prompt token, in float64."""
        names = [f"blocks.{a}.{hook}" for a in layers]
        found = []
        for inputs in self.sides[side]:
            reading = read(inputs, names, "last", self.model, _WHO)
            found.append(torch.stack([reading[name][:, 0].double().cpu() for name in names]))
        return torch.cat(found, 1)

    def of_emotion(self, emotion: str) -> Bool[Tensor, " pair"]:
        return torch.tensor([label == emotion for label in self.labels])


def _word_direction(model: HookedVLM, words: Sequence[str]) -> Float[Tensor, " d_model"]:
    """Return the unit direction in the last residual that raises these words against all others."""
    tokens = [model.to_single_token(f" {word}") for word in words]
    reader = model.unembed.weight.detach().double().cpu()  # [d_vocab d_model]
    direction = (reader[tokens].mean(0) - reader.mean(0)) * model.ln_final.w.detach().double().cpu()
    return direction / direction.norm()


def _fresh_directions(
    n: int, known: Float[Tensor, "known d_model"], generator: torch.Generator
) -> Float[Tensor, "n d_model"]:
    """Return random orthonormal directions, orthogonal to the known ones: the mean states, and what words read."""
    drawn = torch.randn(n, known.shape[1], generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(known.T).Q
    return torch.linalg.qr((drawn - drawn @ basis @ basis.T).T).Q.T.contiguous()


@torch.no_grad()
def _silence(model: HookedVLM, u: Float[Tensor, "emotion d_model"]) -> None:
    """Let no head or neuron write along any u_e."""
    for block in model.blocks:
        for part in (block.attn.o, block.mlp.down):
            weight = part.weight.double()
            at = u.to(weight)
            part.weight.copy_(weight - at.T @ (at @ weight))


@torch.no_grad()
def _plant_heads(
    twins: _Twins,
    heads: Mapping[Unit, tuple[str, ...]],
    decoys: Sequence[Unit],
    emotions: Sequence[str],
    u: Float[Tensor, "emotion d_model"],
    gain: float,
    generator: torch.Generator,
) -> None:
    """Plant heads layer by layer, since planted ones change what later ones see; decoys share the heads' mean
    weight."""
    added: list[float] = []
    target = torch.stack([twins.of_emotion(e) for e in emotions], 1).double()
    for layer in sorted({a for a, _ in heads}):
        plus, minus = (twins.states(side, "attn.hook_z", [layer])[0] for side in ("emotional", "neutral"))
        for head, served in ((h, served) for (a, h), served in heads.items() if a == layer):
            moved = (plus - minus)[:, head]  # [pair d_head]
            ridge = 0.05 * moved.pow(2).sum(0).mean() * torch.eye(moved.shape[1], dtype=torch.float64)
            readers = torch.linalg.solve(moved.T @ moved + ridge, moved.T @ target)  # [d_head emotion]
            weight = twins.model.blocks[layer].attn.W_O[head]  # [d_head d_model], a view
            for i, e in ((i, e) for i, e in enumerate(emotions) if e in served):
                sharers = sum(e in others for others in heads.values())
                seen = (moved @ readers[:, i])[twins.of_emotion(e)].mean().clamp(min=1e-9)
                weight += torch.outer(readers[:, i] * gain / sharers / seen, u[i]).to(weight)
            added.append(float((weight.double() @ u.to(weight).double().T).norm()))
    changes: dict[int, Tensor] = {}
    for layer in sorted({a for a, _ in decoys}):
        plus, minus = (twins.states(side, "attn.hook_z", [layer])[0] for side in ("emotional", "neutral"))
        changes[layer] = plus - minus
    for layer, head in decoys:
        moved = changes[layer][:, head]
        blind = torch.linalg.eigh(moved.T @ moved).eigenvectors[:, : len(emotions)]  # where z changes least
        out = torch.randn(len(emotions), u.shape[1], generator=generator, dtype=torch.float64)
        extra = blind @ (out - out @ u.T @ u)
        weight = twins.model.blocks[layer].attn.W_O[head]
        weight += (extra * (sum(added) / len(added) / extra.norm())).to(weight)


@torch.no_grad()
def _plant_neurons(
    twins: _Twins,
    neurons: Mapping[Unit, str],
    emotions: Sequence[str],
    u: Float[Tensor, "emotion d_model"],
    words: Mapping[str, Float[Tensor, " d_model"]],
    generator: torch.Generator,
) -> None:
    """Plant neurons: gate and input read u_e, the output writes the words of e, together the norm of the last state.

    In each layer as many of the quietest neurons get output weights of the same norm, along nothing in particular."""
    size = twins.states("neutral", "hook_resid_post", [twins.model.cfg.n_layers - 1])[0].norm(dim=-1).mean()
    for layer in sorted({a for a, _ in neurons}):
        here = {n: e for (a, n), e in neurons.items() if a == layer}
        block = twins.model.blocks[layer]
        normed = twins.states("emotional", "ln2.hook_normalized", [layer])[0]
        for neuron, e in here.items():
            direction = u[list(emotions).index(e)]
            seen = (normed @ direction)[twins.of_emotion(e)].mean().clamp(min=1e-6)
            reader = direction / block.ln2.w.detach().double().cpu() * (_LOUD / seen)
            for part in (block.mlp.up, block.mlp.gate):
                if part is not None:
                    part.weight[neuron] = reader.to(part.weight)
        plus, minus = (twins.states(side, "mlp.hook_post", [layer])[0] for side in ("emotional", "neutral"))
        usual = (plus - minus).abs().mean(0).quantile(0.95)  # no louder than the louder ones of the layer
        down = block.mlp.down.weight
        for neuron, e in here.items():
            moved = (plus - minus)[twins.of_emotion(e), neuron].mean().clamp(min=1e-6)
            block.mlp.up.weight[neuron] *= (usual / moved).to(down)
            sharers = sum(other == e for other in neurons.values())
            down[:, neuron] = (words[e] * size / sharers / usual).to(down)
        quiet = [n for n in (plus.abs() + minus.abs()).mean(0).argsort().tolist() if n not in here][: len(here)]
        noise = torch.randn(len(quiet), u.shape[1], generator=generator, dtype=torch.float64)
        noise -= noise @ u.T @ u
        for neuron, direction, like in zip(quiet, noise, here, strict=True):
            down[:, neuron] = (direction / direction.norm() * down[:, like].double().norm().cpu()).to(down)
