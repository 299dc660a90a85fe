"""What a run found, in a few lines: each with its control or its price, and no effect whose interval touches 0."""

from __future__ import annotations

from typing import Any

from veena_lens.emotion import tables
from veena_lens.emotion.judge.fluency import FLUENCY
from veena_lens.emotion.locate.layers import KeyLayers
from veena_lens.emotion.locate.tracing import show_run
from veena_lens.emotion.pipeline import VeenaRun
from veena_lens.emotion.tables import percent


def findings(run: VeenaRun, results: dict[str, Any], condition: str = "conflict, plain") -> list[str]:
    """Return what was found, a sentence or two each; nothing is called an effect whose interval touches 0."""
    hits = {r["method"]: r for r in results["test"]["table"] if r["condition"] == condition}
    drawn = {r["method"]: r for r in results["random"]["table"] if r["condition"] == condition}
    lines = []
    for name, parts in (("VEE", "heads"), ("ENA", "neurons")):
        if name in hits:
            row = hits[name]
            text = f"{name}: {percent(row['hit'])} % right under a plain conflict, {_against(row)} the plain model's "
            text += f"{percent(hits['plain']['hit'])} %."
            if name in drawn:
                random = drawn[name]
                text += f" As many random {parts} of the same layers reach {percent(random['random'])} %"
                text += f" (95 % of draws: {percent(random['low'])} to {percent(random['high'])})."
            lines.append(text)
    others = {r["method"]: r for r in results["side_effects"]}
    if "VEE" in others and others["VEE"].get("attributes") is not None:
        price, plain = others["VEE"], others["plain"]
        lines.append(
            f"The price of VEE: {percent(price['attributes'])} % of other questions about the same images are answered "
            f"right (plain model: {percent(plain['attributes'])} %), and the next token after a neutral image drifts "
            f"by {price['drift']:.2f} nats."
        )
    lines.append(layer_finding(run))
    heads, edges = results["key_heads"]["table"], results["key_heads"]["edges"]
    sure = sum(bool(r["key"]) and r["low"] > 0 for r in heads)
    confirmed = sum(tables.is_confirmed(edge) for edge in edges)
    lines.append(
        f"{sure} heads restore the direction at layer {run.heads.layer} with intervals above 0; {confirmed} of "
        f"{len(edges)} candidate edges between heads are confirmed."
    )
    return lines


def _against(row: dict[str, Any]) -> str:
    """Return how a method compares with the plain model, by the interval of their paired difference."""
    low, high = row.get("difference_low"), row.get("difference_high")
    if low is not None and low > 0:
        return "above"
    return "below" if high is not None and high < 0 else "not distinguishable from"


def best_doses(layers: KeyLayers) -> list[int]:
    """Return for each layer the place of the fluent dose that restores most; doses that do nothing are passed over."""
    fluent = layers.fluency.values <= FLUENCY
    mean = layers.restored.values[..., 1]
    return mean.masked_fill(~fluent, float("-inf")).argmax(-1).tolist()


def clear_layers(layers: KeyLayers) -> list[int]:
    """Return the layers whose interval, at their best fluent dose, lies wholly above the random direction's and 0."""
    found = []
    for place, (layer, dose) in enumerate(zip(layers.restored.labels["layer"], best_doses(layers), strict=True)):
        low, control = layers.restored.values[place, dose, 0], layers.control.values[place, dose, 2]
        if low > 0 and low > control:
            found.append(layer)
    return found


def layer_finding(run: VeenaRun) -> str:
    """Return where the direction does more than a random one, and how much at the key layer."""
    layers = run.layers
    place = list(layers.restored.labels["layer"]).index(layers.best)
    dose = best_doses(layers)[place]
    low, mean, high = layers.restored.values[place, dose].tolist()
    clear = clear_layers(layers)
    together = clear == list(range(clear[0], clear[-1] + 1)) if clear else True
    where = f"in {show_run(clear)}" if together else f"in layers {', '.join(map(str, clear))}"
    return (
        f"The direction does more than a random one {where} (at each layer's best fluent dose). At the key layer, "
        f"{layers.best}, it takes neutral images {percent(mean, 0)} % [{percent(low, 0)}, {percent(high, 0)}] of the "
        f"way to emotional ones (dose {layers.restored.labels['alpha'][dose]:g})."
    )
