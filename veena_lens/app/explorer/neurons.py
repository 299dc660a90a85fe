"""The Neurons tab: those that contribute most to a direction, the tokens they promote, the images that excite them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr
import pandas as pd
import torch
from PIL import Image, ImageDraw

from veena_lens.app.explorer import directions
from veena_lens.app.explorer.directions import FELT, Direction, DirectionSettings
from veena_lens.app.explorer.parts import Shared, code_box, export_box, table_files
from veena_lens.app.explorer.pictures import thumbnails
from veena_lens.app.explorer.programs import make, model_of, program
from veena_lens.app.explorer.state import Explorer, Session, report_errors
from veena_lens.app.questions import FEELING
from veena_lens.checkpoints.files import bundled_pictures
from veena_lens.circuits import max_activating_tokens, promoted_tokens

if TYPE_CHECKING:
    from veena_lens import HookedVLM

LATEST = "the latest direction"


def strongest(direction: Direction) -> pd.DataFrame:
    """Return a direction's neurons: layer, neuron, projection, and whether they contribute by being more or less
    active."""
    rows = [
        {
            "layer": la,
            "neuron": n,
            "projection": round(v, 3),
            "activity": "lower" if (la, n) in direction.quieter else "higher",
        }
        for la, n, v in direction.neurons
    ]
    return pd.DataFrame(rows, columns=["layer", "neuron", "projection", "activity"])


def promoted(model: HookedVLM, layer: int, neuron: int, k: int = 12) -> pd.DataFrame:
    """Read off which tokens a neuron's row of W_out promotes and suppresses most."""
    found = promoted_tokens(model, layer, neuron, k=k)
    texts = found.meta.get("texts") or [[str(i) for i in ids] for ids in found.meta["tokens"]]
    up, down = ([round(v, 3) for v in values] for values in found.values.tolist())
    return pd.DataFrame({"promotes": texts[0], "by": up, "suppresses": texts[1], "by ": down})


@torch.no_grad()
def exciting(model: HookedVLM, layer: int, neuron: int, question: str, k: int = 6) -> list[tuple[Image.Image, str]]:
    """Find the sample images whose tokens excite a neuron most, each once, with the patch marked where it is one's."""
    pictures = [p for p in bundled_pictures("test") if p.context is None][:48]
    batches = [
        model.prepare(text=[question] * len(some), images=[[p.open()] for p in some])
        for some in (pictures[start : start + 16] for start in range(0, len(pictures), 16))
    ]
    found = max_activating_tokens(model, batches, layer, [neuron], k=8 * k)
    best: dict[int, tuple[Image.Image, str]] = {}
    for value, where in zip(found.values[0].tolist(), found.meta["where"][0], strict=True):
        if where["row"] not in best and len(best) < k:
            picture = pictures[where["row"]]
            best[where["row"]] = marked(picture.open(), where, f"{picture.emotion}: {value:.2f}")
    return list(best.values())


def marked(image: Image.Image, where: dict[str, Any], caption: str) -> tuple[Image.Image, str]:
    """Draw a frame around the patch that excites a neuron, or name the token."""
    if "box" in where:
        pen = ImageDraw.Draw(image)
        pen.rectangle(where["box"], outline="#000000", width=5)
        pen.rectangle(where["box"], outline="#56B4E9", width=2)
        return image, caption
    word = where.get("text", "").strip() or f"position {where['pos']}"
    return image, f"{caption} at “{word}”"


def look_at_neuron(
    explorer: Explorer, direction: Direction, layer: int, neuron: int
) -> tuple[pd.DataFrame, list[tuple[Image.Image, str]], str]:
    """Return the tokens that a neuron promotes, the images that excite it, and the program that finds both.

    Raises: ValueError for a neuron that the model does not have."""
    with explorer.using(direction.model) as loaded:
        model = model_of(loaded, direction.model)
        tokens = make("tokens", promoted, model, layer, neuron)
        images = make("images", exciting, model, layer, neuron, FEELING)
    then = ["print(neurons)", "print(tokens)", "print([caption for _, caption in images])"]
    return tokens.value, images.value, program(direction.made["neurons"], tokens, images, then=then)


def export_neurons(session: Session) -> list[str]:
    """Write the neurons as tables. Raises: ValueError before a direction was extracted."""
    direction: Direction = session.need("direction", "Extract a direction in the Steer tab first.")
    return [str(path) for path in table_files(strongest(direction), session, "neurons")]


def build(shared: Shared) -> None:
    """Build the tab's components and say what they do."""
    explorer = shared.explorer
    with gr.Row(equal_height=True):
        emotion = gr.Dropdown([*FELT, LATEST], value="happy", label="Direction of", elem_id="neuron-emotion", scale=3)
        go = gr.Button(
            "Find its neurons", variant="primary", elem_id="neurons-go", scale=1, min_width=160, elem_classes="veena-go"
        )
    gr.Markdown(
        "The contribution of a neuron is the projection of its output weights on the direction, times how much more "
        "active it is on the emotional images: higher activity where it writes along the direction, lower activity "
        "where it writes against it.",
        elem_classes="veena-hint",
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=260):
            table = gr.Dataframe(
                headers=["layer", "neuron", "projection", "activity"],
                label="Strongest neurons (choose one)",
                interactive=False,
                max_height=360,
                elem_id="neurons",
            )
            which = gr.Textbox("", label="Layer.neuron", info="click a row, or type one such as 5.17", elem_id="which")
        with gr.Column(scale=3, min_width=320):
            tokens = gr.Dataframe(
                label="Tokens that it promotes and suppresses", interactive=False, max_height=360, elem_id="tokens"
            )
    pictures = gr.HTML(elem_id="drivers", apply_default_css=False)
    code = code_box("neurons-code")

    def open_neuron(direction: Direction, layer: int, neuron: int) -> tuple[Any, ...]:
        promotes, excited, lines = look_at_neuron(explorer, direction, layer, neuron)
        return promotes, thumbnails(excited, 110), lines

    def current(request: gr.Request) -> Direction:
        session = explorer.session(request.session_hash)
        return session.need("direction", "Find a direction first, here or in the Steer tab.")

    @report_errors
    def find(model: str, wanted: str, request: gr.Request) -> tuple[Any, ...]:
        if wanted == LATEST:
            direction = current(request)
        else:
            session = explorer.session(request.session_hash)
            direction = directions.extract(explorer, session, DirectionSettings(model=model, emotion=wanted))
        layer, neuron, _ = direction.neurons[0]
        return strongest(direction), f"{layer}.{neuron}", *open_neuron(direction, layer, neuron)

    @report_errors
    def typed(text: str, request: gr.Request) -> tuple[Any, ...]:
        layer, _, neuron = text.strip().partition(".")
        if not (layer.isdigit() and neuron.isdigit()):
            raise ValueError(f"{text!r} does not name a neuron; write layer.neuron, for example 5.17.")
        return open_neuron(current(request), int(layer), int(neuron))

    @report_errors
    def picked(event: gr.SelectData, request: gr.Request) -> tuple[Any, ...]:
        row = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
        direction = current(request)
        layer, neuron, _ = direction.neurons[int(row)]
        return f"{layer}.{neuron}", *open_neuron(direction, layer, neuron)

    go.click(find, [shared.model, emotion], [table, which, tokens, pictures, code], api_visibility="private")
    table.select(picked, None, [which, tokens, pictures, code], api_visibility="private")
    which.submit(typed, which, [tokens, pictures, code], api_visibility="private")
    export_box("neurons", export_neurons, explorer)
