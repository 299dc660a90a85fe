"""Linear probes: what can be read from the residual stream, layer by layer, in people the probe has never seen.

A probe that meets the same face on both sides of its split learns the face. Splits are therefore by group, checked, and
intervals resample groups; a probe on shuffled labels shows what the number of dimensions alone would give.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens.activation_cache import ActivationCache
from veena_lens.circuits.probe_data import OWN, ProbeData, encoded, own_arguments, own_numbers, site_part
from veena_lens.inputs import MultimodalInputs
from veena_lens.interventions import Steer
from veena_lens.interventions.base import require_unit, require_units
from veena_lens.long_runs import counting
from veena_lens.positions import listed, parse
from veena_lens.scores import Scores
from veena_lens.sweeps.alignment import places_of
from veena_lens.sweeps.measuring import parts, require_rows

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

SMALL = 2**20  # numbers
STATISTICS = ["accuracy", "low", "high", "control", "chance"]


@dataclass(frozen=True, eq=False)
class Probes:
    """`scores` (layer, position, statistic), and for each probe a unit direction of each class.

    Statistics: "accuracy" on groups that were held out, "low" and "high" of its bootstrap interval, "control", the same
    with shuffled labels, "chance", the share of the commonest class. `directions` lie in the activation's own units
    (the scaling is undone): +direction raises that class's logit against the mean of the others.
    """

    scores: Scores
    directions: Float[Tensor, "layer position class width"]
    classes: list[Any]

    @property
    def accuracy(self) -> Scores:
        """Return the held-out accuracy, axes (layer, position)."""
        return self.scores.select(statistic="accuracy")

    def direction(self, label: Any, layer: int, position: Any = None) -> Float[Tensor, " width"]:
        """Return the unit direction of a class at one probe; `position` may be left out where there is one.

        Raises: ValueError for a class, layer or position that was not probed."""
        layers, positions = self.scores.labels["layer"], self.scores.labels["position"]
        position = positions[0] if position is None and len(positions) == 1 else position
        name = position if position is None or isinstance(position, str) else str(position)
        for what, value, known in (
            ("class", label, self.classes),
            ("layer", layer, layers),
            ("position", name, positions),
        ):
            if value not in known:
                raise ValueError(f"Probes: no {what} {value!r}; there are {list(known)}.")
        return self.directions[list(layers).index(layer), list(positions).index(name), self.classes.index(label)]

    def steer(self, label: Any, layer: int, alpha: float | int = 1.0, position: Any = None, **settings: Any) -> Steer:
        """Return a `Steer` along a class's direction, alpha in units of the residual's norm. Probes of resid_post
        only."""
        if self.scores.meta["site"] != "hook_resid_post":
            hint = " (site='resid' says that X holds it)" if self.scores.meta["site"] == OWN else ""
            raise ValueError(f"Probes: these read {self.scores.meta['site']}; Steer adds to hook_resid_post{hint}.")
        return Steer(layer, self.direction(label, layer, position), alpha, **settings)

    def __repr__(self) -> str:
        best, meta = self.accuracy.top(1).to_dict("records")[0], self.scores.meta
        return (
            f"Probes of {meta['site']}: {len(self.classes)} classes, {meta['rows']} rows of {meta['groups']} groups; "
            f"best {best['value']:.2f} at layer {best['layer']}, {best['position']}"
        )


def linear_probes(
    model: Any = None,
    inputs: Any = None,
    labels: Any = None,
    groups: Any = None,
    site: str | None = None,
    positions: Any = "last",
    *,
    X: Any = None,
    y: Any = None,
    layers: Any = None,
    train: Sequence[bool] | None = None,
    folds: int = 5,
    strength: float | int = 1.0,
    controls: int = 3,
    draws: int = 1000,
    seed: int = 0,
    max_rows: int = 32,
    progress: bool = True,
) -> Probes:
    """Fit logistic regressions from one site's activations to the rows' labels, and judge them on groups held out.

    Call it with a model and inputs, `linear_probes(model, inputs, labels, groups)`, or with numbers of one's own,
    `linear_probes(X, y, groups)`, which the keywords X, y and groups name as well.

    Each layer and position has its own probe: multinomial logistic regression with L2 penalty 1 / strength on
    activations standardised by the training side's mean and deviation. Accuracy is the share of held-out rows named
    right; its 95 % interval resamples groups. The control shuffles labels (whole groups where each group has one label,
    else rows) and repeats the same split; its mean is given. Directions come from a probe of all rows (of the training
    rows with `train`).

    inputs: prompts, run in batches of max_rows, or a cache that holds the activations. labels, groups: the class and
    the group (an identity) of each row; rows of one group stay on one side. site: "resid" (hook_resid_post, what
    `Steer` adds to, default), "heads" (all heads' z), "attn_out", "mlp_out", "neurons", or the end of a hook's name in
    a block such as "hook_resid_mid". positions: one selection or a list; several places of a row are averaged. layers:
    default all. X: [items, width], [layers, items, width], or one [items, width] per layer in a dictionary by its name;
    y: the label of each item; groups: its group (range(len(y)) where items are independent). Then layers names an
    array's layers (default 0, 1, ...), or chooses a dictionary's; site="resid" says that X is hook_resid_post, so that
    `Probes.steer` can be used. train: True for rows that are learned from; default `folds` parts of as even size as
    groups allow, each held out once. strength: inverse of the penalty. controls: how often labels are shuffled. draws:
    of the interval. seed: of all draws. progress: show a bar.
    Returns Probes, whose Scores have axes (layer, position, statistic), values being shares of rows; meta: rows,
    groups, counts of each class, and "not_converged", the fits that ran out of iterations.
    Raises: ImportError without scikit-learn; ValueError for a number of labels or groups other than that of rows, fewer
    than two classes (also on a training side), a group on both sides of `train`, fewer groups than folds, an unknown
    site, layer or position, X of another shape, NaN among labels or activations that are not finite; TypeError for
    arguments of both ways of calling, or none; MissingActivation for a cache that lacks activations.
    Source: Alain & Bengio 2016, arXiv 1610.01644; control tasks: Hewitt & Liang 2019, arXiv 1909.03368.
    """
    who = "linear_probes"
    _sklearn()
    require_rows(who, max_rows)
    own = own_arguments(who, model, inputs, labels, groups, X, y, positions)
    if own is None:
        where = "resid" if site is None else site
        read, n_rows = _reader(who, model, inputs, where, layers, positions, max_rows)
    else:
        X, labels, groups = own
        numbers = own_numbers(who, X, layers, site)
        read, n_rows = (lambda: numbers), numbers.features.shape[2]
    truth, classes = encoded(who, labels, n_rows, "labels")
    group, names = encoded(who, groups, n_rows, "groups")
    if len(classes) < 2:
        raise ValueError(f"{who}: all rows have the label {classes[0]!r}; a probe needs two classes.")
    if folds < 2 or controls < 1 or draws < 1 or strength <= 0:
        raise ValueError(
            f"{who}: folds={folds} must be at least 2, controls={controls} and draws={draws} at least 1, and "
            f"strength={strength} positive."
        )
    generator = torch.Generator().manual_seed(seed)
    sides = _sides(who, truth, group, names, train, folds, generator)
    data = read()
    features, chosen, wheres = data.features, data.layers, data.positions
    held = torch.cat([test for _, test in sides])
    shuffles = [_shuffled(truth, group, generator) for _ in range(controls)]
    resampled = _resampled(group[held], draws, generator)
    values = torch.empty(len(chosen), len(wheres), len(STATISTICS), dtype=torch.float64)
    directions = torch.empty(len(chosen), len(wheres), len(classes), features.shape[-1], dtype=torch.float64)
    failed = 0
    with counting(len(chosen) * len(wheres), "probes", progress) as advance:
        for layer in range(len(chosen)):
            for where in range(len(wheres)):
                x = features[layer, where]
                right, missed = _hits(x, truth, sides, strength)
                failed += missed
                control = []
                for shuffled in shuffles:
                    hits, missed = _hits(x, shuffled, sides, strength)
                    control.append(hits.mean())
                    failed += missed
                accuracies = (resampled @ right) / resampled.sum(1)
                low, high = torch.quantile(accuracies, torch.tensor([0.025, 0.975], dtype=torch.float64))
                chance = truth[held].bincount().max() / len(held)
                values[layer, where] = torch.stack(
                    [right.mean(), low, high, torch.stack(control).mean(), chance.double()]
                )
                learned = sides[0][0] if train is not None else torch.arange(len(truth))
                weights, _, missed = _fit(x[learned], truth[learned], len(classes), strength)
                failed += missed
                directions[layer, where] = weights / weights.norm(dim=-1, keepdim=True).clamp(min=1e-12)
                advance(1)
    scores = Scores(
        values,
        ("layer", "position", "statistic"),
        {"layer": chosen, "position": wheres, "statistic": STATISTICS},
        name="probe accuracy",
        unit="share of rows",
        meta={
            "site": data.site,
            "rows": len(truth),
            "groups": len(names),
            "classes": {str(c): int(n) for c, n in zip(classes, truth.bincount().tolist(), strict=True)},
            "split": "train" if train is not None else f"{folds} folds",
            "strength": strength,
            "controls": controls,
            "not_converged": failed,
        },
    )
    return Probes(scores, directions, classes)


# --- rows, classes, sides ---------------------------------------------------------------------------------


def _sklearn() -> tuple[Any, Any]:
    """Return (LogisticRegression, ConvergenceWarning). Raises: ImportError saying what to install."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            "linear_probes needs scikit-learn, which is not installed: pip install 'veena-lens[circuits]'."
        ) from error
    return LogisticRegression, ConvergenceWarning


