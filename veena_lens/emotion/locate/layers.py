"""Key layers: where does putting the emotion's direction into a neutral image's run make the model name it?

alpha * S_l is added to one layer's residual while the model answers about the neutral twin; C is how far the hit rate
then goes from the neutral run's towards the emotional run's. A random direction of the same length is the control, a
dose curve stands instead of one alpha, and answers that are no longer fluent do not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from veena_lens.circuits.statistics import BOUNDS, drawn_weights, mean_interval, ratio_interval
from veena_lens.emotion.enhance import random_controls
from veena_lens.emotion.judge.fluency import FLUENCY, Fluency
from veena_lens.emotion.locate.answer_slot import AnswerPosition
from veena_lens.emotion.methods import batches, prepared
from veena_lens.emotion.study import Study, stage
from veena_lens.emotion.words.wheels import sample_hit
from veena_lens.fingerprints import fingerprint
from veena_lens.interventions import Steer
from veena_lens.interventions.base import require_layer
from veena_lens.long_runs import progress
from veena_lens.positions import listed
from veena_lens.scores import Scores
from veena_lens.sweeps import generation_sweep, steer_sweep
from veena_lens.sweeps.measuring import rank_correlation

if TYPE_CHECKING:
    from veena_lens.emotion.locate.direction_set import Directions

ALPHAS = (0.05, 0.1, 0.2, 0.4)
APART = 0.05  # least difference of the hit rates of emotional and neutral twins


@dataclass(frozen=True, eq=False, kw_only=True)
class KeyLayers:
    """The key layers. `restored`: C = (H~ - H-) / (H+ - H-) with axes (layer, alpha, bound); `control`: the same for
    random directions.

    `by_layer`, `control_by_layer` (layer, bound): averaged over the doses that stay fluent. `crossed` (layer, injected,
    named): share of answers that name each emotion, at the largest fluent dose. `fluency` (layer, alpha): perplexity of
    the answers without emotion words under the untouched model, relative to its own answer. `soft` (layer, alpha): mean
    change of the soft hit; `agreement`: Spearman's correlation of soft and generated changes over layers and doses.
    `best`: the key layer, `band`: (first, last) of the longest run of layers above the control, None where there
    is none. `emotional`, `neutral`: hit rates of the untouched runs.
    """

    restored: Scores
    control: Scores
    by_layer: Scores
    control_by_layer: Scores
    crossed: Scores
    fluency: Scores
    soft: Scores | None
    agreement: float
    best: int
    band: tuple[int, int] | None
    emotional: float
    neutral: float
    n_pairs: int
    meta: dict[str, Any] = field(default_factory=dict)

    def change(self, kind: str = "restored") -> Scores:
        """Return C of another kind.

        kind: "restored", "absolute" (H~ - H-), or "relative" ((H~ - H-) / H-, as the paper words
        it; H- is at least 1 / n, and the number explodes where neutral images give no hits)."""
        gap = self.emotional - self.neutral
        factor = {"restored": 1.0, "absolute": gap, "relative": gap / max(self.neutral, 1 / self.n_pairs)}
        if kind not in factor:
            raise ValueError(f"KeyLayers.change: kind={kind!r} must be one of {', '.join(factor)}.")
        return Scores(self.restored.values * factor[kind], self.restored.axes, self.restored.labels, f"C ({kind})")

    def summary(self) -> Any:
        """Return a table with one row per layer.

        Columns: C with its interval, the control's, and whether the layer lies in the
        band."""
        import pandas as pd

        inside = range(self.band[0], self.band[1] + 1) if self.band else range(0)
        rows = []
        for i, layer in enumerate(self.by_layer.labels["layer"]):
            low, mean, high = self.by_layer.values[i].tolist()
            c_low, c_mean, c_high = self.control_by_layer.values[i].tolist()
            rows.append(
                {"layer": layer, "C": mean, "low": low, "high": high, "control": c_mean, "control_low": c_low}
                | {"control_high": c_high, "in_band": layer in inside}
            )
        return pd.DataFrame(rows)

    def plot(self, **settings: Any) -> Any:
        """Plot C over layers, with its interval."""
        return self.by_layer.plot(**settings)

    def __repr__(self) -> str:
        band = "none above the control" if self.band is None else f"{self.band[0]} to {self.band[1]}"
        i = list(self.by_layer.labels["layer"]).index(self.best)
        low, mean, high = self.by_layer.values[i].tolist()
        return (
            f"KeyLayers: best layer {self.best} (C {mean:.2f} [{low:.2f}, {high:.2f}]), band {band}; {self.n_pairs} "
            f"pairs, hit rate {self.emotional:.2f} emotional, {self.neutral:.2f} neutral"
        )


@stage(wheels=None, max_new_tokens=24, draws=2000, seed=0, out=None, progress=True)
def key_layers(
    study: Study,
    pairs: Sequence[Any],
    directions: Directions,
    *,
    alphas: Sequence[float | int] = ALPHAS,
    scale: str = "relative",
    positions: str = "last+generated",
    layers: Any = None,
    slot: AnswerPosition | None = None,
    random_directions: int = 5,
    max_rows: int = 256,
) -> KeyLayers:
    """Find the layers where injecting each pair's emotion into its neutral twin brings the hit rate back.

    For every pair, layer and alpha the neutral twin is answered under `directions.steer(layer, alpha, emotion)`, all as
    one batch that shares the image and the prompt; random directions of the same length likewise. Best layer: the
    largest C averaged over fluent doses; band: the longest run of layers whose lower bound lies above the control's
    upper one and whose C is at least half the peak. Intervals draw identities.

    Args:
        study: the model, or a `Study` that holds the settings `wheels` to `progress` below.
        pairs: emotional images with their neutral twins.
        directions: the directions to inject, of this model.
        alphas: doses, in the unit of `scale`.
        scale: "relative", "raw" or "unit", as in `Directions.steer`.
        positions: where the direction is added.
        layers: the layers to try; by default all.
        slot: also measure the soft hit there (log odds); by default not.
        random_directions: control directions, taken in turn over the pairs.
        max_rows: rows of one batch of continuations.
        wheels: emotion wheels that judge answers; by default the project's own.
        max_new_tokens: the longest answer, in tokens.
        draws, seed: of the intervals; the seed is that of the random directions too.
        out: a folder where results are kept pair by pair, and from which the same search resumes.
        progress: True shows progress bars.

    Raises: ValueError for no pairs, unknown layers, or, before anything is injected, hit rates of emotional and neutral
    twins less than 0.05 apart.

    Source: Zhang et al. 2026, arXiv 2605.21980 (injection, relative change); C towards the emotional run, control, dose
    curve and fluency rule are ours.
    """
    model, pairs = study.model, list(pairs)
    chosen = listed(layers, model.cfg.n_layers, "key_layers: layers")
    if not pairs or not chosen or not len(alphas):
        raise ValueError(f"key_layers: {len(pairs)} pairs, layers {chosen}, alphas {list(alphas)}: none may be empty.")
    chosen = [require_layer(layer, model.cfg.n_layers, "key_layers") for layer in chosen]
    if random_directions < 1:
        raise ValueError(f"key_layers: random_directions={random_directions} must be at least 1.")
    directions.check(model)
    directions.vectors(scale)
    for emotion in dict.fromkeys(pair.emotion for pair in pairs):
        directions.of(emotion)
    plan = _Injection(
        study=study, directions=directions, layers=chosen, alphas=list(alphas), scale=scale, positions=positions,
        slot=slot, fluency=Fluency(model, [*directions.emotions, "neutral"], study.wheels), max_rows=max_rows,
    )  # fmt: skip
    noise = F.normalize(
        random_controls.random_directions(directions.overall.float(), random_directions, study.seed), dim=-1
    )
    plain = _plain(study, pairs)
    emotional, neutral = (
        sum(sample_hit(said[i], p.emotion, study.wheels) for p, said in zip(pairs, plain, strict=True)) / len(pairs)
        for i in (0, 1)
    )
    if emotional - neutral < APART:
        raise ValueError(
            f"key_layers: the hit rate is {emotional:.2f} on emotional and {neutral:.2f} on neutral images: less "
            f"than {APART} apart there is nothing to restore. Check the question, or whether the model sees the "
            "images."
        )
    settings = {"alphas": plan.alphas, "scale": scale, "positions": positions, "layers": chosen, "seed": study.seed}
    settings |= {"tokens": study.asking.max_new_tokens, "random": random_directions, "slot": fingerprint(slot)}
    injected = study.each(
        "key layers: pairs",
        range(len(pairs)),
        lambda i: _inject(plan, pairs[i], plain[i][1], noise[i % random_directions]),
        name=lambda i: [pairs[i], i % random_directions],
        **settings,
        skip=sorted(plan.fluency.skip),
        directions=directions,
    )
    found = [{"plain": said} | one for said, one in zip(plain, injected, strict=True)]
    return _judged(plan, pairs, found, settings)


def _plain(study: Study, pairs: Sequence[Any]) -> list[tuple[str, str]]:
    """Return what the untouched model says of both twins of every pair."""
    store = study.store("twins", tokens=study.asking.max_new_tokens)
    asked = study.but(batch_size=16)
    found: list[tuple[str, str]] = []
    for some in progress(batches(pairs, 8), "key layers: twins", study.progress, total=len(pairs), size=len):
        both = [side for pair in some for side in (pair.emotional, pair.neutral)]
        said = store.do(some, lambda both=both: {"texts": asked.answers(both)})["texts"]
        found += list(zip(said[::2], said[1::2], strict=True))
    return found


@dataclass(frozen=True, eq=False, kw_only=True)
class _Injection:
    """What is injected into every pair's neutral twin, and how: layers times alphas, with one control each."""

    study: Study
    directions: Directions
    layers: list[int]
    alphas: list[float | int]
    scale: str
    positions: str
    slot: AnswerPosition | None
    fluency: Fluency
    max_rows: int


