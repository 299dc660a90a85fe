"""The main job on the embedded models: describe faces, look inside, patch and steer, with controls.

Directions, layer and strength are chosen on development identities; everything that is shown or counted is on test
identities, which neither the training nor that choice has seen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.app.demo_page import write_comparison, write_page
from veena_lens.app.demo_results import Comparison, DemoResult, Description, Inside
from veena_lens.app.demo_steering import asked, steer
from veena_lens.app.questions import DESCRIBE, FEELING, LIST
from veena_lens.app.view import ExplorerView
from veena_lens.checkpoints.files import bundled_pairs, bundled_pictures
from veena_lens.circuits import image_attention, logit_lens
from veena_lens.emotion import generate_answers, load_pairs
from veena_lens.inputs import MultimodalInputs
from veena_lens.long_runs import write_file
from veena_lens.scores import Scores
from veena_lens.sweeps import patch_sweep
from veena_lens.sweeps.metrics import logit_diff
from veena_lens.zoo.people import EMOTIONS, WORDS, named_emotion

if TYPE_CHECKING:
    from veena_lens.checkpoints.files import Picture
    from veena_lens.model.model import HookedVLM

BATCH = 32


@contextmanager
def few_threads(model: HookedVLM) -> Iterator[None]:
    """Use one thread for a small model: its matrices gain nothing from a second one, and where other programs share
    the cores, waiting for it makes a forward pass ten times as slow."""
    before = torch.get_num_threads()
    if sum(parameter.numel() for parameter in model.parameters()) < 50_000_000:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_demo(out: str | Path, model: str = "tiny-llava-emotion", progress: bool = True) -> DemoResult:
    """Describe, look inside, patch and steer; write `index.html`, the figures and `numbers.json` under `out`.

    model: name or folder of a checkpoint. progress: print what runs, with the seconds since the start.
    Raises: FileNotFoundError where the checkpoint or its images are missing."""
    from veena_lens.model.model import HookedVLM

    began = time.perf_counter()

    def say(text: str) -> None:
        if progress:
            print(f"[{time.perf_counter() - began:5.1f} s] {text}", flush=True)

    say("loading the model")
    vlm = HookedVLM.from_pretrained(model)
    with few_threads(vlm):
        result = _run(vlm, Path(out), model, began, say)
    result.out.mkdir(parents=True, exist_ok=True)
    _write_json(result.out / "numbers.json", result.numbers)
    write_page(result)
    return result


def run_demos(out: str | Path, models: Sequence[str], progress: bool = True) -> Comparison:
    """Run the demo on each model, in a folder of its name under `out`; write `index.html` over all of them.

    models: names or folders of checkpoints. progress: as in `run_demo`.
    Raises: ValueError for a model named twice or none, FileNotFoundError for a checkpoint that is missing."""
    names = [Path(model).name for model in models]
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"demo: got models {list(models)}; name at least one model, each of them once.")
    results = []
    for model, name in zip(models, names, strict=True):
        if progress:
            print(f"{model}:", flush=True)
        results.append(run_demo(Path(out) / name, model=model, progress=progress))
    comparison = Comparison(results, Path(out))
    _write_json(comparison.out / "numbers.json", {result.name: result.numbers for result in results})
    write_comparison(comparison)
    return comparison


def _write_json(path: Path, numbers: dict) -> None:
    write_file(path, json.dumps(numbers, indent=1) + "\n")


def _run(vlm: HookedVLM, out: Path, model: str, began: float, say: Callable[[str], None]) -> DemoResult:
    test = [picture for picture in bundled_pictures("test") if picture.context is None]
    unseen_styles = [picture for split in ("held-out style", "emoji") for picture in bundled_pictures(split)]
    shown = choose(test, unseen_styles)
    say(f"describing {len(shown)} images and naming {len(test)}")
    texts = generate_answers(vlm, asked(shown, DESCRIBE), batch_size=BATCH, max_new_tokens=60)
    descriptions = [Description(picture, text.strip()) for picture, text in zip(shown, texts, strict=True)]
    names = generate_answers(vlm, asked(test, LIST), batch_size=BATCH, max_new_tokens=4)
    right = {p.file for p, text in zip(test, names, strict=True) if named_emotion(text) == p.emotion}
    say("looking inside: attention, logit lens, patching of every image token and head, the interactive view")
    emotional, calm = choose_pair(bundled_pairs("test"), shown, right)
    strangers = [p for p in test if p.emotion == "neutral" and p.identity != calm.identity]
    inside = look_inside(vlm, emotional, calm, strangers[0])
    say("extracting directions from pairs, steering development images at every layer")
    neutral = sorted((p for p in test if p.emotion == "neutral"), key=lambda p: (p.file not in right, p not in shown))
    steered = steer(vlm, load_pairs().select(split="development", condition="none"), neutral, say)
    say("writing the page")
    return DemoResult(
        model=model,
        out=out,
        descriptions=descriptions,
        named_right=len(right),
        named_of=len(test),
        inside=inside,
        steered=steered,
        seconds=time.perf_counter() - began,
    )


def choose(test: Sequence[Picture], unseen_styles: Sequence[Picture]) -> list[Picture]:
    """Choose a test image of each emotion, of another person each, then a happy and a sad one of every other style."""
    by_emotion = {emotion: [p for p in test if p.emotion == emotion] for emotion in EMOTIONS}
    faces = [drawn[place % len(drawn)] for place, drawn in enumerate(by_emotion.values()) if drawn]
    first = {(p.style, p.emotion): p for p in reversed(unseen_styles) if p.emotion in ("happy", "sad")}
    return faces + sorted(first.values(), key=lambda p: (p.split, p.style, p.emotion))


def choose_pair(
    pairs: Sequence[tuple[Picture, Picture]], shown: Sequence[Picture], right: Collection[str]
) -> tuple[Picture, Picture]:
    """Choose a pair that is named right on both sides: that of an image already shown if possible, surprise first."""
    files = [picture.file for picture in shown]

    def place(pair: tuple[Picture, Picture]) -> tuple[bool, bool, bool]:
        wrong = pair[0].file not in right or pair[1].file not in right
        return wrong, pair[0].file not in files, pair[0].emotion != "surprised"

    return min(pairs, key=place)


def look_inside(model: HookedVLM, emotional: Picture, neutral: Picture, stranger: Picture) -> Inside:
    """Compute attention, logit lens and patching on one image and its neutral twin, and the view to hover over.

    stranger: the neutral face of another person, whose image tokens are patched as a control."""
    shown, twin = (model.prepare(text=LIST, images=picture.open()) for picture in (emotional, neutral))
    tokens = {emotion: model.to_single_token(f" {WORDS[emotion].head}") for emotion in EMOTIONS}
    lens = logit_lens(model, shown, "last", list(tokens.values()), values="prob").select(batch=0)
    best = logit_lens(model, shown, "last", k=5, values="prob").select(batch=0)
    texts, ids = best.meta["texts"], best.meta["tokens"][0]
    likeliest = [
        [(texts[str(token)].strip(), p) for token, p in zip(cells[0], values[0].tolist(), strict=True)]
        for cells, values in zip(ids, best.values, strict=True)
    ]
    metric = logit_diff(tokens[emotional.emotion], tokens["neutral"])
    patched = patch_sweep(model, shown, twin, "heads", "all", metric, progress=False)
    meta = {"emotional": patched.clean.item(), "neutral": patched.corrupted.item()}
    other = model.prepare(text=LIST, images=stranger.open())
    changes = [cell_changes(model, source, twin, metric) for source in (shown, other)]
    cells = Scores(
        torch.stack(changes), ("source", "height", "width"), {"source": [emotional.emotion, "stranger"]},
        "change of the logit difference", "logits",
    )  # fmt: skip
    view = ExplorerView.from_run(model, (emotional.open(), FEELING), answer=True, other=neutral.open())
    return Inside(
        emotional=emotional,
        neutral=neutral,
        attention=image_attention(model, shown).select(batch=0).mean("head"),
        patch_boxes=None if shown.patch_boxes is None else shown.patch_boxes[0][0],
        lens=Scores(lens.values[:, 0], ("layer", "emotion"), {"emotion": EMOTIONS}, "probability"),
        likeliest=likeliest,
        patching=Scores(patched.scores, patched.axes, patched.labels, "share of the effect", meta=meta),
        cells=cells,
        view=view.html(),
    )


def cell_changes(
    model: HookedVLM, source: MultimodalInputs, twin: MultimodalInputs, metric: Callable[..., Tensor]
) -> Float[Tensor, "height width"]:
    """Return by how much each image token of `source`, patched alone before layer 0, changes the metric of `twin`."""
    sweep = patch_sweep(model, source, twin, "resid", "each", metric, layers=[0], progress=False)
    return (sweep.values[0] - sweep.corrupted)[twin.grid_tokens(0)]
