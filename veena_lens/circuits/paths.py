"""Path patching: what one component says to another through the residual stream, and to nobody else.

Every component adds its output to the stream, so a sender's change reaches a receiver's input twice over: directly, as
the change itself, and through whatever lies between. The direct part is exact and cheap: the receiver reads the
corrupted run's residual plus the sender's change, its own norm taken anew, while every other reader goes on as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.inputs import MultimodalInputs
from veena_lens.interventions.base import require_unit
from veena_lens.long_runs import counting
from veena_lens.positions import parse
from veena_lens.residual_parts import denominators, divided, head_rows, neuron_rows
from veena_lens.scores import Scores
from veena_lens.sweeps.alignment import bare, corresponding
from veena_lens.sweeps.measuring import (
    Entering,
    Measure,
    effect,
    entering_layers,
    measure_of,
    parts,
    patched_and_source,
    reference_runs,
    require_pairs,
    require_rows,
    wide,
)

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

NORMS = ("real", "frozen")
_SENDER = re.compile(r"^(?:(embed)|(\d+)_(attn_out|mlp_out|deepstack)|L(\d+)([HN])(\d+))$")
_RECEIVER = re.compile(r"^(?:(final)|(\d+)_mlp_in|L(\d+)H(\d+)(?:\.([qkv]))?)$")


@dataclass(frozen=True)
class _Sender:
    """One component. `place` says when it writes: 2 l for what joins at layer l's input (0: the embedding), 2 l + 1
    for its attention, 2 l + 2 for its MLP."""

    label: str
    site: str
    place: int
    unit: str = ""  # "H" or "N"
    index: int = 0


@dataclass(frozen=True)
class _Input:
    """One input that reads the stream: what senders of places up to its own wrote."""

    label: str
    hook: str  # "" for the final residual
    layer: int
    place: int
    copy: int | None = None  # which copy of the split input


def path_patching(
    model: HookedVLM,
    clean: MultimodalInputs,
    corrupted: MultimodalInputs,
    senders: Any = "heads",
    receivers: Any = "final",
    metric: Any = None,
    direction: str = "denoising",
    *,
    positions: Any = "all",
    norm: str = "real",
    relative: bool = False,
    max_rows: int = 32,
    progress: bool = False,
) -> Scores:
    """Return the effect on the metric of each sender's change on the direct path to each receiver.

    Let B be the run that is patched (denoising: the corrupted one) and A the other; Delta_c[p] = out_c,A[p] -
    out_c,B[p] is the change of sender c's output at p. A receiver d's input at `positions` becomes x_d,B[p] +
    Delta_c[p], the residual of B with the sender's change and nothing else: heads, MLPs and deep-stack features between
    them stay as in B. Where a norm follows attention and MLP (Gemma), the output of a head or neuron is its share after
    that norm, by each run's own denominator. d's own norm is taken of that input with its real scale; d's output, and
    all that follows d, then change as they must.
    Entry: m - m_B when denoising, m_B - m when noising (A is then the corrupted run), both > 0 where the sender's clean
    value speaks for the clean run through d.

    clean, corrupted: pairs of rows. senders: labels as caches give them, "embed", "3_attn_out", "3_mlp_out",
    "1_deepstack" (what that layer adds of inner tower features), "L3H2" (a head), "L3N17" (a neuron); or "heads", or
    "components" (embed, deep-stack, attn_out and mlp_out of every layer). receivers: "L5H1.q", ".k", ".v" (under
    grouped queries the key/value head that the head reads, so the whole group follows), "L5H1" (all three), "5_mlp_in",
    "final" (the residual that enters the last norm, read at the last position). A tuple of labels is one entry: the
    changes of its senders together, or its receivers together, each reading B's residual. A sender that writes after a
    receiver reads has no path: that entry is masked. metric: as in `attribution_patching`; a metric on an activation
    measures the receiver's own output, e.g. project("blocks.5.hook_attn_out", direction). positions: where receivers
    read the change. norm: "real", or "frozen" to keep B's scale in the last norm ("final" alone): the entry is then
    linear in Delta, the sender's direct attribution, and senders add up. relative: as in `attribution_patching`.
    max_rows: paths that run together. progress: show a bar.
    Returns Scores with axes (pair, sender, receiver); unit: the metric's, or a share of clean - corrupted. meta: the
    metric of both runs.
    Raises: ValueError for unknown labels, layers or units, receivers after the layer that the metric reads, positions
    that do not correspond (or leave out the last one for "final"), or a metric that does not fit.
    Source: Wang et al. 2022, arXiv 2211.00593; Goldowsky-Dill et al. 2023, arXiv 2304.05969.
    """
    who = "path_patching"
    require_pairs(who, clean, corrupted, direction)
    require_rows(who, max_rows)
    if norm not in NORMS:
        raise ValueError(f"{who}: norm={norm!r} must be one of {', '.join(NORMS)}.")
    from_labels, to_labels = _groups(who, model.cfg, senders), _groups(who, model.cfg, receivers)
    sending = [[_sender(who, model.cfg, label) for label in group] for group in from_labels]
    receiving = [_receivers(who, model.cfg, group) for group in to_labels]
    measure = measure_of(who, model, metric, len(clean))
    _require_reach(who, measure, receiving, norm)
    parse(positions)
    base, source = patched_and_source(direction, clean, corrupted)
    places = corresponding(base, source, positions)
    exists = torch.tensor([[any(s.place <= d.place for s in c for d in r) for r in receiving] for c in sending])
    with counting(int(exists.sum()) * len(base), "paths", progress) as advance:
        change, of_base, of_source = [], [], []
        for i in range(len(base)):
            pair = _Pair(measure, base[i].without_padding(), source[i].without_padding(), i, sending, receiving, norm)
            first = [int(side.attention_mask[i].long().argmax()) for side in (base, source)]
            pair.at(places[0][i] - first[0], places[1][i] - first[1])
            of_base.append(pair.plain)
            of_source.append(pair.other)
            table = torch.zeros(exists.shape, dtype=wide(pair.plain).dtype, device=pair.plain.device)
            for column, inputs in enumerate(receiving):
                able = exists[:, column].nonzero().flatten().tolist()
                for some in parts(len(able), max_rows):
                    rows = [able[k] for k in some]
                    table[rows, column] = (pair.run([sending[k] for k in rows], inputs) - pair.plain).to(table)
                    advance(len(rows))
            change.append(table)
    runs = reference_runs(direction, torch.stack(of_base), torch.stack(of_source))
    values = effect(torch.stack(change), runs, relative)
    labels = {"sender": [" + ".join(x) for x in from_labels], "receiver": [" + ".join(x) for x in to_labels]}
    return Scores(
        values,
        ("pair", "sender", "receiver"),
        labels,
        name="path effect",
        unit="share of the effect" if relative else "metric",
        mask=None if bool(exists.all()) else exists.to(values.device),
        meta={
            "direction": direction,
            "positions": str(positions),
            "norm": norm,
            "clean": runs.clean.tolist(),
            "corrupted": runs.corrupted.tolist(),
        },
    )


# --- labels -----------------------------------------------------------------------------------------------


def _groups(who: str, cfg: Any, labels: Any) -> list[tuple[str, ...]]:
    """Return the entries as tuples of labels."""
    layers = range(cfg.n_layers)
    if isinstance(labels, str) and labels == "heads":
        return [(f"L{layer}H{head}",) for layer in layers for head in range(cfg.n_heads)]
    if isinstance(labels, str) and labels == "components":
        found = [("embed",)]
        for layer in range(max(cfg.n_layers, cfg.n_deepstack + 1)):
            found += [(f"{layer}_deepstack",)] if 1 <= layer <= cfg.n_deepstack else []
            found += [(f"{layer}_attn_out",), (f"{layer}_mlp_out",)] if layer < cfg.n_layers else []
        return found
    listed = [labels] if isinstance(labels, str) else list(labels)
    if not listed or not all(isinstance(x, str) or (len(x) and all(isinstance(y, str) for y in x)) for x in listed):
        raise ValueError(f"{who}: {labels!r}: give labels such as 'L3H2', or tuples of them, at least one.")
    return [(x,) if isinstance(x, str) else tuple(x) for x in listed]


def _sender(who: str, cfg: Any, label: str) -> _Sender:
    found = _SENDER.match(label)
    if not found:
        raise ValueError(
            f"{who}: no sender is called {label!r}; labels: embed, 3_attn_out, 3_mlp_out, 1_deepstack, L3H2 (a head), "
            "L3N17 (a neuron); or senders='heads', 'components'."
        )
    embed, layer, part, of, kind, unit = found.groups()
    if embed:
        return _Sender(label, "hook_embed", 0)
    if part == "deepstack":
        at = int(layer)
        if not 1 <= at <= cfg.n_deepstack:
            raise ValueError(f"{who}: {label!r}: deep-stack features join layers 1 to {cfg.n_deepstack} of this model.")
        return _Sender(label, f"deepstack.{at - 1}.hook_out", 2 * at)
    at = require_unit(int(layer if layer is not None else of), cfg.n_layers, who, "layer")
    if part is not None:
        return _Sender(label, f"blocks.{at}.hook_{part}", 2 * at + (1 if part == "attn_out" else 2))
    if kind == "H":
        index = require_unit(int(unit), cfg.n_heads, who, "head")
        return _Sender(label, f"blocks.{at}.attn.hook_z", 2 * at + 1, "H", index)
    return _Sender(
        label, f"blocks.{at}.mlp.hook_post", 2 * at + 2, "N", require_unit(int(unit), cfg.d_mlp, who, "neuron")
    )


def _receivers(who: str, cfg: Any, labels: Sequence[str]) -> list[_Input]:
    """Return the inputs of one entry, in the order of the stream. Raises: ValueError for "final" beside others."""
    inputs: list[_Input] = []
    for label in labels:
        found = _RECEIVER.match(label)
        if not found:
            raise ValueError(
                f"{who}: no receiver is called {label!r}; labels: L5H1.q, L5H1.k, L5H1.v, L5H1, 5_mlp_in, final."
            )
        final, mlp, layer, head, part = found.groups()
        if final:
            inputs.append(_Input(label, "", cfg.n_layers, 2 * cfg.n_layers))
        elif mlp is not None:
            at = require_unit(int(mlp), cfg.n_layers, who, "layer")
            inputs.append(_Input(label, f"blocks.{at}.hook_mlp_in", at, 2 * at + 1))
        else:
            at = require_unit(int(layer), cfg.n_layers, who, "layer")
            h = require_unit(int(head), cfg.n_heads, who, "head")
            shared = h // (cfg.n_heads // cfg.n_key_value_heads)
            for x in part or "qkv":
                copy = h if x == "q" else shared
                inputs.append(_Input(label, f"blocks.{at}.hook_{x}_input", at, 2 * at, copy))
    if any(not d.hook for d in inputs) and len(inputs) > 1:
        raise ValueError(f"{who}: 'final' stands alone; it cannot be joined with others in {tuple(labels)}.")
    return sorted(dict.fromkeys(inputs), key=lambda d: d.place)


def _require_reach(who: str, measure: Measure, receiving: Sequence[Sequence[_Input]], norm: str) -> None:
    """Raise ValueError for a receiver after all that a metric reads, or a frozen norm of other receivers."""
    stops = [measure.model.cfg.n_layers + 1 if site is None else int(site.split(".")[1]) + 1 for site in measure.sites]
    for d in (d for entry in receiving for d in entry):
        if d.layer >= min(stops):
            raise ValueError(f"{who}: receiver {d.label!r} lies after what the metric reads ({measure.sites}).")
        if norm == "frozen" and d.hook:
            raise ValueError(f"{who}: norm='frozen' is for receivers='final'; {d.label!r} takes its norm anew.")


# --- one pair ---------------------------------------------------------------------------------------------


class _Pair:
    """Both runs of one pair, and rows that differ from the patched one in a receiver's input."""

    def __init__(
        self,
        measure: Measure,
        base: MultimodalInputs,
        source: MultimodalInputs,
        pair: int,
        sending: Sequence[Sequence[_Sender]],
        receiving: Sequence[Sequence[_Input]],
        norm: str,
    ) -> None:
        self.measure, self.model, self.base, self.source, self.pair = measure, measure.model, base, source, pair
        self.norm = norm
        units = sorted({s.site for entry in sending for s in entry if s.unit})
        self.by = denominators(self.model.cfg, units)
        self.sites = sorted({s.site for entry in sending for s in entry} | set(self.by.values()))
        inputs = [d for entry in receiving for d in entry]
        self.reads_final = any(not d.hook for d in inputs)
        starts = {entry[0].layer for entry in receiving if entry[0].hook}
        n = self.model.cfg.n_layers
        names = {self._stream(d) for d in inputs if d.hook}
        if self.reads_final:
            names |= {f"blocks.{n - 1}.hook_resid_post", "ln_final.hook_scale"}
            names |= {f"deepstack.{n - 1}.hook_out"} if self.model.cfg.n_deepstack >= n else set()
        self.here: dict[str, Tensor] = {}
        self.there: dict[str, Tensor] = {}
        with torch.no_grad(), entering_layers(self.model, base, starts) as self.entering:
            self.plain = self._listen(base, [*self.sites, *names], self.here)
        self.other = self._listen(source, self.sites, self.there)
        self.where = self.where_there = torch.empty(0, dtype=torch.long)

    @torch.no_grad()
    def _listen(self, inputs: MultimodalInputs, names: Sequence[str], into: dict[str, Tensor]) -> Tensor:
        def keep(tensor: Tensor, hook: Any) -> None:
            into[hook.name] = tensor

        with self.model.hooks([(name, keep) for name in dict.fromkeys(names)]):
            return self.measure(inputs, [self.pair], plain=True)[0]

    def at(self, here: Tensor, there: Tensor) -> None:
        """Return the positions that correspond, in each run. Raises: ValueError where "final" is not among them."""
        if self.reads_final and not bool((here == self.base.shape[1] - 1).any()):
            raise ValueError("path_patching: 'final' is read at the last position, which `positions` leave out.")
        self.where, self.where_there = here, there

    def _stream(self, d: _Input) -> str:
        """Return the residual that an input reads."""
        if d.hook.endswith("hook_mlp_in"):
            return f"blocks.{d.layer}.hook_resid_mid"
        part = "hook_deepstack" if 1 <= d.layer <= self.model.cfg.n_deepstack else "hook_resid_pre"
        return f"blocks.{d.layer}.{part}"

    def _change(self, s: _Sender) -> Float[Tensor, "n d_model"]:
        """Return the change of one component's output at the positions."""
        ends = []
        for seen, inputs, where in (
            (self.there, self.source, self.where_there),
            (self.here, self.base, self.where),
        ):
            if s.site not in seen:  # no image in this row, so nothing is added
                return torch.zeros(len(self.where), self.model.cfg.d_model, dtype=self.model.cfg.dtype)
            value = divided(seen.__getitem__, s.site, self.by)
            value = self.model.scatter_deepstack(value, inputs) if s.site.startswith("deepstack.") else value
            ends.append(value[0, where.to(value.device)])
        change = ends[0] - ends[1]
        if not s.unit:
            return change
        block = self.model.blocks[int(s.site.split(".")[1])]
        if s.unit == "H":
            return change[:, s.index] @ head_rows(block)[s.index]
        return change[:, s.index, None] * neuron_rows(block)[s.index]

    def _changes(self, entries: Sequence[Sequence[_Sender]], d: _Input) -> Float[Tensor, "rows n d_model"]:
        """Return each entry's change as this input meets it: senders that write before it reads."""
        nothing = torch.zeros(len(self.where), self.model.cfg.d_model, dtype=self.model.cfg.dtype)
        out = []
        for entry in entries:
            mine = [self._change(s) for s in entry if s.place <= d.place]
            out.append(torch.stack([m.to(mine[0]) for m in mine]).sum(0) if mine else nothing)
        return torch.stack([x.to(out[0]) for x in out])

    @torch.no_grad()
    def run(self, entries: Sequence[Sequence[_Sender]], inputs: Sequence[_Input]) -> Float[Tensor, " rows"]:
        """Return the metric with each entry's change on its way to the inputs of one receiver."""
        if not inputs[0].hook:
            return self._final(self._changes(entries, inputs[0]))
        index = [0] * len(entries)
        rows = bare(self.base)[index]
        hooks = [(d.hook, self._edit(d, self._changes(entries, d))) for d in inputs]
        start: Entering = self.entering[inputs[0].layer].rows(index)
        with self.model.hooks(hooks):
            return self.measure(rows, [self.pair] * len(index), entering=start)

    def _edit(self, d: _Input, change: Float[Tensor, "rows n d_model"]) -> Callable[..., Tensor]:
        """Return a hook that gives an input the patched run's residual plus the change."""
        stream = self.here[self._stream(d)]

        def edit(tensor: Tensor, hook: Any) -> Tensor:
            where = self.where.to(tensor.device)
            read = stream[:, where].to(tensor) + change.to(tensor)
            out = tensor.clone()
            if d.copy is None:
                out[:, where] = read
            else:
                out[:, where, d.copy] = read
            return out

        return edit

    def _final(self, change: Float[Tensor, "rows n d_model"]) -> Float[Tensor, " rows"]:
        """Return the metric of the last residual plus the change at the last position."""
        model, last = self.model, self.base.shape[1] - 1
        n = model.cfg.n_layers
        resid = self.here[f"blocks.{n - 1}.hook_resid_post"][0, last]
        if model.cfg.n_deepstack >= n and f"deepstack.{n - 1}.hook_out" in self.here:
            resid = resid + model.scatter_deepstack(self.here[f"deepstack.{n - 1}.hook_out"], self.base)[0, last]
        stream = resid + change[:, (self.where == last).nonzero()[0, 0]].to(resid)
        scale = self.here["ln_final.hook_scale"][:, -1:]
        frozen = [("ln_final.hook_scale", lambda tensor, hook: scale.expand_as(tensor).clone())]
        with model.hooks(frozen if self.norm == "frozen" else []):
            logits = model.unembed_resid(stream[:, None])[:, 0]
        return self.measure.of_logits(logits, self.pair)
