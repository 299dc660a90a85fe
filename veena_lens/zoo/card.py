"""Write the model card; every figure on it comes from `results.json` and the training log."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veena_lens.zoo.model import architecture_of
from veena_lens.zoo.people import EMOTIONS

__all__ = ["write_card"]


@dataclass(frozen=True, kw_only=True)
class _Words:
    """Hold the texts of the card for one architecture."""

    kind: str
    format: str
    picture_tokens: str
    feature: str
    start: str
    tower: str
    pictures: str
    shapes: str


_WORDS = {
    "tiny-llava-emotion": _Words(
        kind="A LLaVA",
        format="""(`LlavaForConditionalGeneration`, CLIP tower of 4 layers on 96 x 96 pixels in patches of
12, so 64 image tokens; Llama of 8 layers and 8 heads, width 192), and `AutoProcessor` and
`AutoModelForImageTextToText` load it.""",
        picture_tokens="64",
        feature="patch feature",
        start="",
        tower="",
        pictures="",
        shapes="",
    ),
    "tiny-qwen2vl-emotion": _Words(
        kind="A Qwen2-VL",
        format="""(`Qwen2VLForConditionalGeneration`; tower of 4 layers, width 128, 4 heads, patches of 8
pixels merged two by two, so a square image of any size becomes 96 x 96 pixels and 6 x 6 image tokens; decoder of 8
layers, 8 heads, 4 key and value heads, width 192, multimodal rotary sections 4, 4, 4), with the files and names of a
real Qwen2-VL folder. `AutoModelForImageTextToText`, `AutoTokenizer` and `AutoImageProcessor` load it; `AutoProcessor`
needs torchvision; `veena_lens.checkpoints.image_only.ImageOnlyQwen2VLProcessor` works without. It shares the images,
captions, splits and questions of its sibling `tiny-llava-emotion`.""",
        picture_tokens="36",
        feature="merged feature and on all 36 side by side",
        start="""
The decoder starts from its sibling's: key and value heads averaged in pairs, biases 0, the rows of shared words, and
for each special token the row of the token with the same role.
""",
        tower="""
   The tower also imitates its sibling: the loss includes the squared distance of the merged features to those that the
   sibling's decoder reads of the same image (8 x 8 features averaged to 6 x 6), in units of their variance, with weight
   8. This continues during the mix.""",
        pictures=""" In the tower stage three
images in ten have swapped channels, paler colours and another contrast, without labels for hair and background. One
batch in ten shows the same faces with margins at two sides, as 5 x 7, 7 x 5, 4 x 8 or 8 x 4 tokens.""",
        shapes="""
