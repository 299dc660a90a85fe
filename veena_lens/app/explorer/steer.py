"""The Steer tab: a direction from pairs or a circuit from a file, its strengths, and the answers before and after.

alpha adds the direction at one layer, beta multiplies the attention that key heads pay to the image, gamma the
activations of the key neurons; heads and neurons are those that contribute most to the direction on the same pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from jaxtyping import Float
from torch import Tensor

from veena_lens.app.explorer import directions, own_pairs
from veena_lens.app.explorer.directions import BEGUN, FELT, LISTED, Direction, DirectionSettings
from veena_lens.app.explorer.own_pairs import OwnPairs
from veena_lens.app.explorer.parts import Shared, code_box, export_box, file_box
from veena_lens.app.explorer.pictures import GivenImage, chosen, require_processable, samples, thumbnails
from veena_lens.app.explorer.programs import Made, make, model_of, program
from veena_lens.app.explorer.state import Explorer, Session, reading, report_errors, takes
from veena_lens.app.questions import FEELING
from veena_lens.emotion import load_pairs, sample_hit
from veena_lens.interventions import BoostAttention, Circuit, ScaleNeurons, Steer
from veena_lens.scores import counted

if TYPE_CHECKING:
    from PIL import Image

    from veena_lens import HookedVLM

MOST_SAMPLES = 24  # sample pairs of an emotion
SHOWN_PAIRS = 6
SAMPLES_RESTORED = "Back to the sample faces."


@dataclass(frozen=True)
class Choices:
    """What is chosen on the tab, in the order of its components."""

    model: str
    emotion: str
    n_pairs: float | int
    reading: str
    told_apart: bool
    sample: str = ""
    upload: str | None = None
    question: str = ""
    layer: float | int = 0
    alpha: float | int = 0
    beta: float | int = 1
    gamma: float | int = 1

    @property
    def strengths(self) -> dict[str, float | int]:
        return {"alpha": self.alpha, "beta": self.beta, "gamma": self.gamma}

    def direction(self, session: Session) -> DirectionSettings:
        """Say which direction is asked for: of the visitor's own pairs where there are some."""
        own: OwnPairs | None = session.kept.get("own_pairs")
        return DirectionSettings(
            model=self.model,
            emotion=self.emotion,
            n=int(self.n_pairs),
            reading=self.reading,
            told_apart=self.told_apart,
            own="" if own is None else own.pairs.fingerprint,
        )


# --- what runs, and is shown ------------------------------------------------------------------------------------


def circuit_of(
    direction: Float[Tensor, "layer d_model"],
    heads: Sequence[tuple[int, int, float]],
    neurons: Sequence[tuple[int, int, float]],
    layer: int,
    alpha: float | int,
    beta: float | int,
    gamma: float | int,
    name: str = "",
    about: Mapping[str, Any] | None = None,
) -> Circuit:
    """Collect the edits that alpha, beta and gamma stand for; a neutral value (0, 1, 1) leaves its edit out.

    Raises: ValueError for a layer that the model does not have, or a beta that is not positive."""
    items: list[Any] = []
    if alpha:
        if not 0 <= layer < len(direction):
            raise ValueError(f"No layer {layer}; the direction has layers 0 to {len(direction) - 1}.")
        items.append(Steer(layer=layer, vector=direction[layer].float(), alpha=alpha))
    if beta != 1:
        for key in sorted({la for la, _, _ in heads}):
            mine = sorted(h for la, h, _ in heads if la == key)
            items.append(BoostAttention(layer=key, heads=mine, keys="image", factor=beta))
    if gamma != 1:
        for key in sorted({la for la, _, _ in neurons}):
            mine = sorted(n for la, n, _ in neurons if la == key)
            items.append(ScaleNeurons(layer=key, neurons=mine, factor=gamma))
    return Circuit(items, name=name, meta={**(about or {}), "alpha": alpha, "beta": beta, "gamma": gamma})


def scaled(circuit: Circuit, alpha: float | int, beta: float | int, gamma: float | int) -> Circuit:
    """Set the strengths of a circuit's edits: alpha of `Steer`, the factors of the others."""
    kinds = ((Steer, "alpha", alpha), (BoostAttention, "factor", beta), (ScaleNeurons, "factor", gamma))
    items = []
    for item in circuit:
        for kind, name, value in kinds:
            if isinstance(item, kind):
                item = replace(item, **{name: value})
        items.append(item)
    return replace(circuit, interventions=items)


