"""The Look tab: ask about pictures, watch the answer come, and see where every word of it looked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from veena_lens.app.explorer import asking
from veena_lens.app.explorer.parts import Shared, code_box, export_box
from veena_lens.app.explorer.pictures import chosen, open_sample, samples, thumbnails
from veena_lens.app.explorer.slots import view_slot, view_value
from veena_lens.app.explorer.state import Session
from veena_lens.app.explorer.told import told

QUESTION = "how does the person in the picture feel?"


def build(shared: Shared) -> None:
    """The tab's components and what they do."""
    explorer = shared.explorer
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=260):
            uploads = gr.File(
                label="Pictures (drop one or several)",
                file_count="multiple",
                type="filepath",
                height=96,
                elem_classes="veena-drop",
                elem_id="uploads",
            )
            sample = gr.Dropdown(
                list(samples()), value=shared.first_sample, label="or a sample picture", elem_id="sample"
            )
            thumbs = gr.HTML(elem_id="thumbs", apply_default_css=False)
        with gr.Column(scale=3, min_width=320):
            prompt = gr.Textbox(
                QUESTION, label="Question", lines=2, elem_id="prompt", max_length=explorer.limits.prompt_characters
            )
            with gr.Row():
                go = gr.Button("Ask", variant="primary", elem_id="ask", scale=2)
                stop = gr.Button("Stop", elem_id="stop", scale=1)
            answer = gr.Textbox(label="Answer", interactive=False, lines=2, elem_id="answer")
            with gr.Accordion("Compare with a second picture, set lengths, open a cache", open=False, elem_id="more"):
                second = gr.Dropdown(
                    ["none", *samples()],
                    value="none",
                    label="Second picture with the same token grid",
                    elem_id="second",
                )
                length = gr.Slider(1, explorer.limits.new_tokens, 64, step=1, label="Longest answer (tokens)")
                lens = gr.Checkbox(False, label="Read caches with the chosen model, for the lens", elem_id="cache-lens")
                cache = gr.File(
                    label="An activation cache (.safetensors)",
                    type="filepath",
                    height=96,
                    elem_classes="veena-drop",
                    elem_id="cache",
                )
    view = view_slot("look-view")
    code = code_box("look-code")
    shared.look_view, shared.look_code = view, code

    @told
    def preview(paths: list[str] | None, name: str | None) -> str:
        pictures = chosen(paths, name, explorer.limits)
        return thumbnails([(p.image, Path(p.name).name) for p in pictures])

    @told
    def ask(
        model: str,
        paths: list[str] | None,
        name: str | None,
        question: str,
        other: str,
        most: float | int,
        request: gr.Request,
    ) -> Iterator[tuple[Any, Any, Any]]:
        session = explorer.session(request.session_hash)
        pictures = chosen(paths, name, explorer.limits)
        text = ""
        for text in asking.ask(explorer, session, model, pictures, question, int(most)):
            yield text, gr.skip(), gr.skip()
        yield text or "(nothing was said)", *shown(session, other)

    def shown(session: Session, other: str | None) -> tuple[str, str]:
        compared = None if other in (None, "none") else open_sample(other)
        found, program = asking.look(explorer, session, compared)
        return view_value(explorer.show(session, "look", found)), program

    @told
    def stopped(other: str, request: gr.Request) -> tuple[Any, Any, Any]:
        session = explorer.session(request.session_hash)
        asked = session.kept.get("asked")
        if asked is None:
            return gr.skip(), gr.skip(), gr.skip()
        return asked.answer or "(stopped before a word was said)", *shown(session, other)

    @told
    def opened(path: str | None, with_lens: bool, model: str, request: gr.Request) -> tuple[Any, Any, Any]:
        if not path:
            return gr.skip(), gr.skip(), gr.skip()
        session = explorer.session(request.session_hash)
        found, program = asking.look_at_cache(explorer, path, model if with_lens else None)
        session.kept.pop("asked", None)
        return view_value(explorer.show(session, "look", found)), program, f"(a cache: {Path(path).name})"

    sources = [shared.model, uploads, sample, prompt, second, length]
    asked = gr.on(
        [go.click, prompt.submit], ask, sources, [answer, view, code], concurrency_limit=4, api_visibility="private"
    )
    stop.click(stopped, second, [answer, view, code], cancels=[asked], api_visibility="private")
    uploads.change(preview, [uploads, sample], thumbs, api_visibility="private", show_progress="hidden")
    sample.change(preview, [uploads, sample], thumbs, api_visibility="private", show_progress="hidden")
    cache.upload(opened, [cache, lens, shared.model], [view, code, answer], api_visibility="private")
    export_box("look", lambda session: asking.export_look(explorer, session), explorer)

    @told
    def first(model: str, name: str | None, question: str, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """What the page opens with: the cache of the command line, or the sample on a small model."""
        if explorer.cache is not None:
            found = opened(str(explorer.cache), False, model, request)
            yield thumbnails([]), found[2], found[0], found[1]
            return
        shown = preview(None, name)
        yield shown, gr.skip(), gr.skip(), gr.skip()
        if shared.asks_at_once:
            for step in ask(model, None, name, question, "none", 64, request):
                yield (shown, *step)

    shared.loads.append((first, [shared.model, sample, prompt], [thumbs, answer, view, code]))
