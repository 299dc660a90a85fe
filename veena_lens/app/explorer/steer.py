"""The Steer tab: a direction from pairs or a circuit from a file, its strengths, and the answers before and after.

alpha adds the direction at one layer, beta multiplies the attention that key heads pay to the image, gamma the
activations of the key neurons; heads and neurons are those that contribute most to the direction on the same pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from veena_lens.app.explorer.contrasts import Contrast
from veena_lens.app.explorer.directions import Direction, DirectionSettings
from veena_lens.app.explorer.exports import about, table_files
from veena_lens.app.explorer.own_pairs import OwnPairs
from veena_lens.app.explorer.pictures import GivenImage, require_processable, thumbnails
from veena_lens.app.explorer.programs import Made, make, model_of, program
from veena_lens.app.explorer.state import Explorer, Session, reading
from veena_lens.app.questions import FEELING
from veena_lens.emotion import load_pairs, sample_hit
from veena_lens.interventions import BoostAttention, Circuit, ScaleNeurons, Steer
from veena_lens.interventions.made_for import MadeFor
from veena_lens.scores import counted

if TYPE_CHECKING:
    from PIL import Image

    from veena_lens import HookedVLM


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
        contrast: Contrast | None = session.kept.get("contrast")
        return DirectionSettings(
            model=self.model,
            emotion=self.emotion,
            n=int(self.n_pairs),
            reading=self.reading,
            told_apart=self.told_apart,
            own="" if own is None else own.pairs.fingerprint,
            contrast="" if contrast is None else contrast.fingerprint,
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
    """One answer without and with the edits, and how many neutral faces are called by the wanted emotion.

    rate_before, rate_after: None where the direction is not an emotion's, and answers are not judged."""

    circuit: Circuit
    before: str
    after: str
    wanted: str
    rate_before: float | None
    rate_after: float | None
    code: str
    model: str
    question: str
    image: GivenImage
    made_for: MadeFor

    def is_hit(self, text: str) -> bool:
        """Return True where a text names the wanted emotion on most of the wheels that show it."""
        return sample_hit(text, self.wanted) > 0.5

    @property
    def sides(self) -> list[tuple[str, str, float | None]]:
        """Return name, answer and rate without and with the edits."""
        return [("Before", self.before, self.rate_before), ("After", self.after, self.rate_after)]


def circuit_from(direction: Direction, layer: int, alpha: float | int, beta: float | int, gamma: float | int) -> Made:
    """Return the circuit of a direction at these strengths, named after its emotion. Raises: as `circuit_of`."""
    about = {
        "model": direction.model,
        "emotion": direction.emotion,
        "pairs": direction.n_pairs,
        "read": direction.settings.reading,
        "contrast": bool(direction.settings.contrast),
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
    explorer: Explorer,
    session: Session,
    name: str,
    circuit: Made,
    image: GivenImage,
    question: str,
    wanted: str,
    judged: bool = True,
) -> Steered:
    """Return both answers, and if they are judged, the rates over neutral test faces. Nothing is left on the model.

    Raises: ValueError for a circuit that does not fit the model, or an empty question."""
    if not question.strip():
        raise ValueError("Write a question first.")
    with explorer.using(name) as loaded:
        require_processable(loaded, [image], explorer.limits)
        model = model_of(loaded, name)
        answers = make("before, after", answers_about_image, model, circuit, image.made, question)
        every, made_for = [answers], MadeFor.of(loaded.cfg)
        if judged:
            every.append(make("rate_before, rate_after", rates_on_faces, model, circuit, wanted, FEELING))
    names = ", ".join(made.expression for made in every)
    then = [f"print({names})", 'circuit.save("circuit.safetensors")']
    before, after = answers.value
    rate_before, rate_after = every[-1].value if judged else (None, None)
    found = Steered(
        circuit=circuit.value,
        before=before,
        after=after,
        wanted=wanted,
        rate_before=rate_before,
        rate_after=rate_after,
        code=program(*every, then=then),
        model=name,
        question=question,
        image=image,
        made_for=made_for,
    )
    session.kept["steered"] = found
    return found


def export_steering(session: Session) -> list[str]:
    """Write the circuit, and both answers as a table. Raises: ValueError before anything was steered."""
    import pandas as pd

    found: Steered = session.need("steered", "Steer something first; then there is something to export.")
    told = about(found.model, found.question, image=found.image.name)
    told |= {"direction": found.circuit.name or found.wanted}
    del told["answer"]  # each row has its own
    circuit = replace(found.circuit, meta={**found.circuit.meta, **told}, made_for=found.made_for)
    path = circuit.save(session.folder / "circuit.safetensors")
    strengths = {name: found.circuit.meta[name] for name in ("alpha", "beta", "gamma") if name in found.circuit.meta}
    rows = []
    for run, text, rate in found.sides:
        judged = {} if rate is None else {"hit": found.is_hit(text), "rate": rate}
        rows.append({"run": run.lower(), "answer": text, **judged})
    return [str(path), *map(str, table_files(pd.DataFrame(rows), session, "steering", told | strengths))]


def describe_direction(direction: Direction) -> str:
    """Say in a sentence what was found."""
    heads = ", ".join(f"L{la}H{h}" for la, h, _ in direction.heads[:5])
    n, given, settings = direction.n_pairs, direction.n_given, direction.settings
    if settings.contrast:
        source = f"{counted(n, 'image')} against {given}" if direction.images else "two prompts"
    else:
        source = f"{n} of your {counted(given, 'pair')}" if settings.own else f"the {n} (of {given}) pairs"
        source += " that the model answers correctly" if settings.told_apart else ""
    text = (
        f"Direction for **{direction.emotion}** from {source}, on {direction.model}. Heads that contribute most: "
        f"{heads}; {counted(len(direction.neurons), 'neuron')} (see Neurons)."
    )
    return f"{text} {direction.notes}".strip()


def compared(found: Steered) -> str:
    """Return the image that was steered, and both answers side by side, with hit and rate."""
    sides = [
        side(title, text, found.wanted, None if rate is None else found.is_hit(text), rate)
        for title, text, rate in found.sides
    ]
    image = thumbnails([(found.image.image, Path(found.image.name).name)], 110)
    return f'<div class="veena-steered">{image}<div class="veena-sides">{"".join(sides)}</div></div>'


def side(title: str, text: str, wanted: str, is_hit: bool | None, rate: float | None) -> str:
    """Return one answer, and if it was judged, whether it names what was wanted."""
    judged = ""
    if is_hit is not None:
        mark = "hit" if is_hit else "miss"
        judged = (
            f'<p><span class="veena-{mark}">{mark}</span> for “{escape(wanted)}”; {rate:.0%} of 8 neutral faces</p>'
        )
    answer = escape(text) or "(empty answer)"
    return f'<section class="veena-side"><h3>{title}</h3><p>{answer}</p>{judged}</section>'
