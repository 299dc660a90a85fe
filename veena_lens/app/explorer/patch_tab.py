"""The Patch tab: a pair of images, a sweep over heads or layers, its effects on the image, and the way into a head."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from veena_lens.app.explorer import look
from veena_lens.app.explorer.examples import example
from veena_lens.app.explorer.parts import Shared, cells_slot, code_box, export_box, file_box, view_slot
from veena_lens.app.explorer.patch import (
    SITES,
    WHERE,
    Choices,
    SweepSettings,
    export_sweep,
    open_head,
    pair_names,
    pair_of,
    run,
)
from veena_lens.app.explorer.pictures import samples, thumbnails
from veena_lens.app.explorer.state import Session, report_errors, takes
from veena_lens.app.questions import LIST


def build(shared: Shared) -> None:
    """Build the tab's components and say what they do."""
    explorer, names = shared.explorer, list(pair_names())
    status = shared.status("patch")
    gr.Markdown(
        "Which part of the model carries what differs between two images? The activations of one image's run are put, "
        "part by part, into the other's, and the answer's logit difference shows how much comes back.",
        elem_classes="veena-asks",
    )
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
                where = gr.Dropdown(
                    [(text, key) for key, text in WHERE.items()],
                    value="last",
                    label="Positions",
                    elem_id="where",
                )
                way = gr.Dropdown(["denoising", "noising"], value="denoising", label="Direction", elem_id="way")
            with gr.Row():
                go = gr.Button("Run the sweep", variant="primary", elem_id="sweep", scale=2)
                stop = gr.Button("Cancel", elem_id="cancel", scale=1)
            status.place_notice([right, wrong])
            progress = gr.Markdown("", elem_id="sweep-status")
            smaller = gr.Button("Run the smaller sweep", visible=False, elem_id="smaller")
    sample = example()
    status.place_origin(f"Example, computed beforehand: {sample.patch_text}.")
    on_image = view_slot("patch-view")
    cells = cells_slot("cells", sample.cells)
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
        settings = choices.settings(explorer.limits)
        yield from told(session, settings, tuple(vars(choices).values()))

    def told(session: Session, settings: SweepSettings, values: tuple[Any, ...] | None) -> Iterator[tuple[Any, ...]]:
        """Run a sweep; from its first step on it is what the tab shows."""
        for number, step in enumerate(run(explorer, session, settings)):
            if not isinstance(step[0], dict):  # not too large
                if number == 0:
                    status.begins(session)
                status.shows(session, values, settings.text)
            yield (*step, status.line(session))

    @report_errors
    def run_smaller(request: gr.Request) -> Iterator[tuple[Any, ...]]:
        session = explorer.session(request.session_hash)
        yield from told(session, session.need("smaller", "There is no smaller sweep; run one first."), None)

    @report_errors
    def opened(length: float | int, request: gr.Request, event: gr.EventData) -> tuple[Any, ...]:
        at = event._data if isinstance(event._data, dict) else json.loads(event._data)
        row, column = at.get("row"), at.get("column")
        if not (isinstance(row, int) and isinstance(column, int)):
            raise ValueError(f"A cell has a row and a column; got {at!r:.80}.")
        session = explorer.session(request.session_hash)
        view, lines = open_head(explorer, session, row, column)
        return view, lines, *filled(session, length), gr.Tabs(selected="look")

    def filled(session: Session, length: float | int) -> tuple[Any, ...]:
        """Fill the Look tab with the pair whose view it shows, so that its choices and its result agree."""
        settings: SweepSettings = session.kept["swept"].settings
        both = (settings.clean, settings.corrupted)
        names = [next((key for key, p in samples().items() if p.file == given.name), None) for given in both]
        own = settings.clean.path
        image, second = (None, look.NO_SECOND) if own else (names[0], names[1] or look.NO_SECOND)
        files = [own] if own else None
        values = (settings.model, files, image, settings.prompt, second, length)
        text = f"{look.asked_in_words(settings.model, [Path(g.name).name for g in both], settings.prompt)} · as patched"
        shared.look.status.begins(session)
        shared.look.status.shows(session, values, text)
        faces = thumbnails([(both[0].image, Path(both[0].name).name)])
        answer = "(no answer: the view shows the question's last position, from which the sweep reads)"
        line = shared.look.status.line(session)
        return files, image, settings.prompt, second, faces, answer, line, settings.model

    sources = [shared.model, pair, uploads, prompt, right, wrong, sites, where, way]
    outputs = [cells, progress, smaller, code, on_image, status.of]
    look_of: dict[str, Any] = {"concurrency_limit": 4, "show_progress": "minimal"}
    events = [
        status.listen([go.click], chosen, sources, outputs, **look_of),
        status.listen([smaller.click], run_smaller, None, outputs, **look_of),
    ]
    cancelled = "Cancelled; finished layers are kept."
    stop.click(lambda: cancelled, None, progress, cancels=events, api_visibility="private")
    status.watch(sources)
    changes = [pair.change, uploads.change]
    status.listen(changes, preview, [pair, uploads], [thumbs, right], clears=[thumbs], show_progress="hidden")
    shared.loads.append((preview, [pair, uploads], [thumbs, right]))
    into = [*shared.look.all(), shared.look.status.of, shared.model, shared.tabs]
    status.listen([cells.select], opened, [shared.look.length], into, keeps=True)
    export_box("patch", export_sweep, explorer, status)
