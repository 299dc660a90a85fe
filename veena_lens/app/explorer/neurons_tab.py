"""The Neurons tab: those that push most along the direction, the tokens they promote, the pictures that drive them."""

from __future__ import annotations

from typing import Any

import gradio as gr

from veena_lens.app.explorer import directions, tracing
from veena_lens.app.explorer.directions import FELT, Direction, DirectionAsked
from veena_lens.app.explorer.parts import Shared, code_box, export_box
from veena_lens.app.explorer.pictures import thumbnails
from veena_lens.app.explorer.told import told

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
        return tracing.strongest(direction), f"{first[0]}.{first[1]}", *open_neuron(direction, first[0], first[1])

    def open_neuron(direction: Direction, layer: int, neuron: int) -> tuple[Any, ...]:
        found = tracing.exciting(explorer, direction.model, layer, neuron)
        return (
            tracing.promoted(explorer, direction.model, layer, neuron),
            thumbnails(found, 110),
            tracing.neurons_code(direction, layer, neuron),
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
    export_box("neurons", tracing.export_neurons, explorer)