def _inject(plan: _Injection, pair: Any, plain: str, units: Float[Tensor, "layer d_model"]) -> dict[str, Any]:
    """Answer one pair's neutral twin under each injection, with soft hits where there is a slot."""
    model, how = plan.study.model, {"emotion": pair.emotion, "scale": plan.scale}
    real = [
        plan.directions.steer(layer, alpha, positions=plan.positions, **how)
        for layer in plan.layers
        for alpha in plan.alphas
    ]
    fake = []
    for steer in real:
        length = steer.vector.norm()
        fake.append(Steer(steer.layer, units[steer.layer].to(steer.vector) * length, steer.alpha, plan.positions))
    inputs = prepared(model, [pair.neutral])
    entries = [[s] for s in (*real, *fake)]
    sweep = generation_sweep(
        model, inputs, entries, max_new_tokens=plan.study.asking.max_new_tokens, max_rows=plan.max_rows, progress=False
    )
    texts = sweep.texts[0]
    n = len(real)
    result: dict[str, Any] = {
        "texts": texts[:n],
        "random": texts[n:],
        "fluency": plan.fluency.changes([pair.neutral] * n, texts[:n], [plain] * n),
    }
    if plan.slot is not None:
        begun = prepared(model, [pair.neutral], lead_in=plan.slot.lead_in)
        vectors = torch.zeros(model.cfg.n_layers, model.cfg.d_model)
        for layer in plan.layers:
            one = plan.directions.steer(layer, 1.0, **how)
            vectors[layer] = (one.alpha * one.vector).float().cpu()
        metric = plan.slot.metric(pair.emotion)
        swept = steer_sweep(
            model, begun, vectors, metric, plan.alphas, plan.positions, layers=plan.layers, progress=False
        )
        result["soft"] = (swept.values - swept.corrupted).double().reshape(len(plan.layers), len(plan.alphas))
    return result


