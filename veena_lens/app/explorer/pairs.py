"""The Pairs tab: faces with and without an emotion, what the model says about both, and a way to the Patch tab."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr
import pandas as pd

from veena_lens.app.explorer.directions import FELT
from veena_lens.app.explorer.parts import Shared, code_box, export_box, table_files
from veena_lens.app.explorer.patch import pair_names
from veena_lens.app.explorer.pictures import thumbnails
from veena_lens.app.explorer.programs import make, model_of, program
from veena_lens.app.explorer.state import Explorer, Session, report_errors
from veena_lens.app.questions import FEELING
from veena_lens.emotion import load_pairs, sample_hit

if TYPE_CHECKING:
    from veena_lens import HookedVLM

MOST_PAIRS = 6


def answers_about_pairs(model: HookedVLM, emotion: str, question: str) -> pd.DataFrame:
    """Ask about both faces of the test pairs of an emotion; a hit names what is drawn."""
    pairs = load_pairs().select(split="test", condition="none", emotion=emotion)[:MOST_PAIRS]
    faces = [face for pair in pairs for face in (pair.emotional, pair.neutral)]
    inputs = model.prepare(text=[question] * len(faces), images=[[face.open()] for face in faces])
    texts = [text.strip() for text in model.generate(inputs, max_new_tokens=16)]
    hits = ["hit" if sample_hit(text, face.emotion) > 0.5 else "miss" for text, face in zip(texts, faces, strict=True)]
    return pd.DataFrame(
        {
            "pair": [f"{pair.emotion}, {pair.identity}" for pair in pairs],
            "emotional image": texts[::2],
            "hit": hits[::2],
            "neutral image": texts[1::2],
            "hit ": hits[1::2],
        }
    )


def answered(explorer: Explorer, session: Session, name: str, emotion: str) -> tuple[pd.DataFrame, str]:
    """Return the answers about the test pairs of an emotion, and the program. Raises: ValueError without pairs."""
    if emotion not in FELT:
        raise ValueError(f"There are no pairs of {emotion!r}; choose one of {', '.join(FELT)}.")
    with explorer.using(name) as model:
        table = make("table", answers_about_pairs, model_of(model, name), emotion, FEELING)
    session.kept["pairs"] = table.value
    return table.value, program(table, then=["print(table.to_string())"])


def export_pairs(session: Session) -> list[str]:
    """Write the answers as tables. Raises: ValueError before any were given."""
    table = session.need("pairs", "Show the pairs first; then there is something to export.")
    return [str(path) for path in table_files(table, session, "pairs")]


def build(shared: Shared) -> None:
    """Build the tab's components and say what they do."""
    explorer = shared.explorer
    with gr.Row(equal_height=True):
        emotion = gr.Dropdown(list(FELT), value="happy", label="Emotion", elem_id="pairs-emotion", scale=3)
        go = gr.Button(
            "Show and ask", variant="primary", elem_id="pairs-go", scale=1, min_width=160, elem_classes="veena-go"
        )
    faces = gr.HTML(elem_id="faces", apply_default_css=False)
    table = gr.Dataframe(label="Answers", interactive=False, wrap=True, elem_id="answers")
    with gr.Row(equal_height=True):
        names = [key for key, pair in pair_names().items() if pair.emotion == "happy"]
        which = gr.Dropdown(names, value=names[0], label="Pair", elem_id="which-pair", scale=3)
        use = gr.Button("Patch this pair", elem_id="use-pair", scale=1, min_width=160, elem_classes="veena-go")
    code = code_box("pairs-code")

    @report_errors
    def show(model: str, wanted: str, request: gr.Request) -> tuple[Any, ...]:
        session = explorer.session(request.session_hash)
        found, lines = answered(explorer, session, model, wanted)
        keys = list(found["pair"])
        both = [face for key in keys for face in (pair_names()[key].emotional, pair_names()[key].neutral)]
        shown = thumbnails([(face.open(), f"{face.identity}, {face.emotion}") for face in both], 104)
        return shown, found, gr.update(choices=keys, value=keys[0]), lines

    go.click(show, [shared.model, emotion], [faces, table, which, code], api_visibility="private")
    if shared.pair is not None:
        use.click(
            lambda key: (key, gr.Tabs(selected="patch")), which, [shared.pair, shared.tabs], api_visibility="private"
        )
    export_box("pairs", export_pairs, explorer)
