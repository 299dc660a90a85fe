"""Every kind of file that is read, changed at random: it loads, or a named error says what is wrong, within bounds.

A few changes of each kind run with fixed seeds; `make fuzz` runs as many as VEENA_FUZZ says.
"""

import json
import math
import os
import random
import resource
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.cases import BY_NAME, counted, native_model, raw_inputs
from tests.checkpoints import tiny
from tests.checkpoints.test_lora import CASE as LORA_CASE
from tests.checkpoints.test_lora import build_hf
from tests.checkpoints.test_lora import write as write_lora
from tests.emotion.mer_unibench.synthetic import Made, make_root, place_of
from veena_lens import ActivationCache, HookedVLM, Scores
from veena_lens.app.view.files import open_cache, save_cache
from veena_lens.checkpoints import open_lora
from veena_lens.emotion.locate.direction_set import Directions
from veena_lens.emotion.mer_unibench import load_set, read_answers
from veena_lens.emotion.pairs.loading import load_pairs
from veena_lens.emotion.words.lexicon import read_lexicon
from veena_lens.interventions import Ablate, Circuit, Steer

TRIALS = int(os.environ.get("VEENA_FUZZ", "12"))
SECONDS, MEBIBYTES = 20, 600  # of one trial; a loaded machine is slow

ODD: list[Any] = [None, [], {}, "", "x", 0, -1, 1.5, True, 10**9, 10**30, [1], {"a": 1}, "\u2028", [[[[]]]]]


@dataclass(frozen=True)
class Kind:
    """How a file of a kind is written into a folder, and how it is read."""

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]
    slow: bool = False


def _checkpoint(name: str) -> Kind:
    def write(folder: Path) -> Path:
        shutil.copytree(_saved(), folder / "model")
        return folder / "model" / name

    return Kind(write, lambda path: HookedVLM.from_pretrained(path.parent), slow=True)


_KEPT: dict[str, Path] = {}


def _saved() -> Path:
    return _KEPT["checkpoint"]


def _adapter(name: str) -> Kind:
    def write(folder: Path) -> Path:
        write_lora(folder, build_hf(LORA_CASE, torch.float32), {"model.language_model.layers.0.self_attn.q_proj": 2})
        return folder / name

    def read(path: Path) -> Any:
        found = open_lora(path.parent)
        return found.file.shapes()

    return Kind(write, read, slow=True)


def _cache(folder: Path) -> Path:
    case = BY_NAME["three-images-and-none"]
    model = native_model(case)
    inputs = model.inputs_from_hf(**counted(raw_inputs(case)))
    wanted = ["blocks.0.hook_resid_pre", "blocks.1.attn.hook_pattern"]
    cache = model.run_with_cache(inputs, names_filter=wanted)[1]
    return save_cache(cache, folder / "cache.safetensors", pictures=[Image.new("RGB", (9, 8))], model_name="m")


def _directions(folder: Path) -> Path:
    states = torch.ones(2, 3)
    made = Directions(
        overall=states, per_emotion=states[None], emotions=["joy"], counts={"joy": 4}, norms=torch.ones(2),
        neutral_mean=states, emotional_mean=states, measured={"size": states}, meta={"model": "m"},
    )  # fmt: skip
    return made.save(folder / "directions.safetensors")


def _scores(folder: Path) -> Path:
    made = Scores(torch.rand(2, 2), ("layer", "head"), {"head": ["a", "b"]}, "n", "u", meta={"x": math.nan})
    return made.save(folder / "scores.safetensors")


def _circuit(folder: Path) -> Path:
    items = [Steer(0, torch.ones(3)), Ablate("blocks.0.hook_mlp_out")]
    return Circuit(items, "n", {"model": "m"}).save(folder / "circuit.safetensors")


def _root(folder: Path) -> Made:
    return make_root(folder, faces=False)


def _labels(folder: Path) -> Path:
    return place_of(_root(folder), "meld") / "label.npz"


def _answers(folder: Path) -> Path:
    return _root(folder).output / "results-meld" / "run_a" / "stem.npz"


def _lines(folder: Path) -> Path:
    rows = [{"run": {"set": "MELD"}}, {"name": "a", "answer": "x"}, {"name": "b", "answer": "y"}]
    path = folder / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def _pairs(folder: Path) -> Path:
    rows = []
    for emotion in ("happy", "neutral"):
        Image.new("RGB", (9, 8)).save(folder / f"{emotion}.png")
        rows.append({"file": f"{emotion}.png", "emotion": emotion, "pair": "p", "identity": "i", "question": "q"})
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def _lexicon(folder: Path) -> Path:
    found = {
        "emotions": {"joy": {"valence": "positive", "words": {"joy": ["joyful", "!glee"]}}},
        "shadows": ["x"], "source": "s",
    }  # fmt: skip
    path = folder / "lexicon.json"
    path.write_text(json.dumps(found))
    return path


KINDS: dict[str, Kind] = {
    "config": _checkpoint("config.json"),
    "weights": _checkpoint("model.safetensors"),
    "processor": _checkpoint("processor_config.json"),
    "tokenizer settings": _checkpoint("tokenizer_config.json"),
    "adapter settings": _adapter("adapter_config.json"),
    "adapter": _adapter("adapter_model.safetensors"),
    "circuit": Kind(_circuit, Circuit.load),
    "directions": Kind(_directions, Directions.load),
    "scores": Kind(_scores, Scores.load),
    "cache": Kind(_cache, ActivationCache.load),
    "view": Kind(_cache, open_cache),
    "labels": Kind(_labels, lambda path: load_set(path.parent.parent, "meld")),
    "answers": Kind(_answers, lambda path: read_answers(path, beside=False)),
    "answer lines": Kind(_lines, read_answers),
    "lexicon": Kind(_lexicon, read_lexicon),
    "pairs": Kind(_pairs, lambda path: load_pairs(path.parent)),
}


