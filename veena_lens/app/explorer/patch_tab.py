"""The Patch tab: a pair of pictures, every head or every layer's residual patched, and a click that opens a head."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import gradio as gr

from veena_lens.app.explorer import asking, sweeping
from veena_lens.app.explorer.parts import Shared, code_box, export_box
from veena_lens.app.explorer.pictures import Shown, open_upload, thumbnails
from veena_lens.app.explorer.slots import cells_slot, cells_value, view_value
from veena_lens.app.explorer.state import Explorer, Session
from veena_lens.app.explorer.sweeping import SweepAsked, Swept, TooLarge
from veena_lens.app.explorer.told import told
from veena_lens.app.steps import NAME
from veena_lens.emotion import Pair, load_pairs

SITES = {"heads": "heads", "residual": "resid", "attention outputs": "attn_out", "MLP outputs": "mlp_out"}


@lru_cache(maxsize=1)
def pair_names() -> dict[str, Pair]:
    """Test pairs by a readable name."""
    return {f"{p.emotion}, {p.identity}": p for p in load_pairs().select(split="test", condition="none")}


def pair_of(name: str, uploads: list[str] | None, limits: Any) -> tuple[Shown, Shown]:
    """Two uploads, or a pair by name. Raises: ValueError for another number of uploads, or an unknown pair."""
    if uploads:
        if len(uploads) != 2:
            raise ValueError(f"A pair is two pictures, the one with the feature first; {len(uploads)} were given.")
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
    """The clean picture in the Look tab, at the clicked layer and head; and the code."""
    swept: Swept = session.need("swept", "Run a sweep first.")
    asked = swept.asked
    with explorer.using(asked.model) as model:
        inputs = model.prepare(text=asked.prompt, images=asked.clean.image)
    session.kept["asked"] = asking.Asked(
        model=asked.model, pictures=(asked.clean,), prompt=asked.prompt, inputs=inputs, answer=""
    )
    view, code = asking.look(explorer, session, asked.corrupted)
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
            prompt = gr.Textbox(NAME, label="Question", elem_id="patch-prompt")
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
            plan = sweeping.check(explorer, asked)
        except TooLarge as error:
            session.kept["smaller"] = error.smaller
            yield gr.skip(), f"**Too large.** {error}", gr.update(visible=error.smaller is not None), gr.skip()
            return
        with explorer.using(asked.model) as model:
            tokens = [sweeping.word_token(model, word) for word in asked.words]
        program = sweeping.sweep_code(asked, *tokens)
        yield (
            gr.skip(),
            f"{plan.n_rows:,} runs, about {plan.saving:.0f} times less than one by one.",
            gr.update(visible=False),
            program,
        )
        for swept in sweeping.sweep(explorer, session, asked):
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
    export_box("patch", sweeping.export_sweep, explorer)