* Images that are not square keep their shape, with a grid of about as many tokens. Faces in such images were part of
  the training (one batch in ten) but are not in the tables above.""",
    ),
}


def _share(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    return f"{100 * entry['value']:.1f} % [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _confusion(table: dict[str, dict[str, int]]) -> str:
    columns = [*EMOTIONS, "none"] if any("none" in row for row in table.values()) else list(EMOTIONS)
    rows = [[f"**{true}**", *(str(table[true].get(c, 0)) for c in columns)] for true in EMOTIONS if true in table]
    return _table(["drawn \\ answered", *columns], rows)


def _alone(results: dict[str, Any]) -> str:
    table = results["picture alone"]
    rows = [["all", _share(table["all"])]]
    rows += [[name, _share(entry)] for name, entry in table["by emotion"].items()]
    rows += [["clear faces", _share(table["clear"])], ["subtle faces", _share(table["subtle"])]]
    by_draw = ", ".join(f"{100 * value:.1f}" for value in table["by draw"])
    figures = _table(["emotion", "right"], rows)
    return f"{figures}\n\nBy draw of the images: {by_draw} %.\n\n{_confusion(table['confusion'])}"


def _contexts(results: dict[str, Any]) -> str:
    rows = []
    for name, entry in results["contexts"].items():
        deviation = entry["text deviation"]
        spread = f"{100 * deviation:.1f}" if deviation is not None else "-"
        rows.append([name, str(entry["picture"]["count"]), _share(entry["picture"]), _share(entry["text"]), spread])
    return _table(["context", "answers", "image followed", "text followed", "SD over draws (points)"], rows)


def _attributes(results: dict[str, Any]) -> str:
    return _table(["question", "right"], [[name, _share(entry)] for name, entry in results["attributes"].items()])


def _tasks(results: dict[str, Any]) -> str:
    rows = []
    for name, entry in results["tasks"].items():
        low, middle, high = entry["tokens"]
        lengths = f"{low} / {middle:g} / {high}"
        rows.append([name, _share(entry["emotion right"]), _share(entry["one emotion throughout"]), lengths])
    example = results["tasks"]["caption"]["examples"][0]
    header = ["answer", "first emotion word right", "one emotion throughout", "tokens (least / median / most)"]
    return f'{_table(header, rows)}\n\nA caption: "{example}"'


def _others(results: dict[str, Any]) -> str:
    blocks = []
    entries = [
        (f"{name} ({'held out' if entry['held out'] else 'a training style, test identities'})", entry)
        for name, entry in results["styles"].items()
    ]
    entries.append(("emoji (held out)", results["emoji"]))
    chosen = ["all", *EMOTIONS]
    rows = []
    for name, entry in entries:
        cells = [_share(entry["all"])] + [
            f"{100 * entry['by emotion'][e]['value']:.0f} %" if e in entry["by emotion"] else "-" for e in EMOTIONS
        ]
        rows.append([name, *cells])
    blocks.append(_table(["style", *chosen], rows))
    blocks += [f"{name}:\n\n{_confusion(entry['confusion'])}" for name, entry in entries if "held out)" in name]
    return "\n\n".join(blocks)


def _attention(results: dict[str, Any]) -> str:
    rows = [[name, *(f"{value:.2f}" for value in row)] for name, row in results["attention to the picture"].items()]
    layers = [str(layer) for layer in range(len(rows[0]) - 1)]
    return _table(["layer", *layers], rows)


def _training(folder: Path) -> str:
    path = folder / "training.json"
    if not path.exists():
        return "There is no training record."
    record = json.loads(path.read_text())
    rows = [
        [s["stage"], str(s["steps"]), f"{s['pictures']:,}", f"{s['minutes']:.1f}", f"{s['loss']:.3f}"]
        for s in record["stages"]
    ]
    minutes = sum(s["minutes"] for s in record["stages"])
    remarks = "".join(f"\n\n{remark}" for remark in record.get("remarks", []))
    return (
        f"{_table(['stage', 'steps', 'images', 'minutes', 'last loss'], rows)}\n\n"
        f"In all {minutes:.0f} minutes on {record['where']}, seed {record['seed']}. "
        "Stages ended after their share of the minutes; the cores also did other work, so repeat the number of "
        f"steps, not the time.{remarks}"
    )


def _comparison(folder: Path) -> str:
    path = folder / "comparison.json"
    if not path.exists():
        return ""
    kept = json.loads(path.read_text())
    rows = [
        [
            row["table"] + ("" if row["part"] == "all" else f": {row['part']}"),
            row["measure"],
            str(row["answers"]),
            f"{100 * row['sibling']:.1f} %",
            f"{100 * row['twin']:.1f} %",
            f"{100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]",
            {"within": "yes", "above": "no, more", "below": "no, less"}[row["verdict"]],
        ]
        for row in kept["rows"]
    ]
    header = ["asked", "counted", "answers", kept["sibling"], "this one", "difference (points)", "within three points"]
    few = sum(row["verdict"] != "within" for row in kept["rows"])
    return f"""
### Compared with its sibling

`python -m veena_lens.zoo.compare` asked both checkpoints the same questions about the test identities, at least 600 per
row (styles and emoji are drawn several times, with other combinations or questions, so shares differ a little from
those above). The difference is paired, its 95 % interval comes from resampling identities, and the last column says
whether that interval comes within three points of zero; {len(rows) - few} of {len(rows)} rows do.

{_table(header, rows)}
"""


def _looks(folder: Path) -> str:
    path = folder / "training.json"
    return (json.loads(path.read_text()) if path.exists() else {}).get("looks", "used once, for this card")


def write_card(folder: Path, results: dict[str, Any]) -> None:
    """Write the card as README.md into the checkpoint folder."""
    millions, megabytes = results["parameters"] / 1e6, results["bytes"] / 1e6
    architecture = architecture_of(folder)
    words, name = _WORDS[architecture.name], architecture.name
    early = f"{100 * architecture.stages[-1].early:.0f} %"
    mix = ", ".join(f"{100 * share:.0f} % {style}" for style, share in architecture.styles.items())
    mix = mix.replace("avataaars", "avataaars (3,000 identities)")
    text = f"""# {name}

