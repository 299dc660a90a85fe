"""A root of MER-UniBench with invented names, labels, subtitles, images and answers, in the published formats."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from veena_lens.emotion.mer_unibench.data_sets import SETS, SetInfo, find_set

SIX = ["worried", "happy", "neutral", "angry", "surprise", "sad"]
FLAT_FACES = ("mer2023", "meld", "cmumosei", "simsv2")
NO_FACE = {"meld": 1}


@dataclass(frozen=True, kw_only=True)
class Made:
    """The truths that were written, by set and name, in the order the loader gives."""

    root: Path
    output: Path
    truths: dict[str, dict[str, Any]]


def names_of(info: SetInfo) -> list[str]:
    count = 7 if info.key == "meld" else 6
    if info.key == "iemocapfour":
        return [f"Ses05M_x{i:02d}_F000" for i in range(count)]
    if info.key == "cmumosei":
        return ["-q_Z.a-_0", *(f"yt{i}-_a_{i}" for i in range(1, count))]
    return [f"{info.key}_{i:04d}" for i in range(count)]


def raw_labels(info: SetInfo) -> list[Any]:
    """Label values as the files hold them, every class present and numpy's types mixed in."""
    if info.kind == "open":
        return ["['happy', 'calm']", "[sad, tearful]", "[angry]", "", "[afraid, anxious]", "[surprised]"]
    if info.kind == "sentiment":
        b = info.bound
        return [b, -b, 0.0, np.float32(0.5), np.float64(-0.25), 1.0]
    if info.integers:
        return [i % len(info.classes) for i in range(len(names_of(info)))]
    return [np.str_(word) if info.key == "mer2024" else word for word in SIX]


def truths_of(info: SetInfo) -> dict[str, Any]:
    values = raw_labels(info)
    if info.kind == "sentiment":
        values = [float(value) for value in values]
    elif info.kind == "open":
        values = [value or "neutral" for value in values]
    elif info.integers:
        values = [info.classes[value] for value in values]
    return dict(zip(names_of(info), map(lambda v: str(v) if isinstance(v, np.str_) else v, values)))


def make_root(folder: Path, *, faces: bool = True) -> Made:
    """Write all nine sets under `folder/root`, and answers of each under `folder/output`."""
    root, output = folder / "root", folder / "output"
    for number, info in enumerate(SETS):
        # Both spellings of the folders are met.
        place = root / info.folders[-1 if number % 2 else 0]
        place.mkdir(parents=True)
        write_labels(place, info)
        write_subtitles(place, info)
        write_frames(place, info)
        if faces:
            write_faces(place, info)
        write_answers(output, info)
    return Made(root=root, output=output, truths={info.key: truths_of(info) for info in SETS})


def write_labels(place: Path, info: SetInfo, values: list[Any] | None = None) -> None:
    names, values = names_of(info), raw_labels(info) if values is None else values
    if info.kind == "open":
        rows = "".join(f'{name},"{value}"\n' for name, value in zip(names, values))
        (place / info.label_file).write_text("name,openset\n" + rows, encoding="utf-8")
        return
    keys = [np.str_(name) for name in names] if info.key == "mer2024" else names
    if info.kind == "sentiment":
        test = {name: {"emo": 0, "val": value} for name, value in zip(keys, values)}
    elif info.key == "mer2024":
        test = {name: {"emo": value} for name, value in zip(keys, values)}
    else:
        test = {name: {"emo": value, "val": -10} for name, value in zip(keys, values)}
    if info.key == "iemocapfour":
        others = {f"Ses01F_x{i:02d}_M000": {"emo": 1, "val": -10} for i in range(3)}
        arrays: dict[str, Any] = {"whole_corpus": others | test}
    elif info.key.startswith("mer2"):
        arrays = {"train_corpus": {}, "test1_corpus": test, "test2_corpus": {}, "test3_corpus": {}}
    else:
        arrays = {"train_corpus": {}, "val_corpus": {}, "test_corpus": test}
    np.savez_compressed(place / info.label_file, **arrays)


