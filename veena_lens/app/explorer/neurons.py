"""The Neurons tab: those that push most along the direction, the tokens they promote, the images that drive them.

Neurons of a direction: which push most, the tokens they promote, and the images that excite them.
"""

from __future__ import annotations

from typing import Any

import gradio as gr
import pandas as pd
import torch
from PIL import Image, ImageDraw

from veena_lens.app.explorer import directions
from veena_lens.app.explorer.directions import (
    FELT,
    Direction,
    DirectionAsked,
    direction_imports,
    direction_lines,
    settings,
)
from veena_lens.app.explorer.parts import Shared, code_box, export_box, program
from veena_lens.app.explorer.pictures import thumbnails
from veena_lens.app.explorer.state import Explorer, Session, told
from veena_lens.app.questions import FEELING
from veena_lens.checkpoints.files import bundled_pictures
from veena_lens.circuits import max_activating_tokens, promoted_tokens

SHOWN = 12  # tokens
N_PICTURES = 48


def strongest(direction: Direction) -> pd.DataFrame:
    """A direction's neurons: layer, neuron, push, and whether they push by being more active or less."""
    rows = [
        {
            "layer": la,
            "neuron": n,
            "push": round(v, 3),
            "being": "quieter" if (la, n) in direction.quieter else "louder",
        }
        for la, n, v in direction.neurons
    ]
    return pd.DataFrame(rows, columns=["layer", "neuron", "push", "being"])


def promoted(explorer: Explorer, name: str, layer: int, neuron: int) -> pd.DataFrame:
    """What a neuron's row of W_out raises and lowers most."""
    with explorer.using(name) as model:
        found = promoted_tokens(model, layer, neuron, k=SHOWN)
    texts = found.meta.get("texts") or [[str(i) for i in ids] for ids in found.meta["tokens"]]
    values = found.values.tolist()
    return pd.DataFrame(
        {
            "raises": texts[0],
            "by": [round(v, 3) for v in values[0]],
            "lowers": texts[1],
            "by ": [round(v, 3) for v in values[1]],
        }
    )


@torch.no_grad()
def exciting(explorer: Explorer, name: str, layer: int, neuron: int, k: int = 6) -> list[tuple[Image.Image, str]]:
    """The sample images whose tokens excite a neuron most, each once, the cell marked where it is one's."""
    pictures = [p for p in bundled_pictures("test") if p.context is None][:N_PICTURES]
    with explorer.using(name) as model:
        batches = [
            model.prepare(text=[FEELING] * len(some), images=[[p.open()] for p in some])
            for some in (pictures[start : start + 16] for start in range(0, len(pictures), 16))
        ]
        found = max_activating_tokens(model, batches, layer, [neuron], k=8 * k)
    out: list[tuple[Image.Image, str]] = []
    seen: set[int] = set()
    for value, where in zip(found.values[0].tolist(), found.meta["where"][0], strict=True):
        if where["row"] in seen or len(out) == k:
            continue
        seen.add(where["row"])
        picture = pictures[where["row"]]
        out.append(_marked(picture.open(), where, f"{picture.emotion}: {value:.2f}"))
    return out


def _marked(image: Image.Image, where: dict[str, Any], caption: str) -> tuple[Image.Image, str]:
    if "box" in where:
        pen = ImageDraw.Draw(image)
        pen.rectangle(where["box"], outline="#000000", width=5)
        pen.rectangle(where["box"], outline="#56B4E9", width=2)
        return image, caption
    word = where.get("text", "").strip() or f"position {where['pos']}"
    return image, f"{caption} at “{word}”"


def neurons_code(direction: Direction, layer: int, neuron: int) -> str:
    """The program behind the Neurons tab."""
    lead_in = settings(direction.asked).get("lead_in")
    reading = "" if lead_in is None else f", lead_in={lead_in!r}"
    body = [
        *direction_lines(direction, keeps_pairs=True),
        f"trace, _ = neuron_projections(model, chosen.pairs, directions{reading})",
        f"print(top_neurons(trace, {len(direction.neurons)}))",
        f"print(promoted_tokens(model, {layer}, {neuron}, k={SHOWN}).meta.get('texts'))",
        "shown = [pair.emotional for pair in chosen.pairs]",
        "inputs = model.prepare(text=[e.prompt for e in shown], images=[[e.picture] for e in shown])",
        f"print(max_activating_tokens(model, inputs, {layer}, [{neuron}], k=5).meta['where'])",
    ]
    body = [line.replace("'", '"') for line in body]
    imports = [
        *direction_imports(direction, "directions_from, neuron_projections, select_pairs"),
        "from veena_lens.circuits import max_activating_tokens, promoted_tokens, top_neurons",
    ]
    return program(imports, body)