def answers_about_image(model: HookedVLM, circuit: Circuit, image: Image.Image | str, question: str) -> tuple[str, str]:
    """Answer a question about an image without and with the circuit."""
    inputs = model.prepare(text=question, images=image)
    (before,) = model.generate(inputs, max_new_tokens=24)
    with model.intervene(circuit):
        (after,) = model.generate(inputs, max_new_tokens=24)
    return before.strip(), after.strip()


def rates_on_faces(model: HookedVLM, circuit: Circuit, emotion: str, question: str) -> tuple[float, float]:
    """Count how many of eight neutral test faces are called by the emotion, without and with the circuit."""
    faces = load_pairs().select(split="test", condition="none").neutrals[:8]
    inputs = model.prepare(text=[question] * len(faces), images=[[face.open()] for face in faces])
    plain = model.generate(inputs, max_new_tokens=8)
    with model.intervene(circuit):
        edited = model.generate(inputs, max_new_tokens=8)
    before, after = (sum(sample_hit(text, emotion) > 0.5 for text in texts) for texts in (plain, edited))
    return before / len(faces), after / len(faces)


# --- the tab's results ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Steered:
    """One answer without and with the edits, and how many neutral faces are called by the wanted emotion."""

    circuit: Circuit
    before: str
    after: str
    wanted: str
    rate_before: float
    rate_after: float
    code: str

    def is_hit(self, text: str) -> bool:
        """Return True where a text names the wanted emotion on most of the wheels that show it."""
        return sample_hit(text, self.wanted) > 0.5

    @property
    def sides(self) -> list[tuple[str, str, float]]:
        """Return name, answer and rate without and with the edits."""
        return [("Before", self.before, self.rate_before), ("After", self.after, self.rate_after)]


def circuit_from(direction: Direction, layer: int, alpha: float | int, beta: float | int, gamma: float | int) -> Made:
    """Return the circuit of a direction at these strengths, named after its emotion. Raises: as `circuit_of`."""
    about = {
        "model": direction.model,
        "emotion": direction.emotion,
        "pairs": direction.n_pairs,
        "read": direction.settings.reading,
    }
    made = direction.made
    unused = Made([], "[]")
    heads, neurons = (made["heads"] if beta != 1 else unused), (made["neurons"] if gamma != 1 else unused)
    strengths = {"layer": layer, "alpha": alpha, "beta": beta, "gamma": gamma}
    name = f"{direction.emotion}, layer {layer}"
    return make(
        "circuit", circuit_of, made["direction"], heads, neurons, name=name, hidden={"about": about}, **strengths
    )


def load_circuit(session: Session, path: str | Path) -> Circuit:
    """Load a circuit; the session keeps it. Raises: ValueError for a file that is not a circuit, or was cut short."""
    with reading(path, "a circuit"):
        circuit = Circuit.load(path)
        for item in circuit:
            for name, value in vars(item).items():
                if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                    raise ValueError(
                        f"{Path(path).name} holds numbers that are not finite: {name} of {type(item).__name__}."
                    )
        if not isinstance(circuit.meta, dict) or not isinstance(circuit.meta.get("emotion", ""), str):
            raise ValueError(f"{Path(path).name} says of itself what a circuit does not: {circuit.meta!r:.80}.")
    session.kept["circuit"] = circuit
    return circuit


def loaded_at(circuit: Circuit, alpha: float | int, beta: float | int, gamma: float | int) -> Made:
    """Return a loaded circuit with its strengths set."""
    line = 'circuit = Circuit.load("circuit.safetensors")  # as exported here'
    return make("circuit", scaled, Made(circuit, "circuit", (line,), (Circuit,)), alpha=alpha, beta=beta, gamma=gamma)


def steer(
    explorer: Explorer, session: Session, name: str, circuit: Made, image: GivenImage, question: str, wanted: str
) -> Steered:
    """Return both answers, and the rates over neutral test faces. Nothing is left on the model.

    Raises: ValueError for a circuit that does not fit the model, or an empty question."""
    if not question.strip():
        raise ValueError("Write a question first.")
    with explorer.using(name) as loaded:
        require_processable(loaded, [image], explorer.limits)
        model = model_of(loaded, name)
        answers = make("before, after", answers_about_image, model, circuit, image.made, question)
        rates = make("rate_before, rate_after", rates_on_faces, model, circuit, wanted, FEELING)
    then = ["print(before, after, rate_before, rate_after)", 'circuit.save("circuit.safetensors")']
    (before, after), (rate_before, rate_after) = answers.value, rates.value
    found = Steered(
        circuit=circuit.value,
        before=before,
        after=after,
        wanted=wanted,
        rate_before=rate_before,
        rate_after=rate_after,
        code=program(answers, rates, then=then),
    )
    session.kept["steered"] = found
    return found