def _reader(
    who: str, model: HookedVLM, inputs: Any, site: str, layers: Any, positions: Any, max_rows: int
) -> tuple[Callable[[], ProbeData], int]:
    """Return what reads the activations of a call with a model, and the number of rows; nothing runs before it does.

    Raises: ValueError for an unknown site, layer or position, or a cache without inputs."""
    given = inputs.inputs if isinstance(inputs, ActivationCache) else inputs
    if given is None:
        raise ValueError(f"{who}: this cache was made or sliced without its inputs, so its positions are not known.")
    part, n = site_part(who, model.cfg, site), model.cfg.n_layers
    chosen = listed(layers, n, f"{who}: layers")
    require_units(chosen, n, who, "layer")
    chosen = [require_unit(i, n, who, "layer") for i in chosen]
    wheres = list(positions) if isinstance(positions, (list, tuple)) and not _is_numbers(positions) else [positions]
    for where in wheres:
        parse(where)

    def read() -> ProbeData:
        features = _features(model, inputs, given, [f"blocks.{i}.{part}" for i in chosen], wheres, max_rows)
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"{who}: {part} holds values that are not finite at {wheres}.")
        return ProbeData(features=features, layers=chosen, positions=[str(w) for w in wheres], site=part)

    return read, len(given)


def _is_numbers(positions: Sequence[Any]) -> bool:
    return all(isinstance(p, int) for p in positions)


