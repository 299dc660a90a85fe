"""The Lens tab: what each layer predicts at each position of the last question."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gradio as gr

from veena_lens import plots
from veena_lens.app.explorer.examples import example
from veena_lens.app.explorer.exports import about, captioned, keep_pinned, table_files
from veena_lens.app.explorer.look import Question, prepared
from veena_lens.app.explorer.parts import Shared, code_box, export_box, figure_html, view_slot, view_value
from veena_lens.app.explorer.programs import make, model_of, program
from veena_lens.app.explorer.state import Explorer, Session, report_errors
from veena_lens.app.explorer.words import named, single_token
from veena_lens.app.view import ExplorerView
from veena_lens.circuits import logit_lens
from veena_lens.scores import Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from veena_lens import HookedVLM, MultimodalInputs

MOST_WORDS = 12
WORDS = "happy, sad, angry, surprised, neutral"


def words_in(text: str) -> list[str]:
    """Return the words between commas. Raises: ValueError for none, or too many."""
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not 1 <= len(words) <= MOST_WORDS:
        raise ValueError(f"Got {len(words)} words; name 1 to {MOST_WORDS} words, separated by commas.")
    return words


def tokens_of(model: HookedVLM, words: list[str]) -> list[int]:
    """Return the token of each word. Raises: ValueError for one that is several."""
    return [single_token(model, word) for word in words]


def probabilities_by_layer(model: HookedVLM, inputs: MultimodalInputs, tokens: list[int], words: list[str]) -> Scores:
    """Read each word's probability in every layer, where in the answer one of them is most likely in the last."""
    last = inputs.spans[0].last
    every = logit_lens(model, inputs, slice(last, None), tokens, values="prob").select(batch=0)
    place = int(every.values[-1].amax(-1).argmax())
    at = every.labels["pos"][place]
    after = model.tokenizer.decode(inputs.tokens[0, at : at + 1]).strip()
    labels = {"layer": every.labels["layer"], "word": [named(model, word) for word in words]}
    about = {"position": at, "after": after}
    return Scores(every.values[:, place], ("layer", "word"), labels, "probability", meta=about)


def curves_of(scores: Scores) -> Figure:
    """Draw the words' probabilities over the layers."""
    return plots.curves(
        scores.values.T,
        x=scores.labels["layer"],
        x_name="layer",
        lines=scores.labels["word"],
        title=f"Probability of the word after “{scores.meta['after']}”, read from each layer",
        name="probability",
    )


def look_through(explorer: Explorer, session: Session, words: list[str]) -> tuple[ExplorerView, Scores, str]:
    """Return the view in lens mode, each word's probability by layer, and the program that makes both."""
    asked: Question = session.need("asked", "Ask something in the Look tab first; the lens reads its run.")
    with explorer.using(asked.model) as loaded:
        model = model_of(loaded, asked.model)
        inputs = make("inputs", prepared, model, asked.images, asked.prompt, asked.answer)
        tokens = make("tokens", tokens_of, model, words)
        scores = make("scores", probabilities_by_layer, model, inputs, tokens, words)
        settings = {"pictures": asked.images, "modes": ["lens", "norms"], "words": tokens}
        settings |= {"title": f"{asked.model}, logit lens"}
        view = make("view", ExplorerView.from_run, model, inputs, hidden={"max_bytes": 1}, **settings)
    session.kept["lens scores"], session.kept["lens asked"] = scores.value, asked
    figure = make("figure", curves_of, scores)
    then = ['plots.save(figure, "lens.png")', 'view.save("lens.html")']
    return view.value, scores.value, program(figure, view, then=then)


def export_lens(session: Session) -> list[str]:
    """Write the curves as an image and a table, the view as a page; return the paths."""
    nothing = "Read the layers first; then there is something to export."
    scores: Scores = session.need("lens scores", nothing)
    view: ExplorerView = session.need("lens", nothing)
    asked: Question = session.kept["lens asked"]
    told = about(asked.model, asked.prompt, asked.answer, position=scores.meta["position"], after=scores.meta["after"])
    figure = plots.save(captioned(curves_of(scores), told), session.folder / "lens.png")
    pinned = {"layer": len(scores.values) - 1, "query": scores.meta["position"]} | session.pinned.get("lens", {})
    page = replace(view, header={**view.header, "open": pinned, "about": told}).save(session.folder / "lens.html")
    return [str(f) for f in (figure, *table_files(scores.to_frame(), session, "lens", told), page)]


def asked_now(session: Session) -> Any:
    """Return what tells the run that the lens reads from others."""
    asked: Question | None = session.kept.get("asked")
    return asked and (asked.model, asked.prompt, asked.answer, *(p.name for p in asked.pictures))


def build(shared: Shared) -> None:
    """Build the tab's components and say what they do."""
    explorer = shared.explorer
    status = shared.status("lens", also=asked_now)
    gr.Markdown(
        "From which layer on does the model know what it will say? Each layer's residual stream is read as if it were "
        "the last; the question is the one asked in the Look tab.",
        elem_classes="veena-asks",
    )
    with gr.Row(equal_height=True):
        words = gr.Textbox(
            WORDS, label="Words, separated by commas (each one token; #id names a token)", elem_id="words", scale=4
        )
        go = gr.Button(
            "Read the layers", variant="primary", elem_id="lens-go", scale=1, min_width=160, elem_classes="veena-go"
        )
    status.place_notice([words])
    sample = example()
    status.place_origin(f"Example, computed beforehand: {sample.text}.")
    figure = gr.HTML(figure_html(curves_of(sample.lens), sample.text), elem_id="lens-figure", apply_default_css=False)
    view = view_slot("lens-view")
    code = code_box("lens-code")

    @report_errors
    def read(text: str, request: gr.Request) -> tuple[str, str, str]:
        session = explorer.session(request.session_hash)
        status.begins(session)
        found, scores, lines = look_through(explorer, session, words_in(text))
        named = scores.labels["word"]
        best = named[int(scores.values[-1].argmax())]
        alt = f"Probability of {len(named)} words by layer; {best} has the highest in the last layer."
        opened = {"layer": len(scores.values) - 1, "query": scores.meta["position"]}
        shown = view_value(explorer.show(session, "lens", found), **opened)
        status.shows(session, [text], f"{session.kept['lens asked'].text} · words {', '.join(named)}")
        return shown, figure_html(curves_of(scores), alt), lines

    @report_errors
    def pinned(request: gr.Request, event: gr.EventData) -> None:
        keep_pinned(explorer.session(request.session_hash), "lens", event)

    status.listen([go.click, words.submit], read, words, [view, figure, code])
    status.watch([words])
    each: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "multiple", "concurrency_limit": 1}
    view.select(pinned, None, None, api_visibility="private", **each)
    export_box("lens", export_lens, explorer, status)
