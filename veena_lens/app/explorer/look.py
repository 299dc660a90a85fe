"""The Look tab: ask about images, watch the answer grow, and see where every word of it looked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from veena_lens.app.explorer.directions import Direction
from veena_lens.app.explorer.exports import keep_pinned, look_files
from veena_lens.app.explorer.parts import Shared, code_box, export_box, file_box, view_slot, view_value
from veena_lens.app.explorer.pictures import GivenImage, chosen, open_sample, require_processable, samples, thumbnails
from veena_lens.app.explorer.programs import Made, make, model_of, program
from veena_lens.app.explorer.state import Explorer, Session, reading, report_errors, size, takes
from veena_lens.app.explorer.status import Status
from veena_lens.app.questions import FEELING
from veena_lens.app.view import ExplorerView, mean_map_bytes, open_cache

if TYPE_CHECKING:
    from veena_lens import HookedVLM, MultimodalInputs

SAVE = 'view.save("view.html")  # or view.widget() in a notebook'
NO_SECOND = "none"
MOST_SHOWN = 120  # characters of a question in a line


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """A question that was answered: what every other tab builds on. `inputs`: prepared, with the answer."""

    model: str
    pictures: Sequence[GivenImage]
    prompt: str
    inputs: MultimodalInputs
    answer: str

    @property
    def text(self) -> str:
        """Say in words what was asked."""
        return asked_in_words(self.model, [Path(p.name).name for p in self.pictures], self.prompt)

    @property
    def images(self) -> list[Made]:
        """Return the images as a program opens them."""
        return [picture.made for picture in self.pictures]


def asked_in_words(model: str, images: Sequence[str], question: str) -> str:
    """Return model, images and question as a line says them."""
    short = question if len(question) <= MOST_SHOWN else f"{question[:MOST_SHOWN]} …"
    return " · ".join([model, *(images or ["no image"]), f"“{short}”"])


@dataclass(frozen=True)
class Choices:
    """What is chosen on the tab, in the order of its components."""

    model: str
    uploads: list[str] | None
    sample: str | None
    prompt: str
    second: str | None
    max_new_tokens: float | int


@dataclass(frozen=True, kw_only=True)
class LookParts:
    """The components of the tab that another one may fill, and its status."""

    status: Status
    uploads: Any
    sample: Any
    prompt: Any
    second: Any
    thumbs: Any
    answer: Any
    view: Any
    code: Any
    length: Any

    def all(self) -> list[Any]:
        """Return the components in the order in which `open_head` fills them."""
        return [self.view, self.code, self.uploads, self.sample, self.prompt, self.second, self.thumbs, self.answer]


def ask(
    explorer: Explorer,
    session: Session,
    name: str,
    pictures: Sequence[GivenImage],
    prompt: str,
    max_new_tokens: int,
) -> Iterator[str]:
    """Yield the answer as it grows; the session holds what is there so far as "asked".

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
        require_processable(model, pictures, limits)
        inputs = model.prepare(text=prompt, images=[p.image for p in pictures] or None)
        steps = model.generate_stream(inputs, max_new_tokens=min(max_new_tokens, limits.new_tokens))
    text = ""
    while True:
        # The model that began: where it was replaced in the meantime, a view may still use it.
        with explorer.alone(model):
            piece = next(steps, None)
        text += piece or ""
        answered = inputs.with_answer(text) if text else inputs
        # Kept at each step: an answer that is stopped can be looked at as well.
        session.kept["asked"] = Question(
            model=name, pictures=tuple(pictures), prompt=prompt, inputs=answered, answer=text
        )
        if piece is None:
            return
        yield text


def look(explorer: Explorer, session: Session, second: GivenImage | None = None) -> tuple[ExplorerView, str]:
    """Return the view of the last answer, and the program that makes it; `second`: an image of the same grid to
    compare."""
    asked: Question = session.need("asked", "Ask something first.")
    settings: dict[str, Any] = {"answer": asked.answer} if asked.answer else {}
    if second is not None:
        settings["other"] = second.made
    direction: Direction | None = session.kept.get("direction")
    if direction is not None and direction.model == asked.model:
        settings["directions"] = {direction.emotion: direction.made["direction"]}
    hidden = {"max_bytes": explorer.limits.view_bytes, "title": asked.model}
    with explorer.using(asked.model) as model:
        source = (asked.images, asked.prompt)
        view = make("view", ExplorerView.from_run, model_of(model, asked.model), source, hidden=hidden, **settings)
    return view.value, program(view, then=[SAVE])