def _sides(
    who: str,
    truth: Int[Tensor, " row"],
    group: Int[Tensor, " row"],
    names: list[Any],
    train: Sequence[bool] | None,
    folds: int,
    generator: torch.Generator,
) -> list[tuple[Int[Tensor, " learned"], Int[Tensor, " held"]]]:
    """Return (rows learned from, rows held out) of each split, no group on both sides."""
    if train is not None:
        learned = torch.tensor([bool(t) for t in train])
        if len(learned) != len(truth) or bool(learned.all()) or not bool(learned.any()):
            raise ValueError(f"{who}: train must be {len(truth)} truth values, of both kinds.")
        both = [names[g] for g in group[learned].unique().tolist() if bool((group[~learned] == g).any())]
        if both:
            raise ValueError(f"{who}: groups {both[:5]} stand on both sides of the split; put each on one.")
        tests = [~learned]
    else:
        if len(names) < folds:
            few = f", or folds={len(names)}" if len(names) > 1 else ""
            raise ValueError(f"{who}: {len(names)} groups cannot be split into {folds} folds; give more{few}.")
        # The largest group goes first, each to the emptiest fold; equal ones in random order.
        sizes = group.bincount()
        order = torch.randperm(len(names), generator=generator)
        order = order[sizes[order].argsort(descending=True, stable=True)]
        fold, filled = torch.empty(len(names), dtype=torch.long), [0] * folds
        for g in order.tolist():
            fold[g] = filled.index(min(filled))
            filled[int(fold[g])] += int(sizes[g])
        tests = [fold[group] == k for k in range(folds)]
    for test in tests:
        if len(truth[~test].unique()) < 2:
            raise ValueError(f"{who}: a training side has rows of one class alone; give more groups or fewer folds.")
    return [((~test).nonzero().flatten(), test.nonzero().flatten()) for test in tests]