{words.kind} of {millions:.2f} million parameters ({megabytes:.1f} MB in float32) that names the
emotion of drawn faces. It is made for studying on a laptop how a vision-language model comes to name an emotion. The
format is Hugging Face's own {words.format} It knows only drawn faces and a few hundred words.

Eight classes: {", ".join(EMOTIONS)}. It answers with a list of emotions, a sentence or a caption, and names hair
colour, background, glasses, beard, mouth, eyes and eyebrows. A sentence before the question may suggest another emotion
than the face; the model then follows the text in a share of cases that grows with the strength of the sentence ("maybe
...", plain, "everybody knows that ..."). This is the emotional hallucination that interventions are meant to reduce.

## Evaluation

Answers are greedy, from the saved folder, to images of 192 pixels through its own processor.
{results["identities"]} test identities (hair, skin, glasses, beard, clothes) never occur in training; each is drawn
once in each of {results["draws"]} draws, with emotions equally often. Brackets are 95 % intervals from resampling
identities. The test identities, the held-out styles and the emoji were {_looks(folder)}.

### Emotion from the image alone

{_alone(results)}

### With a context before the question

"Conflict" suggests one of the seven other emotions, "consistent" the drawn one. Each strength has its own rate in
the training data. "Held-out sentences" never occur in training, although their words do.

{_contexts(results)}

### Attributes

{_attributes(results)}

### Sentences and captions

{_tasks(results)}

### Other drawing styles

Each style is shown with the emotions that it can draw.

{_others(results)}

### Attention to the image

The share of the last prompt token's attention on the {words.picture_tokens} image tokens, averaged over heads and 48
prompts.

{_attention(results)}
{_comparison(folder)}
## Recipe

`python -m veena_lens.zoo.train --model {name} --out DIR`;
`python -m veena_lens.zoo.evaluate --checkpoint {name}` writes this card and `results.json`.

{_training(folder)}
{words.start}
1. *Tower*: linear heads on the mean {words.feature} for emotion, mouth, eyes,
   eyebrows, hair, background, glasses, beard.{words.tower}
2. *Alignment*: one emotion and five attribute questions per image, short answers, no contexts.
3. *Mix*: two emotion and four attribute questions per image; contexts rare in the first {early}, then
   30 % none, 20 % consistent, 50 % conflict. In conflicts the answer follows the text with a probability fixed by
   strength and by how clear the face is (weak 0.10 / 0.25, plain 0.35 / 0.85, strong 0.80 / 0.92 for a clear / subtle
   face), so the greedy answer is stable.

Images: {mix}; shifted, mirrored, rotated,
scaled and varied in brightness, on eight plain backgrounds that are independent of emotion.{words.pictures} AdamW,
cosine schedule, float32.

## Limits

* Drawn faces on plain backgrounds, one face per image; photographs and several images were not part of the training
  and give noise.{words.shapes}
* On other styles it is far weaker than on the main one, and for some emotions of held-out styles never right (see the
  table; guessing among eight gives 12.5 %). Its answers there mean nothing.
* A few hundred English words in lower case; other words are encoded in pieces without meaning for the model.
* Emotion is a drawn convention here, chosen by the authors of the recipe, and not a finding about people.
* One seed. Figures of another training run will differ by more than the intervals above, which cover only the sampling
  of the test images.

## Licences

The weights are released under the licence of this repository. They were trained on drawings under these terms:
avataaars by Pablo Stanley (free for personal and commercial use) through python_avatars (MIT); Adventurer by Lisa
Wischofsky, ToonHead by Johan Melin and Custom Avatar ("big-smile") by Ashley Seo (all CC BY 4.0) through DiceBear.
Used for evaluation only: Open Peeps by Pablo Stanley (CC0 1.0), Avatar Illustration System ("micah") by Micah Lanier
(CC BY 4.0), Twemoji graphics by Twitter, Inc. and other contributors (CC BY 4.0). Notices are next to the drawings in
`veena_lens/zoo/art/` and in `veena_lens/checkpoints/bundled/pictures/LICENSES.md`.
"""
    (folder / "README.md").write_text(text)
