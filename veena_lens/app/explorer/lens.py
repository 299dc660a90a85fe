"""The Lens tab: what the stream would say at each layer and position of the last question."""

from __future__ import annotations

from typing import Any

import gradio as gr

from veena_lens import plots
from veena_lens.app.explorer.look import Asked
from veena_lens.app.explorer.parts import (
    Shared,
    code_box,
    export_box,
    figure_html,
    listed,
    program,
    view_slot,
    view_value,
)
from veena_lens.app.explorer.patch import word_token
from veena_lens.app.explorer.state import Explorer, Session, told
from veena_lens.app.view import ExplorerView
from veena_lens.circuits import logit_lens
from veena_lens.scores import Scores

MOST_WORDS = 12
WORDS = "happy, sad, angry, surprised, neutral"


def words_in(text: str) -> list[str]:
    """Words between commas. Raises: ValueError for none, or too many."""
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not 1 <= len(words) <= MOST_WORDS:
        raise ValueError(f"Name 1 to {MOST_WORDS} words, with commas between; these are {len(words)}.")
    return words


def look_through(explorer: Explorer, session: Session, words: list[str]) -> tuple[ExplorerView, Scores, str]:
    """The view in lens mode, each word's probability by layer where the answer begins, and the code."""
    asked: Asked = session.need("asked", "Ask something in the Look tab first; its run is what the lens reads.")
    with explorer.using(asked.model) as model:
        tokens = [word_token(model, word) for word in words]
        view = ExplorerView.from_run(
            model,
            asked.inputs,
            pictures=[p.image for p in asked.pictures],
            modes=["lens", "norms"],
            words=tokens,
            max_bytes=1,
            title=f"{asked.model}, logit lens",
        )
        spans = asked.inputs.spans[0]
        every = logit_lens(model, asked.inputs, slice(spans.last, None), tokens, values="prob").select(batch=0)
        # Where in the answer one of the words comes closest to being said.
        place = int(every.values[-1].amax(-1).argmax())
        at = every.labels["pos"][place]
        after = model.tokenizer.decode(asked.inputs.tokens[0, at : at + 1])
    scores = Scores(
        every.values[:, place],
        ("layer", "word"),
        {"layer": every.labels["layer"], "word": words},
        "probability",
        meta={"position": at, "after": after.strip()},
    )
    session.kept["lens scores"] = scores
    body = [
        f"model = HookedVLM.from_pretrained({asked.model!r})",
        f"pictures = {listed(asked.pictures) if asked.pictures else None}",
        f"inputs = model.prepare(text={asked.prompt!r}, images=pictures, answer={asked.answer!r})",
        f"tokens = {tokens}  # {', '.join(words)}",
        f'scores = logit_lens(model, inputs, {at}, tokens, values="prob").select(batch=0)  # after {after.strip()!r}',
        "print(scores.to_frame())",
    ]
    if asked.pictures:
        body.append('maps = logit_lens_grid(model, inputs, tokens, values="prob")  # over the picture, layer by layer')
    imports = ["from veena_lens import HookedVLM", "from veena_lens.circuits import logit_lens_grid, logit_lens"]
    return view, scores, program(imports, body, asked.pictures)


def lines_of(scores: Scores) -> Any:
    """The words' probabilities over the layers."""
    return plots.curves(
        scores.values.T,
        x=scores.labels["layer"],
        x_name="layer",
        lines=scores.labels["word"],
        title=f"Said next after '{scores.meta['after']}', were this the last layer",
        name="probability",
    )


def export_lens(session: Session) -> list[str]:
    """The curves as an image and a table, the view as a page."""
    scores: Scores = session.need("lens scores", "Read the stream first; then there is something to export.")
    view: ExplorerView = session.need("lens", "Read the stream first; then there is something to export.")
    frame = scores.to_frame()
    frame.to_csv(session.folder / "lens.csv", index=False)
    frame.to_parquet(session.folder / "lens.parquet", index=False)
    figure = plots.save(lines_of(scores), session.folder / "lens.png")
    page = view.save(session.folder / "lens.html")
    return [str(f) for f in (figure, session.folder / "lens.csv", session.folder / "lens.parquet", page)]


def build(shared: Shared) -> None:
    """The tab's components and what they do."""
    explorer = shared.explorer
    with gr.Row(equal_height=True):
        words = gr.Textbox(WORDS, label="Words (with commas between)", elem_id="words", scale=4)
        go = gr.Button(
            "Read the stream", variant="primary", elem_id="lens-go", scale=1, min_width=160, elem_classes="veena-go"
        )
    view = view_slot("lens-view")
    figure = gr.HTML(elem_id="lens-figure", apply_default_css=False)
    code = code_box("lens-code")

    @told
    def read(text: str, request: gr.Request) -> tuple[str, str, str]:
        session = explorer.session(request.session_hash)
        found, scores, lines = look_through(explorer, session, words_in(text))
        named = scores.labels["word"]
        alt = f"Probability of {len(named)} words by layer; {named[int(scores.values[-1].argmax())]} leads at the end."
        opened = {"layer": len(scores.values) - 1, "query": scores.meta["position"]}
        return view_value(explorer.show(session, "lens", found), **opened), figure_html(lines_of(scores), alt), lines

    gr.on([go.click, words.submit], read, words, [view, figure, code], api_visibility="private")
    export_box("lens", export_lens, explorer)
