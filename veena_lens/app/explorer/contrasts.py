"""A direction without emotions: what two sets of images, or two prompts, do to the residual stream, and who writes it.

The state is read at the last position, after the words that an answer is begun with, if any; the direction is the mean
over the first set minus the mean over the second. Nothing is generated and nothing is left out, so that any model and
any images will do.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.app.explorer.own_pairs import plain_stem
from veena_lens.app.explorer.pictures import open_upload
from veena_lens.app.explorer.programs import Made, make
from veena_lens.app.explorer.state import Limits, Session, reading
from veena_lens.app.questions import FEELING
from veena_lens.circuits import head_intention, neuron_trace
from veena_lens.scores import Scores, counted

if TYPE_CHECKING:
    from veena_lens import HookedVLM, MultimodalInputs

Given = tuple[str, str | None]  # a prompt, and an image or none
FOLDER = "sets"
SIDES = ("first", "second")
MOST_LABEL = 60  # characters


@dataclass(frozen=True, kw_only=True, eq=False)
class Contrast:
    """Two sides: image files of a folder with sides, or one prompt per side.

    name: what the direction is called. question: about each image, with an answer begun by lead_in. fingerprint: tells
    contrasts apart."""

    name: str
    fingerprint: str
    folder: Path | None = None
    prompts: tuple[str, str] | None = None
    question: str = FEELING
    lead_in: str = ""

    def images(self) -> list[list[str]]:
        """Return the files of each side; none for prompts."""
        return [] if self.folder is None else [images_in(str(self.folder / side)) for side in SIDES]

    def describe(self) -> str:
        """Say in a sentence what was given."""
        if self.prompts is not None:
            return f"Direction **{self.name}**: from the second prompt to the first."
        begun = f", answer begun with “{self.lead_in}”" if self.lead_in else ""
        first, second = (counted(len(files), "image") for files in self.images())
        return f"Direction **{self.name}**: {first} against {second}, asked “{self.question}”{begun}."

    def made(self) -> list[Made]:
        """Return both sides as lists of (prompt, image or None), with the program that makes them."""
        if self.prompts is not None:
            return [Made([(prompt, None)], f"[({prompt!r}, None)]") for prompt in self.prompts]
        return [
            Made(
                [(self.question, file) for file in files],
                f'[({self.question!r}, file) for file in images_in("{FOLDER}/{side}")]',
                functions=(images_in,),
            )
            for files, side in zip(self.images(), SIDES, strict=True)
        ]


def images_in(folder: str) -> list[str]:
    """Return the image files of a folder in order of their names."""
    return sorted(str(path) for path in Path(folder).iterdir() if path.is_file())


def state_inputs(model: HookedVLM, given: Given, lead_in: str) -> MultimodalInputs:
    """Prepare a prompt with its image, and the words that its answer is begun with."""
    prompt, image = given
    begun: dict[str, Any] = {"answer": lead_in} if lead_in else {}
    return model.prepare(text=prompt, images=image, **begun)


@torch.no_grad()
def mean_states(model: HookedVLM, given: Sequence[Given], lead_in: str) -> Float[Tensor, "layer d_model"]:
    """Return the mean over prompts (with their images) of resid_post at the last position, in every layer."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    total = torch.zeros(model.cfg.n_layers, model.cfg.d_model, dtype=torch.float64)
    for one in given:
        _, cache = model.run_with_cache(state_inputs(model, one, lead_in), names_filter=names)
        total += torch.stack([cache[name][0, -1].double().cpu() for name in names])
    return total / len(given)


def contrast_direction(
    model: HookedVLM, first: Sequence[Given], second: Sequence[Given], lead_in: str = ""
) -> Float[Tensor, "layer d_model"]:
    """Return the mean state of the first side minus that of the second.

    Raises: ValueError where the two do not differ."""
    found = (mean_states(model, first, lead_in) - mean_states(model, second, lead_in)).float()
    if not bool((found != 0).any()):
        raise ValueError("Both sides leave the model in the same state, so there is no direction; give other ones.")
    return found


@torch.no_grad()
def contributions(
    model: HookedVLM,
    first: Sequence[Given],
    second: Sequence[Given],
    direction: Float[Tensor, "layer d_model"],
    part: str,
    k: int,
    lead_in: str = "",
) -> list[tuple[int, int, float]]:
    """Rank heads or neurons by the projection of what they write on the direction, first side minus second."""
    means = []
    for given in (first, second):
        total = torch.zeros((), dtype=torch.float64)
        for one in given:
            inputs = state_inputs(model, one, lead_in)
            if part == "head":
                found = head_intention(inputs, direction, -1, kind="projection", model=model)
            else:
                found = neuron_trace(inputs, direction, -1, kind="raw", model=model)
            total = total + found.values[0].double().cpu()
        means.append(total / len(given))
    best = Scores(means[0] - means[1], ("layer", part)).top(k)
    return list(zip(best["layer"].tolist(), best[part].tolist(), best["value"].tolist(), strict=True))


