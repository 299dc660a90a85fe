"""The Neurons tab: those that contribute most to a direction, the tokens they promote, the images that excite them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import pandas as pd
import torch
from PIL import Image, ImageDraw

from veena_lens.app.explorer import directions
from veena_lens.app.explorer.contrasts import FOLDER, SIDES, images_in
from veena_lens.app.explorer.directions import FELT, Direction, DirectionSettings
from veena_lens.app.explorer.examples import example
from veena_lens.app.explorer.exports import about, table_files
from veena_lens.app.explorer.parts import Shared, code_box, export_box
from veena_lens.app.explorer.pictures import thumbnails
from veena_lens.app.explorer.programs import Made, make, model_of, program
from veena_lens.app.explorer.state import Explorer, Session, report_errors
from veena_lens.app.explorer.words import single_token
from veena_lens.app.questions import FEELING
from veena_lens.checkpoints.files import bundled_pictures
from veena_lens.circuits import max_activating_tokens, promoted_tokens
from veena_lens.circuits.neurons import row_logits
from veena_lens.images.files import open_image

if TYPE_CHECKING:
    from veena_lens import HookedVLM

LATEST = "the latest direction of the Steer tab"


def neuron_name(layer: int, neuron: int) -> str:
    """Return the name of a neuron, as everywhere: L5N17."""
    return f"L{layer}N{neuron}"


def neuron_of(text: str) -> tuple[int, int]:
    """Read a neuron's name, L5N17 or 5.17. Raises: ValueError for anything else."""
    found = re.fullmatch(r"[lL]?(\d{1,6})[.nN](\d{1,9})", text.strip())
    if found is None:
        raise ValueError(f"{text!r} does not name a neuron; write layer and neuron as L5N17.")
    return int(found[1]), int(found[2])


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


def promoted_word(model: HookedVLM, layer: int, neuron: int, word: str) -> str:
    """Say by how much a neuron's row of W_out promotes a word. Raises: ValueError for one of several tokens."""
    token = single_token(model, word)
    logits = row_logits(model, layer, [neuron])[0]
    rank, text = 1 + int((logits > logits[token]).sum()), model.tokenizer.decode([token])
    said, by = "promotes" if logits[token] > 0 else "suppresses", abs(float(logits[token]))
    return f"{neuron_name(layer, neuron)} {said} “{text}” by {by:.3f}: rank {rank:,} of {len(logits):,}."


@torch.no_grad()
def exciting(
    model: HookedVLM, layer: int, neuron: int, question: str, files: Sequence[str] = (), k: int = 6
) -> list[tuple[Image.Image, str]]:
    """Find the images whose tokens excite a neuron most, each once, with the patch marked where it is one's.

    files: of the images; without any, the sample faces."""
    faces = [p for p in bundled_pictures("test") if p.context is None][:48]
    shown = [(open_image(file), Path(file).stem) for file in files] or [(p.open(), p.emotion) for p in faces]
    size = 1 if files else 16  # a visitor's images differ in size
    batches = [
        model.prepare(text=[question] * len(some), images=[[image] for image, _ in some])
        for some in (shown[start : start + size] for start in range(0, len(shown), size))
    ]
    found = max_activating_tokens(model, batches, layer, [neuron], k=8 * k)
    best: dict[int, tuple[Image.Image, str]] = {}
    for value, where in zip(found.values[0].tolist(), found.meta["where"][0], strict=True):
        if where["row"] not in best and len(best) < k:
            image, name = shown[where["row"]]
            best[where["row"]] = marked(image.copy(), where, f"{name}: {value:.2f}")
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
        sides = " + ".join(f'images_in("{FOLDER}/{side}")' for side in SIDES)
        files = Made(list(direction.images), sides, functions=(images_in,))
        own: dict[str, Any] = {"files": files} if direction.images else {}
        images = make("images", exciting, model, layer, neuron, FEELING, **own)
    then = ["print(neurons)", "print(tokens)", "print([caption for _, caption in images])"]
    return tokens.value, images.value, program(direction.made["neurons"], tokens, images, then=then)


def export_neurons(session: Session) -> list[str]:
    """Write the neurons, and what the chosen one promotes, as tables. Raises: ValueError before there are some."""
    direction: Direction = session.need("direction", "Extract a direction in the Steer tab first.")
    told = about(direction.model, direction=direction.emotion)
    del told["question"], told["answer"]
    files = table_files(strongest(direction), session, "neurons", told)
    if "neuron" in session.kept:
        name, tokens = session.kept["neuron"]
        files += table_files(tokens, session, f"tokens-{name}", {**told, "of": name})
    return [str(path) for path in files]


