"""What a direction does when added: one answer before and after, and the rate over many faces.

alpha adds the direction at one layer, beta strengthens the attention that key heads pay to the picture, gamma the key
neurons; heads and neurons are those that push most along the direction on the same pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from veena_lens.app import steps
from veena_lens.app.explorer.code import program
from veena_lens.app.explorer.directions import Direction, direction_imports, direction_lines
from veena_lens.app.explorer.pictures import Shown
from veena_lens.app.explorer.state import Explorer, Session
from veena_lens.app.explorer.told import by_name
from veena_lens.checkpoints.bundle import bundled_pictures
from veena_lens.emotion import sample_hit
from veena_lens.interventions import BoostAttention, Circuit, ScaleNeurons, Steer

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
        many = steps.ask(model, steps.SAY, faces)
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