def _shuffled(
    truth: Int[Tensor, " row"], group: Int[Tensor, " row"], generator: torch.Generator
) -> Int[Tensor, " row"]:
    """Give labels to other groups where each has one label, else to other rows."""
    n = int(group.max()) + 1
    one = [truth[group == g].unique() for g in range(n)]
    if n > 2 and all(len(labels) == 1 for labels in one):
        return torch.stack([one[g][0] for g in torch.randperm(n, generator=generator).tolist()])[group]
    return truth[torch.randperm(len(truth), generator=generator)]


def _resampled(group: Int[Tensor, " held"], draws: int, generator: torch.Generator) -> Float[Tensor, "draws held"]:
    """Return how often each held-out row counts in a draw of as many groups, with replacement."""
    known, place = group.unique(return_inverse=True)
    drawn = torch.randint(len(known), (draws, len(known)), generator=generator)
    counts = torch.zeros(draws, len(known), dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    return counts[:, place]


# --- activations and fits ---------------------------------------------------------------------------------


@torch.no_grad()
def _features(
    model: HookedVLM,
    inputs: MultimodalInputs | ActivationCache,
    given: MultimodalInputs,
    names: Sequence[str],
    wheres: Sequence[Any],
    max_rows: int,
) -> Float[Tensor, "layer position row width"]:
    """Return activations, the mean over each row's chosen places."""
    places = [[places_of(given, row, where) for where in wheres] for row in range(len(given))]
    out: list[Tensor] = []
    for rows in parts(len(given), max_rows):
        seen: Any = {}
        if isinstance(inputs, ActivationCache):
            seen = {name: inputs[name][rows] if inputs.has_batch_dim else inputs[name][None] for name in names}
        else:
            _, cache = model.run_with_cache(inputs[rows], names_filter=list(names), return_type=None)
            seen = {name: cache[name] for name in names}
        table = torch.stack([
            torch.stack([
                torch.stack([seen[name][k, at.to(seen[name].device)].double().mean(0).flatten() for at in places[row]])
                for k, row in enumerate(rows)
            ])
            for name in names
        ])  # fmt: skip
        out.append(table.transpose(1, 2).cpu())
    return torch.cat(out, 2)


def _hits(
    x: Float[Tensor, "row width"],
    truth: Int[Tensor, " row"],
    sides: Sequence[tuple[Int[Tensor, " _"], Int[Tensor, " _"]]],
    strength: float,
) -> tuple[Float[Tensor, " held"], int]:
    """Return 1 where a held-out row is named right, in the order of the splits; and fits that did not converge."""
    n, failed, right = int(truth.max()) + 1, 0, []
    for learned, held in sides:
        if len(truth[learned].unique()) < 2:  # of shuffled labels: the one class is all that can be said
            right.append(truth[held] == truth[learned][0])
            continue
        weights, bias, missed = _fit(x[learned], truth[learned], n, strength)
        failed += missed
        right.append((x[held] @ weights.T + bias).argmax(-1) == truth[held])
    return torch.cat(right).double(), failed


def _fit(
    x: Float[Tensor, "row width"], truth: Int[Tensor, " row"], n_classes: int, strength: float
) -> tuple[Float[Tensor, "class width"], Float[Tensor, " class"], int]:
    """Return weights and biases of every class in the activation's own units; a class without rows is never said."""
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    regression, convergence = _sklearn()
    mean, deviation = x.mean(0), x.std(0, correction=0)
    scale = torch.where(deviation > 1e-9 * deviation.max(), deviation, torch.ones_like(deviation))
    # A small fit gains nothing from a second thread, and waits for it where other programs share the cores.
    threads = 1 if x.numel() < SMALL else None
    with warnings.catch_warnings(record=True) as caught, threadpool_limits(threads):
        warnings.simplefilter("always", convergence)
        fitted = regression(C=strength, max_iter=1000).fit(((x - mean) / scale).numpy(), truth.numpy())
    failed = sum(issubclass(w.category, convergence) for w in caught)
    found, offset = torch.from_numpy(fitted.coef_).double(), torch.from_numpy(fitted.intercept_).double()
    if len(found) == 1:  # two classes: one logit, of the second against the first
        found, offset = torch.cat([-found, found]) / 2, torch.cat([-offset, offset]) / 2
    weights = torch.zeros(n_classes, x.shape[1], dtype=torch.float64)
    bias = torch.full((n_classes,), -torch.inf, dtype=torch.float64)
    at = torch.from_numpy(fitted.classes_).long()
    weights[at] = found / scale
    bias[at] = offset - (found / scale) @ mean
    return weights, bias, failed
