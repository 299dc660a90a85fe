"""The Pairs tab: faces with and without an emotion, what the model says about both, and a way to the Patch tab."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr
import pandas as pd

from veena_lens.app.explorer.directions import FELT
from veena_lens.app.explorer.examples import example
from veena_lens.app.explorer.exports import about, table_files
from veena_lens.app.explorer.parts import Shared, code_box, export_box
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
    """Ask about both faces of the test pairs of an emotion, and say which answers name what is drawn."""
    pairs = load_pairs().select(split="test", condition="none", emotion=emotion)[:MOST_PAIRS]
    faces = [face for pair in pairs for face in (pair.emotional, pair.neutral)]
    inputs = model.prepare(text=[question] * len(faces), images=[[face.open()] for face in faces])
    texts = [text.strip() for text in model.generate(inputs, max_new_tokens=16)]
    hits = ["yes" if sample_hit(text, face.emotion) > 0.5 else "no" for text, face in zip(texts, faces, strict=True)]
    return pd.DataFrame(
        {
            "pair": [f"{pair.emotion}, {pair.identity}" for pair in pairs],
            "answer to the emotional image": texts[::2],
            f"names {emotion}": hits[::2],
            "answer to the neutral image": texts[1::2],
            "names neutral": hits[1::2],
        }
    )


def answered(explorer: Explorer, session: Session, name: str, emotion: str) -> tuple[pd.DataFrame, str]:
    """Return the answers about the test pairs of an emotion, and the program. Raises: ValueError without pairs."""
    if emotion not in FELT:
        raise ValueError(f"There are no pairs of {emotion!r}; choose one of {', '.join(FELT)}.")
    with explorer.using(name) as model:
        table = make("table", answers_about_pairs, model_of(model, name), emotion, FEELING)
    session.kept["pairs"] = (name, emotion, table.value)
    return table.value, program(table, then=["print(table.to_string())"])


def export_pairs(session: Session) -> list[str]:
    """Write the answers as tables. Raises: ValueError before any were given."""
    model, emotion, table = session.need("pairs", "Show the pairs first; then there is something to export.")
    told = about(model, FEELING, emotion=emotion)
    del told["answer"]  # each row has two
    return [str(path) for path in table_files(table, session, "pairs", told)]


def faces_of(keys: Sequence[str]) -> str:
    """Return both faces of each pair as small images."""
    both = [face for key in keys for face in (pair_names()[key].emotional, pair_names()[key].neutral)]
    return thumbnails([(face.open(), f"{face.identity}, {face.emotion}") for face in both], 104)


def build(shared: Shared) -> None:
    """Build the tab's components and say what they do."""
    explorer = shared.explorer
    status = shared.status("pairs")
    gr.Markdown(
        "Does the model see the emotion, or only the person? The same drawn face is shown with an emotion and without "
        f"it; both are asked “{FEELING}”",
        elem_classes="veena-asks",
    )
    with gr.Row(equal_height=True):
        emotion = gr.Dropdown(list(FELT), value="happy", label="Emotion", elem_id="pairs-emotion", scale=3)
        go = gr.Button(
            "Show and ask", variant="primary", elem_id="pairs-go", scale=1, min_width=160, elem_classes="veena-go"
        )
    status.place_notice()
    sample = example()
    status.place_origin("Example, computed beforehand: tiny-llava-emotion · happy.")
    names = [key for key, pair in pair_names().items() if pair.emotion == "happy"]
    faces = gr.HTML(faces_of(list(sample.pairs["pair"])), elem_id="faces", apply_default_css=False)
    table = gr.Dataframe(sample.pairs, label="Answers", interactive=False, wrap=True, elem_id="answers")
    with gr.Row(equal_height=True):
        which = gr.Dropdown(names, value=names[0], label="Pair", elem_id="which-pair", scale=3)
        use = gr.Button("Patch this pair", elem_id="use-pair", scale=1, min_width=160, elem_classes="veena-go")
    code = code_box("pairs-code")

    @report_errors
    def show(model: str, wanted: str, request: gr.Request) -> tuple[Any, ...]:
        session = explorer.session(request.session_hash)
        status.begins(session)
        found, lines = answered(explorer, session, model, wanted)
        keys = list(found["pair"])
        status.shows(session, (model, wanted), f"{model} · {wanted}")
        return faces_of(keys), found, gr.update(choices=keys, value=keys[0]), lines

    status.listen([go.click], show, [shared.model, emotion], [faces, table, which, code])
    status.watch([shared.model, emotion])
    if shared.pair is not None:
        use.click(
            lambda key: (key, gr.Tabs(selected="patch")), which, [shared.pair, shared.tabs], api_visibility="private"
        )
    export_box("pairs", export_pairs, explorer, status)
