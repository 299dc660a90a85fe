"""Metrics of a sweep: one number per row, from the last position's logits or from an activation elsewhere.

A metric is any function of the last position's logits [rows d_vocab] that returns [rows], one number per run:
`lambda logits: logits[:, good] - logits[:, bad]`. There is no axis of positions. An object with `.site` and
`.positions` is given that activation [rows n ...] instead. The functions here return such objects. `require_form` tries
a metric on made-up logits before anything runs, `read_metric` is the one place where a metric is applied to runs,
`require_finite` the one place where unpatched runs must give numbers to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.hook_table import require_hook
from veena_lens.interventions.numbers import floats
from veena_lens.positions import as_int
from veena_lens.sweeps.alignment import places_of

if TYPE_CHECKING:
    from veena_lens.inputs import MultimodalInputs
    from veena_lens.model.model import HookedVLM


@dataclass(frozen=True, eq=False)
class Metric:
    """One number per row of logits [rows d_vocab], or of the activation at `site` and `positions` [rows n ...].

    name, settings: what it measures, for messages and for telling one sweep from another. function: called with the
    logits or the activation and `settings`. site: a hook of a decoder block; default the last position's logits.
    positions: where the site is read in each row.
    """

    name: str
    function: Callable[..., Float[Tensor, " rows"]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    site: str | None = None
    positions: Any = "last"

    def __call__(self, value: Float[Tensor, "rows ..."]) -> Float[Tensor, " rows"]:
        return self.function(value, **self.settings)

    def __repr__(self) -> str:
        settings = dict(self.settings) | ({} if self.site is None else {"site": self.site, "positions": self.positions})
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"


def logit_diff(correct: Any, wrong: Any) -> Metric:
    """Return the metric "logit of the `correct` token minus that of the `wrong` one" (token ids; unit: logits)."""
    tokens = {"correct": correct, "wrong": wrong}
    return Metric("logit_diff", _logit_diff, {name: _token(f"logit_diff: {name}", t) for name, t in tokens.items()})


def log_prob(token: Any) -> Metric:
    """Return the metric "log probability of a token" (its id; unit: nats)."""
    return Metric("log_prob", _log_prob, {"token": _token("log_prob: token", token)})


def kl(reference: Any) -> Metric:
    """Return the metric "KL(reference || run) of next-token distributions" in nats; `reference` are logits [d_vocab], a
    tensor, an array or a list."""
    return Metric("kl", _kl, {"reference": floats(reference, "kl: the reference")})


def project(site: str, direction: Any, positions: Any = "last") -> Metric:
    """Return the metric "inner product of an activation with a direction's unit vector", mean over positions.

    site: a hook of a decoder block, such as "blocks.5.hook_resid_post". direction: [d_model], a tensor, an array or a
    list, of any length but 0. positions: where it is read. Unit: that of the activation."""
    return Metric("project", _project, {"direction": floats(direction, "project: the direction")}, site, positions)


def soft_hit(tokens: Sequence[Any], others: Sequence[Sequence[Any]]) -> Metric:
    """Return the metric "log p(tokens of the target set) - log mean p(other sets)": how far one answer leads the rest.

    tokens: ids of the target's words. others: one list of ids per alternative.
    Raises: ValueError for empty sets, or ids that two sets share."""
    tokens = [_token("soft_hit: an entry of tokens", t) for t in tokens]
    others = [[_token("soft_hit: an entry of others", t) for t in other] for other in others]
    sets = [set(tokens), *map(set, others)]
    if not sets[0] or len(sets) < 2 or not all(sets):
        raise ValueError("soft_hit: give token ids for the target and for at least one rival.")
    shared = {t for i, s in enumerate(sets) for other in sets[i + 1 :] for t in s & other}
    if shared:
        raise ValueError(f"soft_hit: token ids {sorted(shared)} stand in two sets; drop them from both.")
    return Metric("soft_hit", _soft_hit, {"tokens": tokens, "others": others})


def _logit_diff(logits: Float[Tensor, "rows d_vocab"], correct: int, wrong: int) -> Float[Tensor, " rows"]:
    _require_tokens("logit_diff", (correct, wrong), logits)
    return logits[:, correct] - logits[:, wrong]


def _log_prob(logits: Float[Tensor, "rows d_vocab"], token: int) -> Float[Tensor, " rows"]:
    _require_tokens("log_prob", (token,), logits)
    return logits.log_softmax(-1)[:, token]


def _kl(logits: Float[Tensor, "rows d_vocab"], reference: Float[Tensor, " d_reference"]) -> Float[Tensor, " rows"]:
    if reference.shape != logits.shape[-1:]:
        raise ValueError(f"kl: the reference must be [{logits.shape[-1]}], not {list(reference.shape)}.")
    want = reference.to(logits).log_softmax(-1)
    return (want.exp() * (want - logits.log_softmax(-1))).sum(-1)


def _project(
    activation: Float[Tensor, "rows n d_model"], direction: Float[Tensor, " d_direction"]
) -> Float[Tensor, " rows"]:
    if direction.shape != activation.shape[-1:]:
        wanted, shape = activation.shape[-1], list(direction.shape)
        raise ValueError(f"project: the direction must be [{wanted}] as the activation is, not {shape}.")
    unit = direction / (direction.norm() + 1e-12)
    return (activation @ unit.to(activation)).mean(-1)


def _soft_hit(
    logits: Float[Tensor, "rows d_vocab"], tokens: Sequence[int], others: Sequence[Sequence[int]]
) -> Float[Tensor, " rows"]:
    _require_tokens("soft_hit", [*tokens, *(t for o in others for t in o)], logits)
    logp = logits.log_softmax(-1)
    target = logp[:, list(tokens)].logsumexp(-1)
    rivals = torch.stack([logp[:, list(o)].logsumexp(-1) for o in others])
    return target - (rivals.logsumexp(0) - torch.log(torch.tensor(float(len(others)), dtype=logp.dtype)))


def _token(what: str, given: Any) -> int:
    """Return a token id as Python's integer. Raises: TypeError for anything else, with the remedy for a word."""
    try:
        return as_int(given, what)
    except TypeError as error:
        if not isinstance(given, str):
            raise
        raise TypeError(f"{what} is {given!r}: give the token's id, model.to_single_token({given!r}).") from error