def build(shared: Shared) -> None:
    """Build the tab's components and say what they do."""
    explorer = shared.explorer
    status = shared.status("neurons")
    gr.Markdown(
        "Which neurons write a direction, which words do they promote, and which parts of which images excite them? "
        "For images or prompts of your own, make the direction in the Steer tab and choose it here.",
        elem_classes="veena-asks",
    )
    with gr.Row(equal_height=True):
        emotion = gr.Dropdown([*FELT, LATEST], value="happy", label="Direction of", elem_id="neuron-emotion", scale=3)
        go = gr.Button(
            "Find its neurons", variant="primary", elem_id="neurons-go", scale=1, min_width=160, elem_classes="veena-go"
        )
    word = gr.Textbox("", label="A word", info="does the neuron promote it? (optional; one token)", render=False)
    word.elem_id = "neuron-word"
    status.place_notice([word])
    gr.Markdown(
        "The contribution of a neuron is the projection of its output weights on the direction, times how much more "
        "active it is on the emotional images (the first set): higher activity where it writes along the direction, "
        "lower activity where it writes against it.",
        elem_classes="veena-hint",
    )
    sample = example()
    status.place_origin(f"Example, computed beforehand: tiny-llava-emotion · happy, {sample.neuron}.")
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=260):
            table = gr.Dataframe(
                sample.neurons,
                label="Strongest neurons (choose one)",
                interactive=False,
                max_height=360,
                elem_id="neurons",
            )
            which = gr.Textbox("", label="Neuron", info="click a row, or type one such as L5N17", elem_id="which")
            word.render()
        with gr.Column(scale=3, min_width=320):
            tokens = gr.Dataframe(
                sample.tokens,
                label="Tokens that it promotes and suppresses (by: logits per unit of activation)",
                interactive=False,
                max_height=360,
                elem_id="tokens",
            )
            of_word = gr.Markdown("", elem_id="of-word")
    gr.Markdown("Images that excite it most, with its activation and the cell where it is so active:")
    pictures = gr.HTML(elem_id="drivers", apply_default_css=False)
    code = code_box("neurons-code")

    def open_neuron(session: Session, direction: Direction, place: tuple[int, int], text: str) -> tuple[Any, ...]:
        status.begins(session)
        promotes, excited, lines = look_at_neuron(explorer, direction, *place)
        with explorer.using(direction.model) as model:
            said = promoted_word(model, *place, text) if text.strip() else ""
        name = neuron_name(*place)
        session.kept["neuron"] = (name, promotes)
        status.shows(session, session.finding, f"{direction.model} · {direction.emotion}, {name}")
        return promotes, thumbnails(excited, 110), lines, said

    def current(session: Session) -> Direction:
        return session.need("direction", "Find a direction first, here or in the Steer tab.")

    @report_errors
    def find(model: str, wanted: str, text: str, request: gr.Request) -> tuple[Any, ...]:
        session = explorer.session(request.session_hash)
        if wanted == LATEST:
            direction = current(session)
        else:
            direction = directions.extract(explorer, session, DirectionSettings(model=model, emotion=wanted))
        session.finding = (model, wanted)
        layer, neuron, _ = direction.neurons[0]
        opened = open_neuron(session, direction, (layer, neuron), text)
        return strongest(direction), neuron_name(layer, neuron), *opened

    @report_errors
    def typed(name: str, text: str, request: gr.Request) -> tuple[Any, ...]:
        session, place = explorer.session(request.session_hash), neuron_of(name)
        return open_neuron(session, current(session), place, text)

    @report_errors
    def picked(text: str, request: gr.Request, event: gr.SelectData) -> tuple[Any, ...]:
        row = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
        session = explorer.session(request.session_hash)
        layer, neuron, _ = current(session).neurons[int(row)]
        return neuron_name(layer, neuron), *open_neuron(session, current(session), (layer, neuron), text)

    shown = [tokens, pictures, code, of_word]
    status.listen([go.click], find, [shared.model, emotion, word], [table, which, *shown])
    status.listen([table.select], picked, [word], [which, *shown])
    status.listen([which.submit, word.submit], typed, [which, word], shown)
    status.watch([shared.model, emotion])
    export_box("neurons", export_neurons, explorer, status)