def write_subtitles(place: Path, info: SetInfo) -> None:
    """Row 0 quoted with a comma, row 1 twice (the last wins), row 2 empty, the last one absent (but for OV-MERD+)."""
    names = names_of(info)
    columns = {"sentence": "name,sentence", "english": "name,chinese,english", "chinese": "name,chinese"}
    column = info.subtitles[1]

    def row(name: str, text: str) -> str:
        return f'{name},"你好，世界","{text}"' if column == "english" else f'{name},"{text}"'

    rows = [row(names[1], "an older row"), row(names[0], "Well, hello"), row(names[1], "said twice"), row(names[2], "")]
    rows += [row(name, f"line {i}") for i, name in enumerate(names[3:], start=3)]
    if info.kind == "open":
        rows = rows[1:]
    else:
        rows = rows[:-1]
    text = "\n".join([columns[column], *rows]) + "\n"
    (place / info.subtitles[0][-1]).write_text(text, encoding="utf-8")


def write_frames(place: Path, info: SetInfo) -> None:
    """Three frames a clip as images, the middle one red, in the last of the set's video folders."""
    for name in names_of(info):
        clip = place / info.videos[-1] / name
        clip.mkdir(parents=True)
        for i, colour in enumerate([(0, 0, 90), (200, 0, 0), (0, 90, 0)]):
            Image.new("RGB", (24, 16), colour).save(clip / f"{i + 8}.png")


def write_faces(place: Path, info: SetInfo) -> None:
    """Nine crops a clip, flat or in folders, blue as OpenCV stores it: a lost swap makes them red."""
    for i, name in enumerate(names_of(info)):
        # Full size once: the reader takes any, and the folder stays small.
        size = 112 if info.key == "mer2023" and i == 0 else 8
        crops = np.zeros((9, size, size, 3), dtype=np.uint8)
        crops[..., 0] = 250
        crops[..., 1] = np.arange(9, dtype=np.uint8)[:, None, None]
        at = place / "openface_face"
        if info.key not in FLAT_FACES:
            at = at / name
        at.mkdir(parents=True, exist_ok=True)
        np.save(at / f"{name}.npy", crops[:0] if NO_FACE.get(info.key) == i else crops)


def write_answers(output: Path, info: SetInfo) -> None:
    """The three npz of a stem: one name without an answer (the last), one answer without a name, one stray word.

    Labels: the truth for even samples, "bored" for odd ones; sentiment: positive for the first two, "mixed" then."""
    names = names_of(info)[:-1]
    place = output / f"results-{info.key}" / "run_a"
    place.mkdir(parents=True)
    truths = truths_of(info)
    if info.kind == "sentiment":
        labels = ["[happy]", "[joyful, sad]", "[calm]", "[sad]", "[]"]
    else:
        labels = [
            (truths[name] if info.kind == "open" else f"[{truths[name]}]") if i % 2 == 0 else "[bored]"
            for i, name in enumerate(names)
        ]
    words = ["positive", "positive", "mixed", "negative", "neutral"]
    said = {np.str_(name): f"The person looks {label.strip('[]') or 'blank'}." for name, label in zip(names, labels)}
    said["no_such_clip"] = "happy"
    np.savez_compressed(place / "stem.npz", name2reason=np.array(said, dtype=object))
    keys, items = np.array([*names, "no_such_clip"]), np.array([*labels, "[happy]"])
    np.savez_compressed(place / "stem-openset.npz", filenames=keys, fileitems=items)
    if info.kind == "sentiment":
        items = np.array([*words, "positive"])
        np.savez_compressed(place / "stem-openset-sentiment.npz", filenames=keys, fileitems=items)


def place_of(made: Made, key: str) -> Path:
    """The folder of a set under the made root."""
    return next(made.root / name for name in find_set(key).folders if (made.root / name).is_dir())