def export_steering(session: Session) -> list[str]:
    """Write the circuit, and both answers as a table. Raises: ValueError before anything was steered."""
    import pandas as pd

    found: Steered = session.need("steered", "Steer something first; then there is something to export.")
    path = found.circuit.save(session.folder / "circuit.safetensors")
    rows = [
        {"run": run.lower(), "answer": text, "hit": found.is_hit(text), "rate": rate} for run, text, rate in found.sides
    ]
    table = session.folder / "steering.csv"
    pd.DataFrame(rows).to_csv(table, index=False)
    return [str(path), str(table)]


def describe_direction(direction: Direction) -> str:
    """Say in a sentence what was found."""
    heads = ", ".join(f"{la}.{h}" for la, h, _ in direction.heads[:5])
    n, given = direction.n_pairs, direction.n_given
    pairs = f"{n} of your {counted(given, 'pair')}" if direction.settings.own else f"the {n} (of {given}) pairs"
    pairs += " that the model answers correctly" if direction.settings.told_apart else ""
    return (
        f"Direction for **{direction.emotion}** from {pairs}, on {direction.model}. Heads that contribute most: "
        f"{heads}; {counted(len(direction.neurons), 'neuron')} (see Neurons)."
    )


def compared(found: Steered) -> str:
    """Return both answers side by side, with hit and rate."""
    sides = []
    for title, text, rate in found.sides:
        mark = "hit" if found.is_hit(text) else "miss"
        sides.append(
            f'<section class="veena-side"><h3>{title}</h3><p>{escape(text) or "(empty answer)"}</p>'
            f'<p><span class="veena-{mark}">{mark}</span> for “{escape(found.wanted)}”; '
            f"{rate:.0%} of 8 neutral faces</p></section>"
        )
    return f'<div class="veena-sides">{"".join(sides)}</div>'


def build(shared: Shared) -> None:
    """Build the tab's components and say what they do."""
    explorer = shared.explorer
    neutral = next((name for name in samples() if name.startswith("neutral")), shared.first_sample)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=260):
            emotion = gr.Dropdown(list(FELT), value="happy", label="Direction of", elem_id="emotion")
            n_pairs = gr.Slider(1, MOST_SAMPLES, 8, step=1, label="Maximum number of pairs", elem_id="n-pairs")
            place = gr.Radio([BEGUN, LISTED], value=BEGUN, label="Where the state is read", elem_id="reading")
            apart = gr.Checkbox(True, label="Only pairs that the model answers correctly", elem_id="apart")
            with gr.Accordion("Pairs of your own", open=False, elem_id="own"):
                own_box(explorer, emotion, n_pairs)
            extract = gr.Button("Extract the direction", elem_id="extract")
            file = file_box("or a circuit (.safetensors)", "circuit")
            status = gr.Markdown("", elem_id="direction")
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                sample = gr.Dropdown(list(samples()), value=neutral, label="Image", elem_id="steer-sample")
                upload = file_box("or your own", "steer-upload")
            prompt = gr.Textbox(FEELING, label="Question", elem_id="steer-prompt")
            layer = gr.Slider(0, 7, 4, step=1, label="Layer", elem_id="layer")
            alpha = gr.Slider(-4, 8, 1, step=0.1, label="alpha: scales the added direction (0: off)", elem_id="alpha")
            beta = gr.Slider(
                0.2, 5, 1, step=0.1, label="beta: scales key heads' attention to the image (1: off)", elem_id="beta"
            )
            gamma = gr.Slider(0, 5, 1, step=0.1, label="gamma: scales the key neurons (1: off)", elem_id="gamma")
            go = gr.Button("Steer", variant="primary", elem_id="steer")
    sides = gr.HTML(elem_id="sides", apply_default_css=False)
    code = code_box("steer-code")

    @takes(explorer, Choices)
    def extracted(choices: Choices, session: Session) -> tuple[Any, Any]:
        direction = directions.extract(explorer, session, choices.direction(session))
        session.kept.pop("circuit", None)
        last = len(direction.vectors) - 1
        return describe_direction(direction), gr.update(maximum=last, value=min(last, round(0.6 * last)))

    @report_errors
    def loaded(path: str | None, request: gr.Request) -> str:
        session = explorer.session(request.session_hash)
        if not path:
            session.kept.pop("circuit", None)
            return "No circuit."
        explorer.own(session, path)
        found = load_circuit(session, path)
        kinds = ", ".join(sorted({type(item).__name__ for item in found}))
        edits = counted(len(found), "edit")
        return f"Circuit **{found.name or 'unnamed'}**: {edits} ({kinds}); the strengths set here apply to them."

    @takes(explorer, Choices)
    def steered(choices: Choices, session: Session) -> tuple[Any, Any, Any]:
        explorer.own(session, choices.upload)
        uploads = [choices.upload] if choices.upload else None
        image = chosen(uploads, choices.sample, explorer.limits)[0]
        given: Circuit | None = session.kept.get("circuit")
        if given is not None:
            wanted, text = given.meta.get("emotion", choices.emotion), gr.skip()
            circuit = loaded_at(given, **choices.strengths)
        else:
            settings, direction = choices.direction(session), session.kept.get("direction")
            if direction is None or direction.settings != settings:
                direction = directions.extract(explorer, session, settings)
            wanted, text = choices.emotion, describe_direction(direction)
            circuit = circuit_from(direction, int(choices.layer), **choices.strengths)
        with reading("the circuit", "a circuit of this model") if given is not None else nullcontext():
            found = steer(explorer, session, choices.model, circuit, image, choices.question, wanted)
        return compared(found), text, found.code

    ways = [shared.model, emotion, n_pairs, place, apart]
    extract.click(extracted, ways, [status, layer], api_visibility="private")
    file.change(loaded, file, status, api_visibility="private")
    sources = [*ways, sample, upload, prompt, layer, alpha, beta, gamma]
    go.click(steered, sources, [sides, status, code], api_visibility="private")
    export_box("steer", lambda session: export_steering(session) + own_pairs.export_pairs(session), explorer)