def _judged(
    plan: _Injection, pairs: Sequence[Any], found: Sequence[dict[str, Any]], settings: dict[str, Any]
) -> KeyLayers:
    """Return hit rates, C with intervals, and the choice of layers, from what the model said."""
    study, layers, alphas = plan.study, plan.layers, plan.alphas
    shape = (len(pairs), len(layers), len(alphas))

    def hits(name: str) -> Tensor:
        rows = [[sample_hit(t, p.emotion, study.wheels) for t in f[name]] for p, f in zip(pairs, found, strict=True)]
        return torch.tensor(rows, dtype=torch.float64)

    plain, real, fake = hits("plain"), hits("texts").view(shape), hits("random").view(shape)
    emotional, neutral = plain[:, 0].mean().item(), plain[:, 1].mean().item()
    gap = plain[:, 0] - plain[:, 1]
    weights = drawn_weights([p.identity for p in pairs], study.draws, study.seed)
    base = plain[:, 1][:, None, None]
    fluency = torch.stack([f["fluency"] for f in found]).view(shape).mean(0).exp()
    fluent = fluency <= FLUENCY
    if not bool(fluent.any()):
        raise ValueError(
            f"key_layers: at every layer and alpha {alphas} the answers' perplexity rises by more than "
            f"{FLUENCY - 1:.0%} (least: {float(fluency.min()):.2f} times); try smaller alphas."
        )
    usable = torch.where(fluent, 1.0, torch.nan)

    def averaged(x: Tensor) -> Tensor:
        return ratio_interval((x - base).mul(usable).nanmean(-1), gap, weights)

    by_layer, control = averaged(real), averaged(fake)
    best, band = _choose(by_layer, control, layers)
    labels = {"layer": layers, "alpha": [float(a) for a in alphas]}
    bounds, per_layer = labels | {"bound": list(BOUNDS)}, {"layer": layers, "bound": list(BOUNDS)}
    soft, agreement = None, math.nan
    if "soft" in found[0]:
        change = torch.stack([f["soft"] for f in found]).mean(0)
        soft = Scores(change, ("layer", "alpha"), labels, "change of the soft hit", "log odds")
        agreement = rank_correlation(change.flatten(), (real - base).mean(0).flatten())
    axes = ("layer", "alpha", "bound")
    return KeyLayers(
        restored=Scores(ratio_interval(real - base, gap, weights), axes, bounds, "C"),
        control=Scores(ratio_interval(fake - base, gap, weights), axes, bounds, "C of random directions"),
        by_layer=Scores(by_layer, ("layer", "bound"), per_layer, "C"),
        control_by_layer=Scores(control, ("layer", "bound"), per_layer, "C of random directions"),
        crossed=_crossed(plan, pairs, found, fluent),
        fluency=Scores(fluency, ("layer", "alpha"), labels, "perplexity", "ratio"),
        soft=soft,
        agreement=agreement,
        best=best,
        band=band,
        emotional=emotional,
        neutral=neutral,
        n_pairs=len(pairs),
        meta=settings
        | {
            "neutral": mean_interval(plain[:, 1], weights).tolist(),
            "emotional": mean_interval(plain[:, 0], weights).tolist(),
        },
    )


