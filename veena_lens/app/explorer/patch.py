"""What the Patch tab runs: every head or every layer's residual of a pair patched, and a head opened in the Look tab.

A sweep runs layer by layer: it shows its progress, stops between layers, and is estimated before it starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.app.explorer import look
from veena_lens.app.explorer.exports import about, captioned, table_files
from veena_lens.app.explorer.parts import cells_value, view_value
from veena_lens.app.explorer.pictures import GivenImage, open_upload, require_processable
from veena_lens.app.explorer.programs import Made, make, model_of, program
from veena_lens.app.explorer.state import Explorer, Limits, Session, size
from veena_lens.app.explorer.words import single_token
from veena_lens.app.view.effects import effects_view
from veena_lens.emotion import Pair, load_pairs
from veena_lens.scores import Scores
from veena_lens.sweeps import patch_sweep
from veena_lens.sweeps.metrics import logit_diff
from veena_lens.sweeps.plan import Plan

if TYPE_CHECKING:
    from PIL import Image

    from veena_lens import HookedVLM

TOGETHER = 512  # rows of a sweep that travel together unless memory asks for fewer
STEPS = 32  # a sweep of more layers takes several per step
WHERE = {"last": "last position", "query": "all positions of the question", "each": "each position alone"}
SITES = {"heads": "heads", "residual stream": "resid", "attention outputs": "attn_out", "MLP outputs": "mlp_out"}


@dataclass(frozen=True)
class Choices:
    """What is chosen on the tab, in the order of its components."""

    model: str
    pair: str
    uploads: list[str] | None
    prompt: str
    right: str
    wrong: str
    sites: str
    positions: str
    direction: str

    def settings(self, limits: Limits) -> SweepSettings:
        """Return the sweep that is asked for. Raises: as `pair_of`."""
        clean, corrupted = pair_of(self.pair, self.uploads, limits)
        return SweepSettings(
            model=self.model,
            clean=clean,
            corrupted=corrupted,
            prompt=self.prompt,
            words=(self.right, self.wrong),
            sites=SITES[self.sites],
            positions=self.positions,
            direction=self.direction,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepSettings:
    """A pair, what is patched and where, and the two words whose logits are compared."""

    model: str
    clean: GivenImage
    corrupted: GivenImage
    prompt: str
    words: tuple[str, str]
    sites: str = "heads"
    positions: str = "last"
    direction: str = "denoising"
    max_rows: int = TOGETHER

    @property
    def text(self) -> str:
        """Say in words which sweep this is."""
        images = [f"{Path(self.clean.name).name} → {Path(self.corrupted.name).name}"]
        part = next(name for name, site in SITES.items() if site == self.sites)
        asked = look.asked_in_words(self.model, images, self.prompt)
        return f"{asked} · {part}, {WHERE[self.positions]}, {self.direction}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Swept:
    """What is done so far: effects [layer column], NaN where nothing ran yet."""

    settings: SweepSettings
    effects: Float[Tensor, "layer column"]
    done: int
    result: Scores


class TooLarge(ValueError):
    """A sweep over the memory limit, and the smaller one that would fit (None: none would)."""

    def __init__(self, text: str, smaller: SweepSettings | None) -> None:
        super().__init__(text)
        self.smaller = smaller


def patched_effects(
    model: HookedVLM,
    clean: Image.Image | str,
    corrupted: Image.Image | str,
    question: str,
    words: tuple[str, str],
    sites: str,
    positions: str,
    direction: str,
    **settings: Any,
) -> Any:
    """Patch the activations of one image's run into the other's; the metric is the logit difference of two words.

    Raises: ValueError for words that begin with the same token, or as `patch_sweep`."""
    first, second = (model.prepare(text=question, images=image) for image in (clean, corrupted))
    right, wrong = (single_token(model, word) for word in words)
    if right == wrong:
        raise ValueError(f"{words[0]!r} and {words[1]!r} are the same token; choose other words.")
    metric = logit_diff(right, wrong)
    return patch_sweep(model, first, second, sites, positions, metric, direction, progress=False, **settings)


def effects(model: HookedVLM, settings: SweepSettings, **hidden: Any) -> Made:
    """Run a sweep, or with `hidden` settings a part of it; the program runs it whole."""
    return make(
        "result",
        patched_effects,
        model_of(model, settings.model),
        settings.clean.made,
        settings.corrupted.made,
        settings.prompt,
        settings.words,
        sites=settings.sites,
        positions=settings.positions,
        direction=settings.direction,
        hidden={"max_rows": settings.max_rows, **hidden},
    )


def check(explorer: Explorer, settings: SweepSettings) -> tuple[Plan, str]:
    """Return the sweep's plan and program.

    Raises: TooLarge, with the estimate and a smaller sweep; ValueError for one that cannot be."""
    with explorer.using(settings.model) as model:
        for picture in (settings.clean, settings.corrupted):
            require_processable(model, [picture], explorer.limits)
        planned = effects(model, settings, plan_only=True)
        plan: Plan = planned.value
        limit = explorer.limits.sweep_bytes
        needed = plan.row_bytes * min(plan.n_rows, settings.max_rows)
        if needed <= limit:
            return plan, program(planned, then=["print(result.top(10))", 'plots.save(result.plot(), "patching.png")'])
        fitting = limit // plan.row_bytes
        large = (
            f"This sweep has {plan.n_rows:,} rows and would hold about {size(needed)} at once; the limit here is "
            f"{size(limit)}."
        )
        if fitting >= 1:
            smaller = replace(settings, max_rows=int(fitting))
            raise TooLarge(f"{large} In batches of {fitting:,} rows it fits, and takes longer.", smaller)
        if settings.positions != "last":
            last = replace(settings, positions="last")
            one: Plan = effects(model, last, plan_only=True).value
            if one.row_bytes <= limit:
                rows = int(min(one.n_rows, TOGETHER, limit // one.row_bytes))
                smaller = replace(last, max_rows=rows)
                raise TooLarge(
                    f"{large} At the last position alone it needs about {size(one.row_bytes * rows)}.", smaller
                )
        raise TooLarge(f"{large} A single row needs {size(plan.row_bytes)}: use a shorter prompt.", None)


def sweep(explorer: Explorer, session: Session, settings: SweepSettings) -> Iterator[Swept]:
    """Yield the effects as they come, layer by layer from the first; the last one has the whole result.

    Whoever stops reading stops the sweep: the model is used within a step only. What was run is kept on the server, so
    the same sweep resumes where it stopped. Raises: as `check`, before anything runs."""
    check(explorer, settings)
    parts: list[Scores] = []
    n = 0
    while True:
        with explorer.using(settings.model) as model:
            layers = model.cfg.n_layers
            step = list(range(n, min(layers, n + max(1, layers // STEPS))))
            parts.append(effects(model, settings, layers=step, out=explorer.folder / "sweeps").value)
        n = step[-1] + 1
        result = joined(parts)
        found = grid_of(result).scores
        found = found if found.ndim == 2 else found[:, None]
        table = torch.full((layers, found.shape[1]), torch.nan)
        table[:n] = found.float().cpu()
        swept = Swept(settings=settings, effects=table, done=n, result=result)
        session.kept["swept"] = swept
        yield swept
        if n == layers:
            return


def joined(parts: list[Scores]) -> Scores:
    """Join sweeps of some layers each into one."""
    labels = {**parts[0].labels, "layer": [layer for part in parts for layer in part.labels["layer"]]}
    return replace(parts[0], values=torch.cat([part.values for part in parts]), labels=labels)


def grid_of(result: Scores) -> Scores:
    """Return the effects with one axis beside the layers: of heads at each position the mean, as `Scores.plot` draws
    it."""
    return result.mean("pos") if {"head", "pos"} <= set(result.axes) else result


def export_sweep(session: Session) -> list[str]:
    """Write the sweep so far as an image, a table and a file of results. Raises: ValueError before one ran."""
    from veena_lens import plots

    swept: Swept = session.need("swept", "Run a sweep first; then there is something to export.")
    settings, result = swept.settings, swept.result
    names = {"clean": settings.clean.name, "corrupted": settings.corrupted.name, "metric": metric_name(settings)}
    told = about(settings.model, settings.prompt, **names, sites=settings.sites, direction=settings.direction)
    on_image: dict[str, Any] = {"image": settings.clean.image} if "image_grids" in result.meta else {}
    figure = plots.save(captioned(result.plot(**on_image), told), session.folder / "patching.png")
    own = replace(result, meta={**result.meta, **told}).save(session.folder / "patching.safetensors")
    return [str(f) for f in (figure, *table_files(result.to_frame(), session, "patching", told), own)]


def metric_name(settings: SweepSettings) -> str:
    """Return the logit difference that a sweep measures, in words."""
    return " − ".join(f"“{word}”" for word in settings.words)


@lru_cache(maxsize=1)
def pair_names() -> dict[str, Pair]:
    """Return test pairs by a readable name."""
    return {f"{p.emotion}, {p.identity}": p for p in load_pairs().select(split="test", condition="none")}


def pair_of(name: str, uploads: list[str] | None, limits: Limits) -> tuple[GivenImage, GivenImage]:
    """Open two uploads, or a pair by name. Raises: ValueError for another number of uploads, or an unknown pair."""
    if uploads:
        if len(uploads) != 2:
            raise ValueError(f"A pair is two images, the one with the feature first; {len(uploads)} were given.")
        return open_upload(uploads[0], limits), open_upload(uploads[1], limits)
    if name not in pair_names():
        raise ValueError(f"No pair is named {name!r}; choose one from the list.")
    pair = pair_names()[name]
    first, second = (GivenImage(image=p.open(), name=p.file, is_sample=True) for p in (pair.emotional, pair.neutral))
    return first, second


def shown_cells(swept: Swept) -> str:
    """Return the grid of effects so far."""
    settings, result = swept.settings, grid_of(swept.result)
    layers = len(swept.effects)
    axis = next((a for a in result.axes if a != "layer"), None)
    columns = ["all"] if axis is None else result.labels[axis]
    what = "restored" if settings.direction == "denoising" else "removed"
    part = {"heads": "head", "resid": "residual", "attn_out": "attention output", "mlp_out": "MLP output"}
    mean = ", mean over positions" if result.axes != swept.result.axes else ""
    return cells_value(
        swept.effects,
        range(layers),
        columns,
        row_name="layer",
        column_name=axis or "part",
        title=f"Share of the logit difference {metric_name(settings)} {what} by patching each {part[settings.sites]}"
        f"{mean}",
        unit=f"share of the logit difference {what} (1: all of it)",
        done=swept.done,
    )


def open_head(explorer: Explorer, session: Session, row: int, column: int) -> tuple[str, str]:
    """Open the clean image in the Look tab, at the clicked layer and head; return the view and its program."""
    swept: Swept = session.need("swept", "Run a sweep first.")
    settings, (rows, columns) = swept.settings, swept.effects.shape
    if not (0 <= row < rows and 0 <= column < columns):
        raise ValueError(f"No cell in row {row}, column {column}; the sweep has {rows} rows and {columns} columns.")
    with explorer.using(settings.model) as model:
        inputs = model.prepare(text=settings.prompt, images=settings.clean.image)
    session.kept["asked"] = look.Question(
        model=settings.model, pictures=(settings.clean,), prompt=settings.prompt, inputs=inputs, answer=""
    )
    view, code = look.look(explorer, session, settings.corrupted)
    opened = {"layer": row, **({"head": column} if settings.sites == "heads" else {})}
    shown = grid_of(swept.result)
    if "pos" in shown.axes:
        at = int(shown.labels["pos"][column])
        opened["patch" if bool(inputs.image_mask[0, at]) else "query"] = at
    return view_value(explorer.show(session, "look", view), **opened), code


def effects_on_image(explorer: Explorer, session: Session) -> str:
    """Return the view of a sweep over positions, for its slot: a map over the image, the text as a strip; "" else."""
    swept: Swept = session.kept["swept"]
    settings, result = swept.settings, swept.result
    if "image_grids" not in result.meta:
        return ""
    result = result.mean("head") if "head" in result.axes else result
    name = "share of the logit difference " + ("restored" if settings.direction == "denoising" else "removed")
    with explorer.using(settings.model) as model:
        base = settings.corrupted if settings.direction == "denoising" else settings.clean
        inputs = model.prepare(text=settings.prompt, images=base.image)
        view = effects_view(result, inputs, [base.image], model.tokenizer, name=name, title=settings.model)
    return view_value(explorer.show(session, "patch", view))


def run(explorer: Explorer, session: Session, settings: SweepSettings) -> Iterator[tuple[Any, ...]]:
    """Yield what the tab shows as layers are done: cells, status, the button of a smaller sweep, program, image."""
    try:
        plan, lines = check(explorer, settings)
    except TooLarge as error:
        session.kept["smaller"] = error.smaller
        too_large = f"**Too large.** {error}"
        yield gr.skip(), too_large, gr.update(visible=error.smaller is not None), gr.skip(), gr.skip()
        return
    cost = f"{plan.n_rows:,} runs, for about {plan.saving:.0f} times less computation than one by one."
    yield "", cost, gr.update(visible=False), lines, ""
    for swept in sweep(explorer, session, settings):
        done = f"{swept.done} of {len(swept.effects)} layers done."
        is_last = swept.done == len(swept.effects)
        image = effects_on_image(explorer, session) if is_last else gr.skip()
        yield shown_cells(swept), done, gr.skip(), gr.skip(), image
