"""The Steer tab: a direction from pairs or a circuit from a file, its strengths, and the answers before and after."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from veena_lens.app.explorer import directions, steering
from veena_lens.app.explorer.directions import FELT, Direction
from veena_lens.app.explorer.parts import Shared, code_box, export_box
from veena_lens.app.explorer.pictures import chosen, samples
from veena_lens.app.explorer.steering import Steered
from veena_lens.app.explorer.told import told
from veena_lens.app.steps import SAY


def told_of(direction: Direction) -> str:
    """What was found, in a sentence."""
    heads = ", ".join(f"{la}.{h}" for la, h, _ in direction.heads[:5])
    return (
        f"**{direction.emotion}** from {direction.n_pairs} pairs on {direction.model}. Heads that push most: {heads}; "
        f"{len(direction.neurons)} neurons (see Neurons)."
    )


def compared(found: Steered) -> str:
    """Both answers side by side, with hit and rate."""
    sides = []
    for title, text, rate in (("Before", found.before, found.rate_before), ("After", found.after, found.rate_after)):
        mark = "hit" if found.is_hit(text) else "miss"
        sides.append(
            f'<section class="veena-side"><h3>{title}</h3><p>{escape(text) or "(nothing)"}</p>'
            f'<p><span class="veena-{mark}">{mark}</span> for “{escape(found.wanted)}”; '
            f"{rate:.0%} of {found.n_faces} neutral faces</p></section>"
        )
    return f'<div class="veena-sides">{"".join(sides)}</div>'


def build(shared: Shared) -> None:
    """The tab's components and what they do."""
    explorer = shared.explorer
    neutral = next((name for name in samples() if name.startswith("neutral")), shared.first_sample)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=260):
            emotion = gr.Dropdown(list(FELT), value="happy", label="Direction of", elem_id="emotion")
            n_pairs = gr.Slider(1, 8, 8, step=1, label="From so many pairs of faces")
            extract = gr.Button("Extract the direction", elem_id="extract")
            circuit = gr.File(
                label="or a circuit (.safetensors)",
                type="filepath",
                height=96,
                elem_classes="veena-drop",
                elem_id="circuit",
            )
            status = gr.Markdown("", elem_id="direction")
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                sample = gr.Dropdown(list(samples()), value=neutral, label="Picture", elem_id="steer-sample")
                upload = gr.File(
                    label="or your own", type="filepath", height=96, elem_classes="veena-drop", elem_id="steer-upload"
                )
            prompt = gr.Textbox(SAY, label="Question", elem_id="steer-prompt")
            layer = gr.Slider(0, 7, 4, step=1, label="Layer", elem_id="layer")
            alpha = gr.Slider(-4, 8, 1, step=0.1, label="alpha: the direction, added (0: off)", elem_id="alpha")
            beta = gr.Slider(
                0.2, 5, 1, step=0.1, label="beta: key heads' attention to the picture (1: off)", elem_id="beta"
            )
            gamma = gr.Slider(0, 5, 1, step=0.1, label="gamma: key neurons (1: off)", elem_id="gamma")
            go = gr.Button("Steer", variant="primary", elem_id="steer")
    sides = gr.HTML(elem_id="sides", apply_default_css=False)
    code = code_box("steer-code")

    @told
    def found_direction(model: str, wanted: str, n: float | int, request: gr.Request) -> tuple[Any, Any]:
        session = explorer.session(request.session_hash)
        direction = directions.extract(explorer, session, model, wanted, int(n))
        session.kept.pop("circuit", None)
        last = len(direction.vectors) - 1
        return told_of(direction), gr.update(maximum=last, value=min(last, round(0.6 * last)))

    @told
    def loaded(path: str | None, request: gr.Request) -> str:
        session = explorer.session(request.session_hash)
        if not path:
            session.kept.pop("circuit", None)
            return "No circuit."
        found = steering.load_circuit(session, path)
        kinds = ", ".join(sorted({type(item).__name__ for item in found}))
        return f"Circuit **{found.name or 'unnamed'}**: {len(found)} edits ({kinds}); the strengths here apply to them."

    @told
    def steer(
        model: str,
        wanted: str,
        n: float | int,
        name: str,
        path: str | None,
        question: str,
        at: float | int,
        a: float | int,
        b: float | int,
        c: float | int,
        request: gr.Request,
    ) -> tuple[Any, Any, Any]:
        session = explorer.session(request.session_hash)
        shown = chosen([path] if path else None, name, explorer.limits)[0]
        given = session.kept.get("circuit")
        if given is not None:
            wanted = given.meta.get("emotion", wanted)
            edits, told_text, program = (
                steering.scaled(given, a, b, c),
                gr.skip(),
                steering.circuit_code(model, shown, question),
            )
        else:
            direction = session.kept.get("direction")
            if direction is None or (direction.model, direction.emotion, direction.n_pairs) != (model, wanted, int(n)):
                direction = directions.extract(explorer, session, model, wanted, int(n))
            edits = steering.circuit_of(direction, int(at), a, b, c)
            told_text, program = told_of(direction), steering.steer_code(direction, edits, shown, question)
        found = steering.steer(explorer, session, model, edits, shown, question, wanted)
        return compared(found), told_text, program

    extract.click(found_direction, [shared.model, emotion, n_pairs], [status, layer], api_visibility="private")
    circuit.change(loaded, circuit, status, api_visibility="private")
    sources = [shared.model, emotion, n_pairs, sample, upload, prompt, layer, alpha, beta, gamma]
    go.click(steer, sources, [sides, status, code], api_visibility="private")
    export_box("steer", steering.export_steering, explorer)
