"""The Steer tab: a direction from pairs or a circuit from a file, its strengths, and the answers before and after.

What a direction does when added: one answer before and after, and the rate over many faces.

alpha adds the direction at one layer, beta strengthens the attention that key heads pay to the image, gamma the key
neurons; heads and neurons are those that push most along the direction on the same pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from veena_lens.app.explorer import directions, own_pairs
from veena_lens.app.explorer.directions import (
    BEGUN,
    FELT,
    LISTED,
    Direction,
    DirectionAsked,
    direction_imports,
    direction_lines,
)
from veena_lens.app.explorer.own_pairs import OwnPairs
from veena_lens.app.explorer.parts import Shared, code_box, export_box, program
from veena_lens.app.explorer.pictures import Shown, chosen, samples, thumbnails
from veena_lens.app.explorer.state import Explorer, Session, by_name, told
from veena_lens.app.questions import FEELING
from veena_lens.checkpoints.files import bundled_pictures
from veena_lens.emotion import sample_hit
from veena_lens.interventions import BoostAttention, Circuit, ScaleNeurons, Steer
from veena_lens.scores import counted

N_FACES = 8
SAY_TOKENS = 24


def circuit_of(direction: Direction, layer: int, alpha: float | int, beta: float | int, gamma: float | int) -> Circuit:
    """The edits that alpha, beta and gamma stand for; a neutral value (0, 1, 1) leaves its edit out.

    Raises: ValueError for a layer that the model has not, or a beta that is not positive."""
    items: list[Any] = []
    if alpha:
        if not 0 <= layer < len(direction.vectors):
            raise ValueError(f"No layer {layer}; the direction has layers 0 to {len(direction.vectors) - 1}.")
        items.append(Steer(layer=layer, vector=direction.vectors[layer], alpha=alpha))
    if beta != 1:
        for chosen in sorted({la for la, _, _ in direction.heads}):
            heads = sorted(h for la, h, _ in direction.heads if la == chosen)
            items.append(BoostAttention(layer=chosen, heads=heads, keys="image", factor=beta))
    if gamma != 1:
        for chosen in sorted({la for la, _, _ in direction.neurons}):
            mine = sorted(n for la, n, _ in direction.neurons if la == chosen)
            items.append(ScaleNeurons(layer=chosen, neurons=mine, factor=gamma))
    meta = {
        "model": direction.model,
        "emotion": direction.emotion,
        "pairs": direction.n_pairs,
        "read": direction.asked.reading,
        "alpha": alpha,
        "beta": beta,
        "gamma": gamma,
    }
    return Circuit(items, name=f"{direction.emotion}, layer {layer}", meta=meta)


def load_circuit(session: Session, path: str | Path) -> Circuit:
    """A circuit from a file; the session keeps it. Raises: ValueError for a file that is none, or was cut short."""
    with by_name(path):
        circuit = Circuit.load(path)
    session.kept["circuit"] = circuit
    return circuit


def scaled(circuit: Sequence[Any], alpha: float | int, beta: float | int, gamma: float | int) -> Circuit:
    """A loaded circuit with the strengths of its edits set: alpha of `Steer`, factors of the others."""
    kinds = ((Steer, "alpha", alpha), (BoostAttention, "factor", beta), (ScaleNeurons, "factor", gamma))
    items = []
    for item in circuit:
        for kind, name, value in kinds:
            if isinstance(item, kind):
                item = replace(item, **{name: value})
        items.append(item)
    return Circuit(items, getattr(circuit, "name", ""), getattr(circuit, "meta", {}))


def is_hit(text: str, emotion: str) -> bool:
    """True where a text names the emotion on most of the wheels that show it (`veena_lens.emotion.sample_hit`)."""
    return sample_hit(text, emotion) > 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Steered:
    """One answer without and with the edits, and how many neutral faces are called by the wanted emotion."""

    circuit: Circuit
    before: str
    after: str
    wanted: str
    rate_before: float
    rate_after: float
    n_faces: int

    def is_hit(self, text: str) -> bool:
        """True where a text names the wanted emotion."""
        return is_hit(text, self.wanted)


@torch.no_grad()
def steer(
    explorer: Explorer, session: Session, name: str, circuit: Circuit, shown: Shown, prompt: str, wanted: str
) -> Steered:
    """Both answers, and the rates over neutral test faces. Nothing is left on the model.

    Raises: ValueError for a circuit that does not fit the model, or an empty question."""
    if not prompt.strip():
        raise ValueError("Write a question first.")
    faces = [p for p in bundled_pictures("test") if p.emotion == "neutral" and p.context is None][:N_FACES]
    with explorer.using(name) as model:
        one = model.prepare(text=prompt, images=shown.image)
        many = model.prepare(text=[FEELING] * len(faces), images=[[face.open()] for face in faces])
        (before,) = model.generate(one, max_new_tokens=SAY_TOKENS)
        plain = model.generate(many, max_new_tokens=8)
        with model.intervene(circuit):
            (after,) = model.generate(one, max_new_tokens=SAY_TOKENS)
            edited = model.generate(many, max_new_tokens=8)

    def rate(texts: Sequence[str]) -> float:
        return sum(is_hit(text, wanted) for text in texts) / len(texts)

    found = Steered(
        circuit=circuit,
        before=before.strip(),
        after=after.strip(),
        wanted=wanted,
        rate_before=rate(plain),
        rate_after=rate(edited),
        n_faces=len(faces),
    )
    session.kept["steered"] = found
    return found


def steer_code(direction: Direction, circuit: Circuit, shown: Shown, prompt: str) -> str:
    """The program behind the Steer tab."""
    edits = []
    for item in circuit:
        if isinstance(item, Steer):
            edits.append(f"    Steer(layer={item.layer}, vector=direction[{item.layer}], alpha={item.alpha:g}),")
        elif isinstance(item, BoostAttention):
            heads = list(item.heads or ())
            edits.append(
                f'    BoostAttention(layer={item.layer}, heads={heads}, keys="image", factor={item.factor:g}),'
            )
        else:
            neurons = list(item.neurons)
            edits.append(f"    ScaleNeurons(layer={item.layer}, neurons={neurons}, factor={item.factor:g}),")
    body = [
        *direction_lines(direction),
        "circuit = Circuit([",
        *edits,
        f"], name={circuit.name!r})",
        f"inputs = model.prepare(text={prompt!r}, images={shown.code})",
        "print(model.generate(inputs))",
        "with model.intervene(circuit):",
        "    print(model.generate(inputs))",
        'circuit.save("circuit.safetensors")',
    ]
    imports = [
        *direction_imports(direction),
        "from veena_lens.interventions import BoostAttention, Circuit, ScaleNeurons, Steer",
    ]
    return program(imports, body, [shown])


def export_steering(session: Session) -> list[str]:
    """The circuit, and both answers as a table. Raises: ValueError before anything was steered."""
    import pandas as pd

    found: Steered = session.need("steered", "Steer something first; then there is something to export.")
    path = found.circuit.save(session.folder / "circuit.safetensors")
    rows = [
        {"run": run, "answer": text, "hit": found.is_hit(text), "rate": rate}
        for run, text, rate in (
            ("before", found.before, found.rate_before),
            ("after", found.after, found.rate_after),
        )
    ]
    table = session.folder / "steering.csv"
    pd.DataFrame(rows).to_csv(table, index=False)
    return [str(path), str(table)]


def circuit_code(name: str, shown: Shown, prompt: str) -> str:
    """The program behind the Steer tab where a circuit was loaded."""
    body = [
        f"model = HookedVLM.from_pretrained({name!r})",
        'circuit = Circuit.load("circuit.safetensors")  # as exported here',
        f"inputs = model.prepare(text={prompt!r}, images={shown.code})",
        "print(model.generate(inputs))",
        "with model.intervene(circuit):",
        "    print(model.generate(inputs))",
    ]
    imports = ["from veena_lens import HookedVLM", "from veena_lens.interventions import Circuit"]
    return program(imports, body, [shown])


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
            prompt = gr.Textbox(FEELING, label="Question", elem_id="steer-prompt")
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
        found = load_circuit(session, path)
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
                scaled(given, a, b, c),
                gr.skip(),
                circuit_code(model, shown, question),
            )
        else:
            asked, direction = wanted_of(session, model, wanted, n, read, told_apart), session.kept.get("direction")
            if direction is None or direction.asked != asked:
                direction = directions.extract(explorer, session, asked)
            edits = circuit_of(direction, int(at), a, b, c)
            told_text, program = told_of(direction), steer_code(direction, edits, shown, question)
        found = steer(explorer, session, model, edits, shown, question, wanted)
        return compared(found), told_text, program

    ways = [emotion, n_pairs, reading, apart]
    extract.click(found_direction, [shared.model, *ways], [status, layer], api_visibility="private")
    circuit.change(loaded, circuit, status, api_visibility="private")
    sources = [shared.model, *ways, sample, upload, prompt, layer, alpha, beta, gamma]
    go.click(steer, sources, [sides, status, code], api_visibility="private")
    export_box("steer", lambda session: export_steering(session) + own_pairs.export_pairs(session), explorer)


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