def _choose(
    by_layer: Float[Tensor, "layer 3"], control: Float[Tensor, "layer 3"], layers: Sequence[int]
) -> tuple[int, tuple[int, int] | None]:
    """Return the best layer (the first of equals), and the longest run of layers above the control and half the
    peak."""
    mean = by_layer[:, 1].nan_to_num(-math.inf)
    best = int(mean.argmax())
    above = (by_layer[:, 0] > control[:, 2]) & (mean >= mean[best] / 2)
    longest, start = (0, 0), 0
    for i in range(len(layers) + 1):
        if i == len(layers) or not bool(above[i]):
            longest, start = max(longest, (i - start, -start)), i + 1
    length, first = longest[0], -longest[1]
    return layers[best], (layers[first], layers[first + length - 1]) if length else None


def _crossed(plan: _Injection, pairs: Sequence[Any], found: Sequence[dict[str, Any]], fluent: Tensor) -> Scores:
    """Return the share of answers that name each emotion when each is injected, at each layer's largest fluent dose."""
    layers, alphas, wheels = plan.layers, plan.alphas, plan.study.wheels
    n_alphas = fluent.shape[1]
    names = list(plan.directions.emotions)
    counts = torch.zeros(len(layers), len(names), len(names), dtype=torch.float64)
    totals = torch.zeros(len(names), dtype=torch.float64)
    wanted = [wheels.basic(name) or name for name in names]
    for pair, one in zip(pairs, found, strict=True):
        row = names.index(pair.emotion)
        totals[row] += 1
        for i in range(len(layers)):
            doses = fluent[i].nonzero().flatten()
            if not len(doses):
                continue
            largest = max(doses.tolist(), key=lambda dose: alphas[dose])
            named = wheels.emotions(one["texts"][i * n_alphas + largest])
            for column, name in enumerate(wanted):
                counts[i, row, column] += name in named
    values = counts / totals[None, :, None]
    labels = {"layer": layers, "injected": names, "named": names}
    exists = (totals > 0)[None, :, None] & fluent.any(1)[:, None, None]
    return Scores(
        values.nan_to_num(0), ("layer", "injected", "named"), labels, "named", "share", mask=exists.expand(values.shape)
    )