# --- changes ------------------------------------------------------------------------------------------------
def flip(path: Path, chance: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 5)):
        # Most of a file are numbers; its beginning says what they mean.
        raw[chance.randrange(min(len(raw), chance.choice([200, len(raw)])))] = chance.randrange(256)
    path.write_bytes(raw)


def cut(path: Path, chance: random.Random) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: chance.randrange(len(raw))])


def replace_by(path: Path, chance: random.Random) -> None:
    path.unlink()
    how = chance.randrange(6)
    if how == 0:
        path.mkdir()
    elif how == 1:
        os.mkfifo(path)
    elif how == 2:
        path.symlink_to("/dev/zero")
    elif how == 3:
        path.symlink_to(path.parent / "nowhere")
    else:
        path.write_bytes(b"" if how == 4 else b"\xef\xbb\xbf{}")


def _changed(value: Any, chance: random.Random) -> Any:
    """Change, remove or nest one value somewhere inside another."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key, how = chance.choice(list(value)), chance.random()
        if how < 0.2:
            return {k: v for k, v in value.items() if k != key}
        if how < 0.3:
            return value | {chance.choice(["extra", "\n", ""]): chance.choice(ODD)}
        return value | {key: _changed(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return [*value[:place], _changed(value[place], chance), *value[place + 1 :]]
    return chance.choice([*ODD, math.nan, math.inf])


def edit_words(path: Path, chance: random.Random) -> None:
    """Change the JSON of a file, or of a safetensors header."""
    if path.suffix == ".safetensors":
        with safe_open(str(path), framework="pt") as file:
            about = dict(file.metadata() or {})
        if not about:
            return
        field = chance.choice(list(about))
        with_words = about[field].startswith("{")
        about[field] = json.dumps(_changed(json.loads(about[field]), chance)) if with_words else "other"
        save_file(load_file(path), path, metadata=about)
    elif path.suffix == ".jsonl":
        lines = path.read_text().split("\n")
        place = chance.randrange(len(lines) - 1)
        lines[place] = json.dumps(_changed(json.loads(lines[place]), chance))
        path.write_text("\n".join(lines))
    elif path.suffix == ".json":
        found = json.loads(path.read_text())
        path.write_text(json.dumps(_changed(found, chance)))
    else:
        edit_arrays(path, chance)


def edit_tensors(path: Path, chance: random.Random) -> None:
    """Change the shape, dtype, numbers or name of a tensor."""
    if path.suffix != ".safetensors":
        edit_words(path, chance)
        return
    with safe_open(str(path), framework="pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    name = chance.choice(sorted(tensors))
    how, tensor = chance.randrange(6), tensors.pop(name)
    if how == 0:
        tensors[name + chance.choice(["x", "\n", ".0"])] = tensor
    elif how == 1:
        tensors[name] = tensor.flatten()[: chance.randrange(tensor.numel() + 1)].clone()
    elif how == 2:
        tensors[name] = tensor.to(
            chance.choice([torch.int8, torch.float16, torch.bool, torch.int64, torch.float8_e5m2])
        )
    elif how == 3 and tensor.is_floating_point():
        tensors[name] = torch.full_like(tensor, chance.choice([math.nan, math.inf]))
    elif how == 4:
        tensors[name] = tensor[None].clone()
    save_file(tensors, path, metadata=about)


def edit_arrays(path: Path, chance: random.Random) -> None:
    """Change the bytes inside an archive, packed anew."""
    with zipfile.ZipFile(path) as archive:
        content = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    raw = content[chance.choice(list(content))]
    for _ in range(chance.randint(1, 4)):
        raw[chance.randrange(100, len(raw))] = chance.randrange(256)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, bytes(data))


CHANGES = (flip, cut, replace_by, edit_words, edit_words, edit_tensors, edit_tensors)


@pytest.fixture(scope="module", autouse=True)
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    _KEPT["checkpoint"] = tiny.save(BY_NAME["clip-llama"], tmp_path_factory.mktemp("saved"))[1]
    yield
    _KEPT.clear()


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.filterwarnings("ignore")
def test_a_changed_file_loads_or_is_refused_by_name(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    original = kind.write(tmp_path)
    kind.read(original)
    whole = original.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(max(1, TRIALS // 2 if kind.slow else TRIALS)):
        chance = random.Random(f"{name} {seed}")
        change = CHANGES[seed % len(CHANGES)]
        change(original, chance)
        started = time.monotonic()
        try:
            kind.read(original)
        except (ValueError, OSError) as error:
            assert type(error).__module__.split(".")[0] in ("builtins", "veena_lens"), (seed, change, error)
            assert not isinstance(error, UnicodeError) and len(str(error)) > 20, (seed, change, repr(error))
        except Exception as error:
            pytest.fail(f"seed {seed}, {change.__name__}: {type(error).__name__}: {str(error)[:600]}")
        assert time.monotonic() - started < SECONDS, (seed, change)
        if original.is_dir() and not original.is_symlink():
            original.rmdir()
        else:
            original.unlink()
        original.write_bytes(whole)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEBIBYTES, f"{grown:.0f} MiB"
