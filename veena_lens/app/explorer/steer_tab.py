"""The Steer tab: a direction from pairs or a circuit from a file, its strengths, and the answers before and after."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from veena_lens.app.explorer import directions, own_pairs, steering
from veena_lens.app.explorer.directions import BEGUN, FELT, LISTED, Direction, DirectionAsked
from veena_lens.app.explorer.own_pairs import OwnPairs
from veena_lens.app.explorer.parts import Shared, code_box, export_box
from veena_lens.app.explorer.pictures import chosen, samples, thumbnails
from veena_lens.app.explorer.state import Explorer, Session
from veena_lens.app.explorer.steering import Steered
from veena_lens.app.explorer.told import told
from veena_lens.app.steps import SAY
from veena_lens.wording import counted

MOST_SAMPLES = 24  # sample pairs of an emotion
SHOWN_PAIRS = 6


def told_of(direction: Direction) -> str:
    """What was found, in a sentence."""
    heads = ", ".join(f"{la}.{h}" for la, h, _ in direction.heads[:5])
    pairs = f"{direction.n_pairs} of your pairs" if direction.asked.own else counted(direction.n_pairs, "pair")
    apart = f" that the model tells apart, of {direction.n_given}" if direction.asked.told_apart else ""
    return (
        f"**{direction.emotion}** from {pairs}{apart}, on {direction.model}. Heads that push most: {heads}; "
        f"{counted(len(direction.neurons), 'neuron')} (see Neurons)."
    )


def wanted_of(
    session: Session, model: str, emotion: str, n: float | int, reading: str, told_apart: bool
) -> DirectionAsked:
    """What the tab's choices ask for: of the visitor's own pairs where there are some."""
    own: OwnPairs | None = session.kept.get("own_pairs")
    return DirectionAsked(
        model=model,
        emotion=emotion,
        n=int(n),
        reading=reading,
        told_apart=told_apart,
        own="" if own is None else own.pairs.fingerprint,
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
            n_pairs = gr.Slider(1, MOST_SAMPLES, 8, step=1, label="From at most so many pairs", elem_id="n-pairs")
            reading = gr.Radio([BEGUN, LISTED], value=BEGUN, label="The state is read", elem_id="reading")
            apart = gr.Checkbox(True, label="Only pairs that the model tells apart", elem_id="apart")
            with gr.Accordion("Pairs of your own", open=False, elem_id="own"):
                own_box(explorer, emotion, n_pairs)
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
    def found_direction(
        model: str, wanted: str, n: float | int, read: str, told_apart: bool, request: gr.Request
    ) -> tuple[Any, Any]:
        session = explorer.session(request.session_hash)
        asked = wanted_of(session, model, wanted, n, read, told_apart)
        direction = directions.extract(explorer, session, asked)
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
        read: str,
        told_apart: bool,
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
            asked, direction = wanted_of(session, model, wanted, n, read, told_apart), session.kept.get("direction")
            if direction is None or direction.asked != asked:
                direction = directions.extract(explorer, session, asked)
            edits = steering.circuit_of(direction, int(at), a, b, c)
            told_text, program = told_of(direction), steering.steer_code(direction, edits, shown, question)
        found = steering.steer(explorer, session, model, edits, shown, question, wanted)
        return compared(found), told_text, program

    ways = [emotion, n_pairs, reading, apart]
    extract.click(found_direction, [shared.model, *ways], [status, layer], api_visibility="private")
    circuit.change(loaded, circuit, status, api_visibility="private")
    sources = [shared.model, *ways, sample, upload, prompt, layer, alpha, beta, gamma]
    go.click(steer, sources, [sides, status, code], api_visibility="private")
    export_box("steer", lambda session: steering.export_steering(session) + own_pairs.export_pairs(session), explorer)


def own_box(explorer: Explorer, emotion: Any, n_pairs: Any) -> None:
    """Where visitors give their own pairs; `emotion` and `n_pairs` then offer what these hold."""
    gr.Markdown(
        "Two sets of pictures: the same people or scenes with and without it, twins by equal file names or in the same "
        "order. Or a .zip with a folder an emotion and one named neutral, or with a manifest.jsonl.",
        elem_classes="veena-hint",
    )
    look: dict[str, Any] = {"type": "filepath", "height": 96, "elem_classes": "veena-drop"}
    shown = gr.File(label="Pictures that show it", file_count="multiple", elem_id="own-shown", **look)
    twins = gr.File(label="The same without it", file_count="multiple", elem_id="own-twins", **look)
    archive = gr.File(label="or one .zip", elem_id="own-zip", **look)
    word = gr.Textbox("", label="What the first set shows", placeholder="happy", elem_id="own-word")
    with gr.Row():
        use = gr.Button("Use these pairs", elem_id="own-use")
        back = gr.Button("Back to the sample faces", elem_id="own-back")
    status = gr.Markdown("", elem_id="own-status")
    thumbs = gr.HTML(elem_id="own-thumbs", apply_default_css=False)

    @told
    def given(
        first: list[str] | None, second: list[str] | None, path: str | None, name: str, request: gr.Request
    ) -> tuple[Any, ...]:
        session = explorer.session(request.session_hash)
        if path:
            found = own_pairs.take_zip(session, path, explorer.limits)
        else:
            found = own_pairs.take_sets(session, first, second, name, explorer.limits)
        emotions = found.pairs.emotions
        most = max(sum(p.emotion == e for p in found.pairs) for e in emotions)
        few = [(e.open(), e.emotion) for pair in found.pairs[:SHOWN_PAIRS] for e in (pair.emotional, pair.neutral)]
        choices = gr.update(choices=emotions, value=emotions[0])
        return found.told(), thumbnails(few, 72), choices, gr.update(maximum=max(2, most), value=most)

    @told
    def returned(request: gr.Request) -> tuple[Any, ...]:
        own_pairs.forget_pairs(explorer.session(request.session_hash))
        choices = gr.update(choices=list(FELT), value="happy")
        return None, None, None, "The sample faces again.", "", choices, gr.update(maximum=MOST_SAMPLES, value=8)

    outputs = [status, thumbs, emotion, n_pairs]
    use.click(given, [shown, twins, archive, word], outputs, api_visibility="private")
    back.click(returned, None, [shown, twins, archive, *outputs], api_visibility="private")