def look_at_cache(explorer: Explorer, path: str | Path, name: str | None = None) -> tuple[ExplorerView, str]:
    """Return the view of a cache file and its program; with the `name` of a model it has the lens, too.

    Raises: ValueError for a file that is not a cache, was cut short, or is of another model."""
    limits = explorer.limits
    with reading(path, "an activation cache"):
        opened = open_cache(path, max_pixels=limits.pixels)
        needed = mean_map_bytes(opened.cache)
        if needed > limits.maps_bytes:
            raise ValueError(
                f"{Path(path).name} is of too long a prompt: its view needs {size(needed)} of maps, and the limit here "
                f"is {size(limits.maps_bytes)}. Save a cache of a shorter one."
            )
        file = Made(opened, repr(Path(path).name))
        hidden = {"max_bytes": limits.view_bytes}
        if name is None:
            view = make("view", ExplorerView.from_cache, file, hidden=hidden)
        else:
            with explorer.using(name) as model:
                view = make("view", ExplorerView.from_cache, file, model=model_of(model, name), hidden=hidden)
        return view.value, program(view, then=[SAVE])


def prepared(model: HookedVLM, images: list, question: str, answer: str) -> MultimodalInputs:
    """Prepare a question about images, with its answer."""
    inputs = model.prepare(text=question, images=images or None)
    return inputs.with_answer(answer) if answer else inputs


def export_look(explorer: Explorer, session: Session) -> list[str]:
    """Write what is shown and pinned as a page, an image and a table, and the run's cache; return the paths.

    Raises: ValueError before anything was asked."""
    view: ExplorerView = session.need("look", "Ask something first; then there is something to export.")
    return look_files(explorer, session, view, session.kept.get("asked"))