def parts_of(model: Made, contrast: Contrast, n_heads: int, n_neurons: int) -> dict[str, Made]:
    """Return direction, heads and neurons of a contrast, each with its program."""
    sides = contrast.made()
    begun: dict[str, Any] = {"lead_in": contrast.lead_in} if contrast.lead_in else {}
    direction = make("direction", contrast_direction, model, *sides, **begun)
    heads = make("heads", contributions, model, *sides, direction, "head", n_heads, **begun)
    neurons = make("neurons", contributions, model, *sides, direction, "neuron", n_neurons, **begun)
    return {"direction": direction, "heads": heads, "neurons": neurons}


# --- what visitors give ---------------------------------------------------------------------------------------


def take_images(
    session: Session,
    first: Sequence[str] | None,
    second: Sequence[str] | None,
    name: str,
    limits: Limits,
    question: str = FEELING,
    lead_in: str = "",
) -> Contrast:
    """Keep two sets of images, of any numbers, in the tab's folder; `question` is asked about each.

    Raises: ValueError for an empty set, too many images, or one that cannot be used."""
    sides = [list(first or ()), list(second or ())]
    if not all(sides):
        raise ValueError(f"A direction needs images on both sides; got {len(sides[0])} and {len(sides[1])}.")
    for files in sides:
        if len(files) > limits.pairs:
            raise ValueError(
                f"{counted(len(files), 'image')} were given on one side; the limit here is {limits.pairs}."
            )
    question, lead_in = question.strip() or FEELING, lead_in.strip()
    if max(len(question), len(lead_in)) > limits.prompt_characters:
        raise ValueError(f"The question has more than {limits.prompt_characters:,} characters, the limit here.")
    folder = session.folder / f"{FOLDER}-{secrets.token_hex(6)}"
    digest = hashlib.sha256(repr((question, lead_in)).encode())
    try:
        with reading(folder / FOLDER, "two sets of images"):
            for side, files in zip(SIDES, sides, strict=True):
                (folder / side).mkdir(parents=True)
                digest.update(side.encode())
                for i, path in enumerate(files):
                    open_upload(path, limits)
                    target = folder / side / f"{i + 1:03d}-{plain_stem(path)}{Path(path).suffix.lower()}"
                    shutil.copyfile(path, target)
                    digest.update(target.read_bytes())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    asked: dict[str, Any] = {"question": question, "lead_in": lead_in}
    kept = Contrast(name=label(name, "first set"), fingerprint=digest.hexdigest(), folder=folder, **asked)
    forget(session)
    session.kept["contrast"] = kept
    return kept


def take_prompts(session: Session, first: str, second: str, name: str, limits: Limits) -> Contrast:
    """Keep two prompts. Raises: ValueError for an empty one, two that are the same, or one that is too long."""
    prompts = (first.strip(), second.strip())
    if not all(prompts) or prompts[0] == prompts[1]:
        raise ValueError("Write two different prompts, such as “I am overjoyed.” and “I am calm.”.")
    if max(map(len, prompts)) > limits.prompt_characters:
        raise ValueError(f"A prompt has more than {limits.prompt_characters:,} characters, the limit here.")
    digest = hashlib.sha256(repr(prompts).encode()).hexdigest()
    kept = Contrast(name=label(name, "first prompt"), fingerprint=digest, prompts=prompts)
    forget(session)
    session.kept["contrast"] = kept
    return kept


def label(name: str, otherwise: str) -> str:
    """Return what a direction is called."""
    return " ".join(name.split())[:MOST_LABEL] or otherwise


def forget(session: Session) -> None:
    """Drop a tab's contrast and its files."""
    old: Contrast | None = session.kept.pop("contrast", None)
    if old is not None and old.folder is not None:
        shutil.rmtree(old.folder, ignore_errors=True)


def export_sets(session: Session) -> list[str]:
    """Write the images as sets.zip, for the program that reads them; nothing where there are none."""
    kept: Contrast | None = session.kept.get("contrast")
    if kept is None or kept.folder is None:
        return []
    target = session.folder / f"{FOLDER}.zip"
    with zipfile.ZipFile(target, "w") as archive:
        for side in SIDES:
            for file in images_in(str(kept.folder / side)):
                archive.write(file, f"{FOLDER}/{side}/{Path(file).name}")
    return [str(target)]
