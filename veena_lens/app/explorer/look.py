"""The Look tab: ask about images, watch the answer come, and see where every word of it looked.

Asking a model about images, piece by piece, and the view of what it did.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from veena_lens.app.explorer.directions import Direction, direction_imports, direction_lines
from veena_lens.app.explorer.parts import Shared, code_box, export_box, listed, program, view_slot, view_value
from veena_lens.app.explorer.pictures import Shown, chosen, open_sample, samples, thumbnails
from veena_lens.app.explorer.state import Explorer, Session, by_name, told
from veena_lens.app.view import ExplorerView, open_cache, save_cache

IMPORTS = ("from veena_lens import HookedVLM", "from veena_lens.app.view import ExplorerView")


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """A question that was answered: what every other tab builds on."""

    model: str
    pictures: Sequence[Shown]
    prompt: str
    inputs: Any  # prepared, with the answer
    answer: str


def ask(
    explorer: Explorer, session: Session, name: str, pictures: Sequence[Shown], prompt: str, max_new_tokens: int
) -> Iterator[str]:
    """The answer as it grows; the session holds what is there so far as "asked".

    The model is free for others between two tokens; nothing is hooked meanwhile.
    Raises: ValueError for an empty or overlong prompt, or whatever the processor refuses."""
    limits = explorer.limits
    if not prompt.strip():
        raise ValueError("Write a question first.")
    if len(prompt) > limits.prompt_characters:
        raise ValueError(
            f"The question has {len(prompt):,} characters; the limit here is {limits.prompt_characters:,}."
        )
    with explorer.using(name) as model:
        inputs = model.prepare(text=prompt, images=[p.image for p in pictures] or None)
        steps = model.generate_stream(inputs, max_new_tokens=min(max_new_tokens, limits.new_tokens))
    text = ""
    while True:
        with explorer.using(name):
            piece = next(steps, None)
        text += piece or ""
        answered = inputs.with_answer(text) if text else inputs
        # Kept at each step: an answer that is stopped is one to look at as well.
        session.kept["asked"] = Asked(model=name, pictures=tuple(pictures), prompt=prompt, inputs=answered, answer=text)
        if piece is None:
            return
        yield text


def look(explorer: Explorer, session: Session, second: Shown | None = None) -> tuple[ExplorerView, str]:
    """The view of the last answer, and the code that makes it; `second`: an image of the same grid to compare."""
    asked: Asked = session.need("asked", "Ask something first.")
    found = session.kept.get("direction")
    direction = found if found is not None and found.model == asked.model else None
    with explorer.using(asked.model) as model:
        view = ExplorerView.from_run(
            model,
            asked.inputs,
            pictures=[p.image for p in asked.pictures],
            other=None if second is None else [second.image],
            directions=None if direction is None else {direction.emotion: direction.vectors},
            max_bytes=explorer.limits.view_bytes,
            title=asked.model,
        )
    return view, look_code(asked, second, direction)


def look_code(asked: Asked, second: Shown | None, direction: Direction | None = None) -> str:
    """The program behind the Look tab."""
    used = [*asked.pictures, *([] if second is None else [second])]
    settings = "answer=True"
    lines: list[str] = [f"model = HookedVLM.from_pretrained({asked.model!r})"]
    imports: list[str] = list(IMPORTS)
    if second is not None:
        settings += f", other={second.code}"
    if direction is not None:
        lines = direction_lines(direction)
        imports = [*IMPORTS[1:], *direction_imports(direction)]
        settings += f", directions={{{direction.emotion!r}: direction}}"
    body = [
        *lines,
        f"view = ExplorerView.from_run(model, ({listed(asked.pictures)}, {asked.prompt!r}), {settings})",
        'view.save("view.html")  # or view.widget() in a notebook',
    ]
    return program(imports, body, used)


def look_at_cache(explorer: Explorer, path: str | Path, name: str | None = None) -> tuple[ExplorerView, str]:
    """The view of a cache file and its code; with the `name` of a model also the lens, without it none is loaded.

    Raises: ValueError for a file that is no cache, was cut short, or is of another model."""
    limit = explorer.limits.view_bytes
    with by_name(path):
        opened = open_cache(path)
    if name is None:
        view = ExplorerView.from_cache(opened, max_bytes=limit)
    else:
        with explorer.using(name) as model:
            view = ExplorerView.from_cache(opened, model=model, max_bytes=limit)
    file, imports, body = Path(path).name, list(IMPORTS[1:]), []
    if name is not None:
        imports, body = list(IMPORTS), [f"model = HookedVLM.from_pretrained({name!r})"]
    body += [f"view = ExplorerView.from_cache({file!r}{'' if name is None else ', model=model'})"]
    return view, program(imports, [*body, 'view.save("view.html")'])


def cell_boxes_of(inputs: Any, image: int = 0) -> Any:
    """Boxes of the grid's cells row by row, in pixels of the image; None where they are not known."""
    boxes = None if inputs.patch_boxes is None else inputs.patch_boxes[0][image]
    if boxes is None or not inputs.grid_places:
        return boxes
    return boxes[list(inputs.grid_places[0][image])]


def export_look(explorer: Explorer, session: Session) -> list[str]:
    """The view as a page, an image and a table, and the run's cache; paths of the files.

    Raises: ValueError before anything was asked."""
    from veena_lens import plots
    from veena_lens.circuits import image_attention

    view: ExplorerView = session.need("look", "Ask something first; then there is something to export.")
    files = [view.save(session.folder / "view.html")]
    asked: Asked | None = session.kept.get("asked")
    if asked is None:
        return [str(f) for f in files]
    with explorer.using(asked.model) as model:
        parts = ("attn.hook_rot_q", "attn.hook_rot_k", "hook_resid_post")
        names = [n for n in model.hook_dict if n.startswith("blocks.") and n.endswith(parts)]
        _, cache = model.run_with_cache(asked.inputs, names_filter=names)
        windows = [model.cfg.window(layer) for layer in range(model.cfg.n_layers)]
        scores = image_attention(model, asked.inputs) if asked.pictures else None
    files.append(
        save_cache(
            cache,
            session.folder / "cache.safetensors",
            pictures=[p.image for p in asked.pictures],
            tokenizer=model.tokenizer,
            model_name=asked.model,
            windows=windows if any(windows) else None,
        )
    )
    if scores is not None:
        frame = scores.to_frame()
        frame.to_csv(session.folder / "attention.csv", index=False)
        frame.to_parquet(session.folder / "attention.parquet", index=False)
        files += [session.folder / "attention.csv", session.folder / "attention.parquet"]
        total = scores.values[0].sum((-1, -2)).mean(-1)
        best = scores.select(batch=0).mean("head").select(layer=int(total.argmax()))
        figure = plots.overlay(asked.pictures[0].image, best.values, patch_boxes=cell_boxes_of(asked.inputs))
        files.append(plots.save(figure, session.folder / "attention.png"))
    return [str(f) for f in files]


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
        for text in ask(explorer, session, model, pictures, question, int(most)):
            yield text, gr.skip(), gr.skip()
        yield text or "(nothing was said)", *shown(session, other)

    def shown(session: Session, other: str | None) -> tuple[str, str]:
        compared = None if other in (None, "none") else open_sample(other)
        found, program = look(explorer, session, compared)
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
        found, program = look_at_cache(explorer, path, model if with_lens else None)
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
    export_box("look", lambda session: export_look(explorer, session), explorer)

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