def _require_tokens(metric: str, tokens: Sequence[int], logits: Tensor) -> None:
    """Raise ValueError for a token id that the vocabulary lacks."""
    outside = [t for t in tokens if not 0 <= t < logits.shape[-1]]
    if outside:
        raise ValueError(f"{metric}: token id {outside[0]} does not exist; the vocabulary has {logits.shape[-1]}.")


# --- applying metrics to runs ---------------------------------------------------------------------------------


def site_of(model: HookedVLM, metric: Any) -> str | None:
    """Return the hook that a metric reads, None for logits.

    Raises: ValueError for an unknown hook, or one outside the decoder's blocks."""
    site = getattr(metric, "site", None)
    if site is None:
        return None
    full = require_hook(site, model.hook_dict)
    if not full.startswith("blocks."):
        raise ValueError(f"A metric reads logits or a hook of a decoder block, not {site!r}.")
    return full


def read_metric(
    metric: Any,
    site: str | None,
    inputs: MultimodalInputs,
    row: int,
    logits: Float[Tensor, "rows d_vocab"] | None,
    seen: Mapping[str, Float[Tensor, "rows pos ..."]],
    name: str = "",
) -> Float[Tensor, " rows"]:
    """Return the metric of runs that all lie as row `row` of `inputs`.

    site: the hook that it reads, as `site_of` says. logits: those of each run's last position, where some metric reads
    them. seen: activations of the runs by hook, over the positions of the padded row. name: of the metric, for
    messages.
    Raises: ValueError for other than one number per run, or positions that select nothing."""
    if site is None:
        assert logits is not None
        value = logits
    else:
        places = places_of(inputs, row, getattr(metric, "positions", "last"))
        value = seen[site][:, places.to(seen[site].device)]
    return values_of(metric, value, name)


def values_of(metric: Any, value: Float[Tensor, "rows ..."], name: str = "") -> Float[Tensor, " rows"]:
    """Return the metric of what it reads.

    Raises: ValueError for other than one real number per row, or a metric that indexes axes or entries that are not
    there; the message shows the right form."""
    try:
        out = metric(value)
    except (IndexError, TypeError, AttributeError) as error:
        raise _misread(metric, value, name, error) from error
    if not isinstance(out, Tensor) or out.shape != (len(value),) or out.is_complex():
        shape = f"{list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        given = f"{shape} of {out.dtype}" if isinstance(out, Tensor) and out.is_complex() else shape
        raise ValueError(
            f"The metric{_named(name)} must give one number per row, [{len(value)}], not {given}. "
            f"{_form(metric, value)}"
        )
    return out if out.is_floating_point() else out.double()


@torch.no_grad()
def require_form(model: HookedVLM, metric: Any, name: str = "") -> None:
    """Try a metric of logits on made-up ones, of one row and of two; metrics of activations are left to the runs.

    Raises: ValueError where it does not return one number per row, as `values_of`."""
    if getattr(metric, "site", None) is not None:
        return
    weight = model.unembed.matrix
    for rows in (1, 2):
        made_up = torch.zeros(rows, model.cfg.d_vocab, dtype=weight.dtype, device=weight.device)
        try:
            values_of(metric, made_up, name)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _misread(metric, made_up, name, error) from error


def _misread(metric: Any, value: Tensor, name: str, error: Exception) -> ValueError:
    said = str(error).splitlines()[0].rstrip(".") if str(error) else "no message"
    return ValueError(f"The metric{_named(name)} raised {type(error).__name__}: {said}. {_form(metric, value)}")


def _form(metric: Any, value: Tensor) -> str:
    """Return in words what a metric is given and must return."""
    shape = list(value.shape)
    if (site := getattr(metric, "site", None)) is not None:
        return f"It is given {site} at its positions, [rows n ...], here {shape}, and must return [rows]."
    return (
        f"It is given the last position's logits [rows d_vocab], here {shape}, without an axis of positions, and must "
        "return a tensor [rows]: lambda logits: logits[:, good] - logits[:, bad], or "
        "veena_lens.sweeps.metrics.logit_diff(good, bad)."
    )


def require_finite(values: Float[Tensor, " rows"], pairs: Sequence[int], name: str = "") -> None:
    """Raise ValueError where the metric of an unpatched run is NaN or infinite; `pairs` says whose each run is."""
    bad = {pair: float(v) for pair, v in zip(pairs, values.detach(), strict=True) if not bool(torch.isfinite(v))}
    if bad:
        raise ValueError(
            f"The metric{_named(name)} is not finite on unpatched runs, by pair: {bad}; there is nothing to compare."
        )


def _named(name: str) -> str:
    return f" {name!r}" if name else ""
