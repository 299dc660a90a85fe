"""The Pairs tab: faces with and without an emotion, what the model says of both, and a way to the Patch tab."""

from __future__ import annotations

from typing import Any

import gradio as gr
import pandas as pd
import torch

from veena_lens.app.explorer.directions import FELT
from veena_lens.app.explorer.parts import Shared, code_box, export_box, program
from veena_lens.app.explorer.patch import pair_names
from veena_lens.app.explorer.pictures import thumbnails
from veena_lens.app.explorer.state import Explorer, Session, told
from veena_lens.app.explorer.steer import is_hit
from veena_lens.app.questions import FEELING

MOST = 6


@torch.no_grad()
def answered(explorer: Explorer, session: Session, name: str, emotion: str) -> pd.DataFrame:
    """What the model says of each test pair of an emotion, and whether it names what is drawn."""
    pairs = [(key, pair) for key, pair in pair_names().items() if pair.emotion == emotion][:MOST]
    if not pairs:
        raise ValueError(f"No pairs of {emotion!r}; there are: {', '.join(FELT)}.")
    pictures: Any = [picture for _, pair in pairs for picture in (pair.emotional, pair.neutral)]
    with explorer.using(name) as model:
        texts = model.generate(
            model.prepare(text=[FEELING] * len(pictures), images=[[p.open()] for p in pictures]), max_new_tokens=16
        )
    rows = []
    for i, (key, pair) in enumerate(pairs):
        said = [text.strip() for text in texts[2 * i : 2 * i + 2]]
        hits = [is_hit(text, p.emotion) for text, p in zip(said, (pair.emotional, pair.neutral), strict=True)]
        rows.append(
            {
                "pair": key,
                "of the emotional": said[0],
                "hit": "hit" if hits[0] else "miss",
                "of the neutral": said[1],
                "hit ": "hit" if hits[1] else "miss",
            }
        )
    table = pd.DataFrame(rows)
    session.kept["pairs"] = table
    return table


def pairs_code(name: str, emotion: str) -> str:
    """The program behind the Pairs tab."""
    body = [
        f"model = HookedVLM.from_pretrained({name!r})",
        f'pairs = load_pairs().select(split="test", condition="none", emotion={emotion!r})[:{MOST}]',
        "for pair in pairs:",
        "    pictures = [[pair.emotional.open()], [pair.neutral.open()]]",
        f"    inputs = model.prepare(text=[{FEELING!r}] * 2, images=pictures)",
        "    texts = model.generate(inputs, max_new_tokens=16)",
        "    hits = [sample_hit(texts[0], pair.emotion), sample_hit(texts[1], 'neutral')]".replace("'", '"'),
        "    print(pair.identity, texts, hits)",
    ]
    return program(["from veena_lens import HookedVLM", "from veena_lens.emotion import load_pairs, sample_hit"], body)


def export_pairs(session: Session) -> list[str]:
    """The answers as tables. Raises: ValueError before any were given."""
    table: pd.DataFrame = session.need("pairs", "Show the pairs first; then there is something to export.")
    paths = [session.folder / "pairs.csv", session.folder / "pairs.parquet"]
    table.to_csv(paths[0], index=False)
    table.to_parquet(paths[1], index=False)
    return [str(p) for p in paths]


def build(shared: Shared) -> None:
    """The tab's components and what they do."""
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

    @told
    def show(model: str, wanted: str, request: gr.Request) -> tuple[Any, ...]:
        session = explorer.session(request.session_hash)
        found = answered(explorer, session, model, wanted)
        pairs = [pair_names()[key] for key in found["pair"]]
        both = [picture for pair in pairs for picture in (pair.emotional, pair.neutral)]
        pictures = [(p.open(), f"{p.identity}, {p.emotion}") for p in both]
        keys = list(found["pair"])
        return thumbnails(pictures, 104), found, gr.update(choices=keys, value=keys[0]), pairs_code(model, wanted)

    go.click(show, [shared.model, emotion], [faces, table, which, code], api_visibility="private")
    if shared.pair is not None:
        use.click(
            lambda key: (key, gr.Tabs(selected="patch")), which, [shared.pair, shared.tabs], api_visibility="private"
        )
    export_box("pairs", export_pairs, explorer)