def export_neurons(session: Session) -> list[str]:
    """The neurons as tables. Raises: ValueError before a direction was extracted."""
    direction: Direction = session.need("direction", "Extract a direction in the Steer tab first.")
    table = strongest(direction)
    paths = [session.folder / "neurons.csv", session.folder / "neurons.parquet"]
    table.to_csv(paths[0], index=False)
    table.to_parquet(paths[1], index=False)
    return [str(p) for p in paths]


LAST = "the direction found last"


def build(shared: Shared) -> None:
    """The tab's components and what they do."""
    explorer = shared.explorer
    with gr.Row(equal_height=True):
        emotion = gr.Dropdown([*FELT, LAST], value="happy", label="Direction of", elem_id="neuron-emotion", scale=3)
        go = gr.Button(
            "Find its neurons", variant="primary", elem_id="neurons-go", scale=1, min_width=160, elem_classes="veena-go"
        )
    gr.Markdown(
        "A neuron pushes by what it writes times how much more active the emotion makes it: louder where it writes "
        "along the direction, quieter where it writes against it.",
        elem_classes="veena-hint",
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=260):
            table = gr.Dataframe(
                headers=["layer", "neuron", "push", "being"],
                label="Strongest neurons (choose one)",
                interactive=False,
                max_height=360,
                elem_id="neurons",
            )
            which = gr.Textbox("", label="Layer.neuron", info="click a row, or type one such as 5.17", elem_id="which")
        with gr.Column(scale=3, min_width=320):
            tokens = gr.Dataframe(
                label="Tokens that it raises and lowers", interactive=False, max_height=360, elem_id="tokens"
            )
    pictures = gr.HTML(elem_id="drivers", apply_default_css=False)
    code = code_box("neurons-code")

    @told
    def find(model: str, wanted: str, request: gr.Request) -> tuple[Any, ...]:
        session = explorer.session(request.session_hash)
        if wanted == LAST:
            direction = current(request)
        else:
            direction = directions.extract(explorer, session, DirectionAsked(model=model, emotion=wanted))
        first = direction.neurons[0]
        return strongest(direction), f"{first[0]}.{first[1]}", *open_neuron(direction, first[0], first[1])

    def open_neuron(direction: Direction, layer: int, neuron: int) -> tuple[Any, ...]:
        found = exciting(explorer, direction.model, layer, neuron)
        return (
            promoted(explorer, direction.model, layer, neuron),
            thumbnails(found, 110),
            neurons_code(direction, layer, neuron),
        )

    def current(request: gr.Request) -> Direction:
        return explorer.session(request.session_hash).need(
            "direction", "Find a direction first, here or in the Steer tab."
        )

    @told
    def typed(text: str, request: gr.Request) -> tuple[Any, ...]:
        layer, _, neuron = text.strip().partition(".")
        if not (layer.isdigit() and neuron.isdigit()):
            raise ValueError(f"{text!r} names no neuron; write layer.neuron, for example 5.17.")
        return open_neuron(current(request), int(layer), int(neuron))

    @told
    def picked(event: gr.SelectData, request: gr.Request) -> tuple[Any, ...]:
        row = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
        direction = current(request)
        layer, neuron, _ = direction.neurons[int(row)]
        return f"{layer}.{neuron}", *open_neuron(direction, layer, neuron)

    go.click(find, [shared.model, emotion], [table, which, tokens, pictures, code], api_visibility="private")
    table.select(picked, None, [which, tokens, pictures, code], api_visibility="private")
    which.submit(typed, which, [tokens, pictures, code], api_visibility="private")
    export_box("neurons", export_neurons, explorer)
