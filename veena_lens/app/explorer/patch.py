"""The Patch tab: a pair of images, every head or every layer's residual patched, and a click that opens a head.

Patching a pair of images layer by layer: progress, cancelling between layers, and an estimate before the start.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import gradio as gr
import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.app.explorer import look
from veena_lens.app.explorer.parts import Shared, cells_slot, cells_value, code_box, export_box, program, view_value
from veena_lens.app.explorer.pictures import Shown, open_upload, thumbnails
from veena_lens.app.explorer.state import Explorer, Session, told
from veena_lens.app.questions import LIST
from veena_lens.emotion import Pair, load_pairs
from veena_lens.scores import Scores
from veena_lens.sweeps import patch_sweep
from veena_lens.sweeps.metrics import Metric, logit_diff
from veena_lens.sweeps.plan import Plan

TOGETHER = 512  # rows of a sweep that travel together unless memory asks for fewer
STEPS = 32  # a sweep of more layers takes several a step


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepAsked:
    """A pair, what is patched and where, and the two words whose logits are compared."""

    model: str
    clean: Shown
    corrupted: Shown
    prompt: str
    words: tuple[str, str]
    sites: str = "heads"
    positions: str = "last"
    direction: str = "denoising"
    max_rows: int = TOGETHER


@dataclass(frozen=True, kw_only=True, eq=False)
class Swept:
    """What is done so far: effects [layer column], NaN where nothing ran yet."""

    asked: SweepAsked
    effects: Float[Tensor, "layer column"]
    done: int
    result: Scores | None = None


class TooLarge(ValueError):
    """A sweep over the memory limit, and the smaller one that would fit (None: none would)."""

    def __init__(self, text: str, smaller: SweepAsked | None) -> None:
        super().__init__(text)
        self.smaller = smaller


def word_token(model: Any, word: str) -> int:
    """The first token of a word as it follows a space."""
    if not word.strip():
        raise ValueError("Name two words whose logits are compared, for example happy and neutral.")
    ids = model.tokenizer(f" {word.strip()}", add_special_tokens=False)["input_ids"]
    return int(ids[0])


def check(explorer: Explorer, asked: SweepAsked) -> Plan:
    """The sweep's plan. Raises: TooLarge, with the estimate and a smaller sweep; ValueError for one that cannot be."""
    with explorer.using(asked.model) as model:
        clean, corrupted, _ = _prepared(model, asked)
        plan = _sweep(model, clean, corrupted, asked, plan_only=True)
        limit = explorer.limits.sweep_bytes
        needed = plan.row_bytes * min(plan.n_rows, asked.max_rows)
        if needed <= limit:
            return plan
        fitting = limit // plan.row_bytes
        told = (
            f"This sweep has {plan.n_rows:,} rows and would hold about {size(needed)} at once; the limit here is "
            f"{size(limit)}."
        )
        if fitting >= 1:
            smaller = _with(asked, max_rows=int(fitting))
            raise TooLarge(f"{told} In batches of {fitting:,} rows it fits, and takes longer.", smaller)
        if asked.positions != "last":
            last = _with(asked, positions="last")
            one = _sweep(model, clean, corrupted, last, plan_only=True)
            if one.row_bytes <= limit:
                rows = int(min(one.n_rows, TOGETHER, limit // one.row_bytes))
                smaller = _with(last, max_rows=rows)
                raise TooLarge(
                    f"{told} At the last position alone it needs about {size(one.row_bytes * rows)}.", smaller
                )
        raise TooLarge(f"{told} A single row needs {size(plan.row_bytes)}: use a shorter prompt.", None)


def size(n: float | int) -> str:
    """Bytes in words."""
    for unit, scale in (("GB", 2**30), ("MB", 2**20), ("KB", 2**10)):
        if n >= scale:
            return f"{n / scale:.1f} {unit}"
    return f"{n:.0f} bytes"


def sweep(explorer: Explorer, session: Session, asked: SweepAsked) -> Iterator[Swept]:
    """The effects as they come, layer by layer from the first; the last one has the whole result.

    Whoever stops reading stops the sweep: the model is used within a step only. What was run is kept on the server, so
    the same sweep goes on where it stopped. Raises: as `check`, before anything runs."""
    check(explorer, asked)
    parts: list[Scores] = []
    n = 0
    while True:
        with explorer.using(asked.model) as model:
            layers = model.cfg.n_layers
            step = list(range(n, min(layers, n + max(1, layers // STEPS))))
            clean, corrupted, metric = _prepared(model, asked)
            parts.append(
                _sweep(model, clean, corrupted, asked, metric=metric, layers=step, out=explorer.folder / "sweeps")
            )
        n = step[-1] + 1
        result = joined(parts)
        found = result.scores if result.scores.ndim == 2 else result.scores[:, None]
        effects = torch.full((layers, found.shape[1]), torch.nan)
        effects[:n] = found.float().cpu()
        swept = Swept(asked=asked, effects=effects, done=n, result=result)
        session.kept["swept"] = swept
        yield swept
        if n == layers:
            return


def joined(parts: list[Scores]) -> Scores:
    """Sweeps of some layers each as one."""
    first = parts[0]
    labels = {**first.labels, "layer": [layer for part in parts for layer in part.labels["layer"]]}
    values = torch.cat([part.values for part in parts])
    return replace(first, values=values, labels=labels)


def _with(asked: SweepAsked, **changed: Any) -> SweepAsked:
    return SweepAsked(**{**vars(asked), **changed})


def _prepared(model: Any, asked: SweepAsked) -> tuple[Any, Any, Metric]:
    clean, corrupted = (
        model.prepare(text=asked.prompt, images=shown.image) for shown in (asked.clean, asked.corrupted)
    )
    right, wrong = (word_token(model, word) for word in asked.words)
    if right == wrong:
        raise ValueError(f"{asked.words[0]!r} and {asked.words[1]!r} begin with the same token; choose other words.")
    return clean, corrupted, logit_diff(right, wrong)


def _sweep(model: Any, clean: Any, corrupted: Any, asked: SweepAsked, **settings: Any) -> Any:
    return patch_sweep(
        model,
        clean,
        corrupted,
        sites=asked.sites,
        positions=asked.positions,
        direction=asked.direction,
        max_rows=asked.max_rows,
        progress=False,
        **settings,
    )


def sweep_code(asked: SweepAsked, right: int, wrong: int) -> str:
    """The program behind the Patch tab."""
    where = f"sites={asked.sites!r}, positions={asked.positions!r}, direction={asked.direction!r}"
    body = [
        f"model = HookedVLM.from_pretrained({asked.model!r})",
        f"question = {asked.prompt!r}",
        f"clean = model.prepare(text=question, images={asked.clean.code})",
        f"corrupted = model.prepare(text=question, images={asked.corrupted.code})",
        f"metric = logit_diff({right}, {wrong})  # {asked.words[0]!r} against {asked.words[1]!r}",
        f"result = patch_sweep(model, clean, corrupted, {where}, metric=metric)",
        "print(result.top(10))",
        'plots.save(result.plot(), "patching.png")',
    ]
    imports = [
        "from veena_lens import HookedVLM, plots",
        "from veena_lens.sweeps import patch_sweep",
        "from veena_lens.sweeps.metrics import logit_diff",
    ]
    return program(imports, body, [asked.clean, asked.corrupted])


def export_sweep(session: Session) -> list[str]:
    """The sweep so far as an image, a table and its own file. Raises: ValueError before one ran."""
    from veena_lens import plots

    swept: Swept = session.need("swept", "Run a sweep first; then there is something to export.")
    assert swept.result is not None
    frame = swept.result.to_frame()
    frame.to_csv(session.folder / "patching.csv", index=False)
    frame.to_parquet(session.folder / "patching.parquet", index=False)
    figure = plots.save(swept.result.plot(), session.folder / "patching.png")
    own = swept.result.save(session.folder / "patching.safetensors")
    return [str(f) for f in (figure, session.folder / "patching.csv", session.folder / "patching.parquet", own)]


SITES = {"heads": "heads", "residual": "resid", "attention outputs": "attn_out", "MLP outputs": "mlp_out"}


@lru_cache(maxsize=1)
def pair_names() -> dict[str, Pair]:
    """Test pairs by a readable name."""
    return {f"{p.emotion}, {p.identity}": p for p in load_pairs().select(split="test", condition="none")}


def pair_of(name: str, uploads: list[str] | None, limits: Any) -> tuple[Shown, Shown]:
    """Two uploads, or a pair by name. Raises: ValueError for another number of uploads, or an unknown pair."""
    if uploads:
        if len(uploads) != 2:
            raise ValueError(f"A pair is two images, the one with the feature first; {len(uploads)} were given.")
        return open_upload(uploads[0], limits), open_upload(uploads[1], limits)
    if name not in pair_names():
        raise ValueError(f"No pair {name!r}.")
    pair = pair_names()[name]
    first, second = (Shown(image=p.open(), name=p.file, is_sample=True) for p in (pair.emotional, pair.neutral))
    return first, second


def shown_cells(swept: Swept) -> str:
    """The grid of effects so far."""
    result = swept.result
    assert result is not None
    layers = len(swept.effects)
    axis = next((a for a in result.axes if a != "layer"), None)
    columns = ["all"] if axis is None else result.labels[axis]
    what = "restores" if swept.asked.direction == "denoising" else "breaks"
    words = " over ".join(swept.asked.words)
    return cells_value(
        swept.effects,
        range(layers),
        columns,
        row_name="layer",
        column_name=axis or "part",
        title=f"How much of “{words}” each {swept.asked.sites.rstrip('s')} {what} (0 nothing, 1 all)",
        done=swept.done,
    )


def open_head(explorer: Explorer, session: Session, row: int, column: int) -> tuple[str, str]:
    """The clean image in the Look tab, at the clicked layer and head; and the code."""
    swept: Swept = session.need("swept", "Run a sweep first.")
    asked = swept.asked
    with explorer.using(asked.model) as model:
        inputs = model.prepare(text=asked.prompt, images=asked.clean.image)
    session.kept["asked"] = look.Asked(
        model=asked.model, pictures=(asked.clean,), prompt=asked.prompt, inputs=inputs, answer=""
    )
    view, code = look.look(explorer, session, asked.corrupted)
    opened = {"layer": row, **({"head": column} if asked.sites == "heads" else {})}
    return view_value(explorer.show(session, "look", view), **opened), code


def build(shared: Shared) -> None:
    """The tab's components and what they do."""
    explorer, names = shared.explorer, list(pair_names())
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=260):
            pair = gr.Dropdown(names, value=names[0], label="Pair: emotional and neutral", elem_id="pair")
            uploads = gr.File(
                label="or two pictures of your own",
                file_count="multiple",
                type="filepath",
                height=96,
                elem_classes="veena-drop",
                elem_id="pair-uploads",
            )
            thumbs = gr.HTML(elem_id="pair-thumbs", apply_default_css=False)
        with gr.Column(scale=3, min_width=320):
            prompt = gr.Textbox(LIST, label="Question", elem_id="patch-prompt")
            with gr.Row():
                right = gr.Textbox(
                    names[0].split(",")[0], label="Word that the first picture calls for", elem_id="right"
                )
                wrong = gr.Textbox("neutral", label="Word that the second calls for", elem_id="wrong")
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

    @told
    def preview(name: str, paths: list[str] | None) -> tuple[Any, Any]:
        first, second = pair_of(name, paths, explorer.limits)
        word = gr.skip() if paths else name.split(",")[0]
        return thumbnails([(first.image, "first"), (second.image, "second")], 96), word

    def steps(asked: SweepAsked, session: Session) -> Iterator[tuple[Any, ...]]:
        """Rows of (cells, status, smaller, code) as layers are done."""
        try:
            plan = check(explorer, asked)
        except TooLarge as error:
            session.kept["smaller"] = error.smaller
            yield gr.skip(), f"**Too large.** {error}", gr.update(visible=error.smaller is not None), gr.skip()
            return
        with explorer.using(asked.model) as model:
            tokens = [word_token(model, word) for word in asked.words]
        program = sweep_code(asked, *tokens)
        yield (
            gr.skip(),
            f"{plan.n_rows:,} runs, about {plan.saving:.0f} times less than one by one.",
            gr.update(visible=False),
            program,
        )
        for swept in sweep(explorer, session, asked):
            text = f"{swept.done} of {len(swept.effects)} layers done."
            yield shown_cells(swept), text, gr.skip(), gr.skip()

    @told
    def run(
        model: str,
        name: str,
        paths: list[str] | None,
        question: str,
        first_word: str,
        second_word: str,
        what: str,
        positions: str,
        direction: str,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        session = explorer.session(request.session_hash)
        clean, corrupted = pair_of(name, paths, explorer.limits)
        asked = SweepAsked(
            model=model,
            clean=clean,
            corrupted=corrupted,
            prompt=question,
            words=(first_word, second_word),
            sites=SITES[what],
            positions=positions,
            direction=direction,
        )
        yield from steps(asked, session)

    @told
    def run_smaller(request: gr.Request) -> Iterator[tuple[Any, ...]]:
        session = explorer.session(request.session_hash)
        yield from steps(session.need("smaller", "There is no smaller sweep; run one first."), session)

    @told
    def opened(request: gr.Request, event: gr.EventData) -> tuple[Any, ...]:
        at = event._data if isinstance(event._data, dict) else json.loads(event._data)
        view, program = open_head(explorer, explorer.session(request.session_hash), int(at["row"]), int(at["column"]))
        return view, program, gr.Tabs(selected="look")

    sources = [shared.model, pair, uploads, prompt, right, wrong, sites, where, way]
    outputs = [cells, status, smaller, code]
    events: Any = [
        go.click(run, sources, outputs, concurrency_limit=4, api_visibility="private", show_progress="minimal"),
        smaller.click(
            run_smaller, None, outputs, concurrency_limit=4, api_visibility="private", show_progress="minimal"
        ),
    ]
    stop.click(lambda: "Cancelled; what was run stays.", None, status, cancels=events, api_visibility="private")
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