def own_box(explorer: Explorer, emotion: Any, n_pairs: Any) -> None:
    """Build where visitors give their own pairs; `emotion` and `n_pairs` then offer what these hold."""
    gr.Markdown(
        "Two sets of images: the same people or scenes with and without the emotion, paired by file name or by order. "
        "Or a .zip with one folder per emotion and one named neutral, or with a manifest.jsonl.",
        elem_classes="veena-hint",
    )
    shown = file_box("Images with the emotion", "own-shown", several=True)
    twins = file_box("The same without it", "own-twins", several=True)
    archive = file_box("or one .zip", "own-zip")
    word = gr.Textbox("", label="Emotion of the first set", placeholder="happy", elem_id="own-word")
    with gr.Row():
        use = gr.Button("Use these pairs", elem_id="own-use")
        back = gr.Button("Back to the sample faces", elem_id="own-back")
    status = gr.Markdown("", elem_id="own-status")
    thumbs = gr.HTML(elem_id="own-thumbs", apply_default_css=False)

    @report_errors
    def given(
        first: list[str] | None, second: list[str] | None, path: str | None, name: str, request: gr.Request
    ) -> tuple[Any, ...]:
        session = explorer.session(request.session_hash)
        for files in (first, second, path):
            explorer.own(session, files)
        if path:
            found = own_pairs.take_zip(session, path, explorer.limits)
        else:
            found = own_pairs.take_sets(session, first, second, name, explorer.limits)
        emotions = found.pairs.emotions
        most = max(sum(p.emotion == e for p in found.pairs) for e in emotions)
        few = [(e.open(), e.emotion) for pair in found.pairs[:SHOWN_PAIRS] for e in (pair.emotional, pair.neutral)]
        choices = gr.update(choices=emotions, value=emotions[0])
        return found.describe(), thumbnails(few, 72), choices, gr.update(maximum=max(2, most), value=most)

    @report_errors
    def returned(request: gr.Request) -> tuple[Any, ...]:
        own_pairs.forget_pairs(explorer.session(request.session_hash))
        choices = gr.update(choices=list(FELT), value="happy")
        return None, None, None, SAMPLES_RESTORED, "", choices, gr.update(maximum=MOST_SAMPLES, value=8)

    outputs = [status, thumbs, emotion, n_pairs]
    use.click(given, [shown, twins, archive, word], outputs, api_visibility="private")
    back.click(returned, None, [shown, twins, archive, *outputs], api_visibility="private")