def build(shared: Shared) -> None:
    """Build the tab's components and say what they do."""
    explorer = shared.explorer
    status = shared.status("look")
    gr.Markdown(
        "Ask a question about an image. Which cells of the image does the model look at when it says each word?",
        elem_classes="veena-asks",
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=260):
            uploads = file_box("Images (drop one or several)", "uploads", several=True)
            sample = gr.Dropdown(
                list(samples()), value=shared.first_sample, label="or a sample image", elem_id="sample"
            )
            thumbs = gr.HTML(elem_id="thumbs", apply_default_css=False)
        with gr.Column(scale=3, min_width=320):
            prompt = gr.Textbox(
                FEELING, label="Question", lines=2, elem_id="prompt", max_length=explorer.limits.prompt_characters
            )
            with gr.Row():
                go = gr.Button("Ask", variant="primary", elem_id="ask", scale=2)
                stop = gr.Button("Stop", elem_id="stop", scale=1)
            status.place_notice()
            answer = gr.Textbox(label="Answer", interactive=False, lines=2, elem_id="answer")
            with gr.Accordion("Compare with a second image, set lengths, open a cache", open=False, elem_id="more"):
                second = gr.Dropdown(
                    [NO_SECOND, *samples()],
                    value=NO_SECOND,
                    label="Second image with the same token grid",
                    elem_id="second",
                )
                length = gr.Slider(
                    1, explorer.limits.new_tokens, 64, step=1, label="Maximum length of the answer (tokens)"
                )
                lens = gr.Checkbox(
                    False, label="Use the chosen model to add the logit lens to caches", elem_id="cache-lens"
                )
                cache = file_box("An activation cache (.safetensors)", "cache")
    status.place_origin()
    view = view_slot("look-view")
    code = code_box("look-code")
    shared.look = LookParts(
        status=status,
        uploads=uploads,
        sample=sample,
        prompt=prompt,
        second=second,
        thumbs=thumbs,
        answer=answer,
        view=view,
        code=code,
        length=length,
    )

    def shown(session: Session, other: str | None, values: Sequence[Any] | None) -> tuple[str, str]:
        compared = None if other in (None, NO_SECOND) else open_sample(str(other))
        found, lines = look(explorer, session, compared)
        asked: Question = session.kept["asked"]
        text = asked.text + (f" · compared with {Path(compared.name).name}" if compared else "")
        status.shows(session, values, text)
        return view_value(explorer.show(session, "look", found)), lines

    def preview(paths: list[str] | None, name: str | None, request: gr.Request) -> str:
        explorer.own(explorer.session(request.session_hash), paths)
        pictures = chosen(paths, name, explorer.limits)
        return thumbnails([(p.image, Path(p.name).name) for p in pictures])

    def answered(choices: Choices, session: Session) -> Iterator[tuple[Any, Any, Any]]:
        explorer.own(session, choices.uploads)
        pictures = chosen(choices.uploads, choices.sample, explorer.limits)
        text, values = "", tuple(vars(choices).values())
        session.asking = values
        status.begins(session)
        for text in ask(explorer, session, choices.model, pictures, choices.prompt, int(choices.max_new_tokens)):
            yield text, "", ""  # the map of the last answer does not stand beside a new one
        yield text or "(empty answer)", *shown(session, choices.second, values)

    @report_errors
    def stopped(other: str, request: gr.Request) -> tuple[Any, Any, Any]:
        session = explorer.session(request.session_hash)
        asked = session.kept.get("asked")
        if asked is None:
            return gr.skip(), gr.skip(), gr.skip()
        return asked.answer or "(stopped before the first token)", *shown(session, other, session.asking)

    def opened(path: str | None, with_lens: bool, model: str, session: Session) -> tuple[Any, Any, Any, Any]:
        if not path:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        found, lines = look_at_cache(explorer, path, model if with_lens else None)
        session.kept.pop("asked", None)
        status.shows(session, None, f"the cache {Path(path).name}, whatever is chosen above")
        text = f"(a cache: {Path(path).name})"
        return view_value(explorer.show(session, "look", found)), lines, text, thumbnails([])

    @report_errors
    def uploaded(path: str | None, with_lens: bool, model: str, request: gr.Request) -> tuple[Any, Any, Any, Any]:
        session = explorer.session(request.session_hash)
        explorer.own(session, path)
        return opened(path, with_lens, model, session)

    @report_errors
    def first(model: str, name: str | None, question: str, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Return what the page opens with: the cache of the command line, or the sample on a small model."""
        session = explorer.session(request.session_hash)
        if explorer.cache is not None:
            found = opened(str(explorer.cache), False, model, session)
            yield found[3], found[2], found[0], found[1], status.line(session)
            return
        faces = preview(None, name, request)
        yield faces, gr.skip(), gr.skip(), gr.skip(), gr.skip()
        if shared.asks_at_once:
            for step in answered(Choices(model, None, name, question, NO_SECOND, 64), session):
                yield (faces, *step, status.line(session))

    @report_errors
    def pinned(request: gr.Request, event: gr.EventData) -> None:
        keep_pinned(explorer.session(request.session_hash), "look", event)

    sources = [shared.model, uploads, sample, prompt, second, length]
    asked = status.listen(
        [go.click, prompt.submit],
        takes(explorer, Choices)(answered),
        sources,
        [answer, view, code],
        concurrency_limit=4,
    )
    status.listen([stop.click], stopped, second, [answer, view, code], cancels=[asked])
    status.watch(sources)
    quietly: dict[str, Any] = {"show_progress": "hidden"}
    for component in (uploads, sample):
        status.listen([component.change], report_errors(preview), [uploads, sample], thumbs, clears=[thumbs], **quietly)
    status.listen([cache.upload], uploaded, [cache, lens, shared.model], [view, code, answer, thumbs])
    each: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "multiple", "concurrency_limit": 1}
    view.select(pinned, None, None, api_visibility="private", **each)
    export_box("look", lambda session: export_look(explorer, session), shared.explorer, status)
    shared.loads.append((first, [shared.model, sample, prompt], [thumbs, answer, view, code, status.of]))
