"""The Patch tab: a pair of images, every head or every layer's residual patched, and a click that opens a head.

A sweep runs layer by layer: it shows its progress, stops between layers, and is estimated before it starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import gradio as gr
import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.app.explorer import look
from veena_lens.app.explorer.look import first_token
from veena_lens.app.explorer.parts import (
    Shared,
    cells_slot,
    cells_value,
    code_box,
    export_box,
    file_box,
    table_files,
    view_value,
)
from veena_lens.app.explorer.pictures import GivenImage, open_upload, require_processable, thumbnails
from veena_lens.app.explorer.programs import Made, make, model_of, program
from veena_lens.app.explorer.state import Explorer, Limits, Session, report_errors, size, takes
from veena_lens.app.questions import LIST
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
    right, wrong = (first_token(model, word) for word in words)
    if right == wrong:
        raise ValueError(f"{words[0]!r} and {words[1]!r} begin with the same token; choose other words.")
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
    figure = plots.save(swept.result.plot(), session.folder / "patching.png")
    own = swept.result.save(session.folder / "patching.safetensors")
    return [str(f) for f in (figure, *table_files(swept.result.to_frame(), session, "patching"), own)]


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
    words = " − ".join(f"“{word}”" for word in settings.words)
    return cells_value(
        swept.effects,
        range(layers),
        columns,
        row_name="layer",
        column_name=axis or "part",
        title=f"Share of the logit difference {words} {what} by patching each {part[settings.sites]}{mean}",
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
    return view_value(explorer.show(session, "look", view), **opened), code


def run(explorer: Explorer, session: Session, settings: SweepSettings) -> Iterator[tuple[Any, ...]]:
    """Yield what the tab shows as layers are done: cells, status, the button of a smaller sweep, program."""
    try:
        plan, lines = check(explorer, settings)
    except TooLarge as error:
        session.kept["smaller"] = error.smaller
        yield gr.skip(), f"**Too large.** {error}", gr.update(visible=error.smaller is not None), gr.skip()
        return
    cost = f"{plan.n_rows:,} runs, for about {plan.saving:.0f} times less computation than one by one."
    yield gr.skip(), cost, gr.update(visible=False), lines
    for swept in sweep(explorer, session, settings):
        yield shown_cells(swept), f"{swept.done} of {len(swept.effects)} layers done.", gr.skip(), gr.skip()


def build(shared: Shared) -> None:
    """Build the tab's components and say what they do."""
    explorer, names = shared.explorer, list(pair_names())
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=260):
            pair = gr.Dropdown(names, value=names[0], label="Pair: emotional and neutral", elem_id="pair")
            uploads = file_box("or two images of your own", "pair-uploads", several=True)
            thumbs = gr.HTML(elem_id="pair-thumbs", apply_default_css=False)
        with gr.Column(scale=3, min_width=320):
            prompt = gr.Textbox(LIST, label="Question", elem_id="patch-prompt")
            with gr.Row():
                right = gr.Textbox(names[0].split(",")[0], label="Word for the first image", elem_id="right")
                wrong = gr.Textbox("neutral", label="Word for the second image", elem_id="wrong")
            with gr.Row():
                sites = gr.Dropdown(list(SITES), value="heads", label="What is patched", elem_id="sites")
                where = gr.Dropdown(["last", "query", "each"], value="last", label="Positions", elem_id="where")
                way = gr.Dropdown(["denoising", "noising"], value="denoising", label="Direction", elem_id="way")
            with gr.Row():
                go = gr.Button("Run the sweep", variant="primary", elem_id="sweep", scale=2)
                stop = gr.Button("Cancel", elem_id="cancel", scale=1)
            status = gr.Markdown("", elem_id="sweep-status")
            smaller = gr.Button("Run the smaller sweep", visible=False, elem_id="smaller")
    cells = cells_slot("cells")
    gr.Markdown("Click a cell to open that layer and head in the Look tab.", elem_classes="veena-hint")
    code = code_box("patch-code")
    shared.pair = pair

    @report_errors
    def preview(name: str, paths: list[str] | None, request: gr.Request) -> tuple[Any, Any]:
        explorer.own(explorer.session(request.session_hash), paths)
        first, second = pair_of(name, paths, explorer.limits)
        word = gr.skip() if paths else name.split(",")[0]
        return thumbnails([(first.image, "first"), (second.image, "second")], 96), word

    @takes(explorer, Choices)
    def chosen(choices: Choices, session: Session) -> Iterator[tuple[Any, ...]]:
        explorer.own(session, choices.uploads)
        yield from run(explorer, session, choices.settings(explorer.limits))

    @report_errors
    def run_smaller(request: gr.Request) -> Iterator[tuple[Any, ...]]:
        session = explorer.session(request.session_hash)
        yield from run(explorer, session, session.need("smaller", "There is no smaller sweep; run one first."))

    @report_errors
    def opened(request: gr.Request, event: gr.EventData) -> tuple[Any, ...]:
        at = event._data if isinstance(event._data, dict) else json.loads(event._data)
        row, column = at.get("row"), at.get("column")
        if not (isinstance(row, int) and isinstance(column, int)):
            raise ValueError(f"A cell has a row and a column; got {at!r:.80}.")
        view, lines = open_head(explorer, explorer.session(request.session_hash), row, column)
        return view, lines, gr.Tabs(selected="look")

    sources = [shared.model, pair, uploads, prompt, right, wrong, sites, where, way]
    outputs = [cells, status, smaller, code]
    look_of: dict[str, Any] = {"concurrency_limit": 4, "api_visibility": "private", "show_progress": "minimal"}
    events: Any = [go.click(chosen, sources, outputs, **look_of), smaller.click(run_smaller, None, outputs, **look_of)]
    stop.click(lambda: "Cancelled; finished layers are kept.", None, status, cancels=events, api_visibility="private")
    gr.on(
        [pair.change, uploads.change],
        preview,
        [pair, uploads],
        [thumbs, right],
        api_visibility="private",
        show_progress="hidden",
    )
    shared.loads.append((preview, [pair, uploads], [thumbs, right]))
    shared.opens_head = (cells, opened)
    export_box("patch", export_sweep, explorer)
