"""Draw the figure of README.md with its own code, and those of docs/concepts.md: `python docs/figures.py`."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import torch

from veena_lens import HookedVLM, plots
from veena_lens.checkpoints import bundled_pairs
from veena_lens.positions import position_mask
from veena_lens.sweeps import patch_sweep
from veena_lens.sweeps.metrics import logit_diff

FOLDER = Path(__file__).parent
README = FOLDER.parent / "README.md"
PICTURE = "patching.png"  # of the README
QUESTION = "how does the person in the picture feel?"
LEAD = "the person feels"


def example() -> str:
    """Return the code that stands below the README's picture."""
    found = re.search(r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def readme(folder: Path) -> Path:
    """Run the README's example, and keep the picture that it saves."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as away:
        os.chdir(away)
        try:
            exec(compile(example(), str(README), "exec"), {"__name__": "__page__"})
        finally:
            os.chdir(before)
        return Path(shutil.copy(Path(away) / PICTURE, folder / PICTURE))


def chessboard(height: int, width: int) -> torch.Tensor:
    """Return alternating cells, so that each can be seen."""
    return ((torch.arange(height)[:, None] + torch.arange(width)) % 2).float()


def spans(model: HookedVLM) -> dict[str, object]:
    """Draw the words for positions over one prompt and its answer, and the cells of images of two shapes."""
    from PIL import Image

    happy = bundled_pairs("test")[0][0].open().convert("RGB")
    inputs = model.prepare(text=QUESTION, images=happy).with_answer(f"{LEAD} happy.")
    words = ("image", "query", "last", "generated", "prompt")
    chosen = torch.stack([position_mask(inputs, word)[0] for word in words]).float()
    image = inputs.spans[0].images[0]
    shown = [place for place in range(inputs.shape[1]) if not image.start + 2 <= place < image.stop - 2]
    tokens = [model.to_string(inputs.tokens[0, place][None]).strip() for place in shown]
    strip = plots.heatmap(
        chosen[:, shown], x=tokens, y=words, numbers=False, limits=(0, 1), name="chosen",
        x_name=f"token (of the {image.stop - image.start} image tokens, the first and last two)",
    )  # fmt: skip
    qwen = HookedVLM.from_pretrained("tiny-qwen2vl-emotion")
    wide = happy.resize((300, 120), Image.Resampling.LANCZOS)
    asked = qwen.prepare(text=QUESTION, images=wide)
    return {
        "spans.png": strip,
        "cells.png": plots.overlay(
            happy, chessboard(*inputs.grids[0][0]), patch_boxes=inputs.patch_boxes[0][0], title="one cell per token"
        ),
        "cells-wide.png": plots.overlay(
            wide, chessboard(*asked.grids[0][0]), patch_boxes=asked.patch_boxes[0][0], title="one cell per token"
        ),
    }


def staircase(model: HookedVLM) -> dict[str, object]:
    """Draw which layers the rows of a head sweep recompute: rows of layer l join the batch at layer l."""
    layers = torch.arange(model.cfg.n_layers)
    runs = (layers[:, None] >= layers).float()
    figure = plots.heatmap(
        runs, x_name="rows that patch a head of layer", y_name="layer", numbers=False, limits=(0, 1), name="recomputed"
    )
    return {"staircase.png": figure}


def restoration(model: HookedVLM) -> dict[str, object]:
    """Draw the effect that a patch of the residual stream restores, over layers and positions."""
    emotional, neutral = next(pair for pair in bundled_pairs("test") if pair[0].emotion == "surprised")
    clean, corrupted = (model.prepare(text=QUESTION, images=p.open()).with_answer(LEAD) for p in (emotional, neutral))
    metric = logit_diff(model.to_single_token(" surprised"), model.to_single_token(" neutral"))
    effects = patch_sweep(model, clean, corrupted, sites="resid", positions="each", metric=metric, progress=False)
    values = effects.scores.float()
    image = clean.image_mask[0].cpu()
    text = [place for place in range(clean.shape[1]) if not image[place]]
    table = torch.cat([values[:, image].amax(1, keepdim=True), values[:, text]], 1)
    words = ["image (largest)", *(model.to_string(clean.tokens[0, place][None]).strip() for place in text)]
    return {
        "restoration.png": plots.heatmap(
            table, x=words, x_name="position", y_name="layer", name="effect restored", center=0, numbers=False
        ),
    }


def draw(folder: Path = FOLDER) -> list[Path]:
    """Write every figure and return their paths."""
    torch.set_grad_enabled(False)
    model = HookedVLM.from_pretrained("tiny-llava-emotion")
    figures = spans(model) | staircase(model) | restoration(model)
    return [readme(folder), *(plots.save(figure, folder / name) for name, figure in figures.items())]  # type: ignore[arg-type]


if __name__ == "__main__":
    print(*draw(), sep="\n")
