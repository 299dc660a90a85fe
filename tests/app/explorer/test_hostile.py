"""Files that are damaged, enormous or made to mislead end in a sentence, whatever they hold."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from tests.app.explorer.conftest import NAME, QUESTION
from veena_lens.app.explorer import look, steer
from veena_lens.app.explorer.own_pairs import take_zip
from veena_lens.app.explorer.parts import cells_value
from veena_lens.app.explorer.pictures import open_upload
from veena_lens.app.explorer.state import Explorer, Limits, Session, message, reading
from veena_lens.app.view import save_cache
from veena_lens.interventions import Circuit, ScaleNeurons, Steer

LIMITS = Limits(upload_bytes=300_000, pixels=100_000, pairs=4)


def told(path: Path, run: Any) -> str:
    """The sentence that a bad file ends in; it names the file and no folder of the server."""
    with pytest.raises(ValueError) as error:
        run(path)
    text = str(error.value)
    assert text == message(error.value).message and " " in text and "Traceback" not in text
    assert str(path.parent) not in text, text
    return text


# --- images ---------------------------------------------------------------------------------------------------


def png(width: int, height: int, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG that claims a size, with further chunks, and a few bytes of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(*m) for m in more), chunk(b"IDAT", zlib.compress(bytes(100)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


TEXT_BOMB = (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7)))


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("empty.png", b"", "empty.png cannot be read as an image"),
        ("text.jpg", b"no image at all", "text.jpg cannot be read as an image"),
        ("bomb.png", png(60_000, 60_000), "bomb.png has too many pixels; the limit here is 100,000"),
        ("wide.png", png(400, 400), "wide.png has 160,000 pixels; the limit here is 100,000"),
        ("short.png", png(100, 100)[:60], "short.png"),
        ("zero.png", png(0, 10), "zero.png"),
        ("words.png", png(10, 10, TEXT_BOMB), "words.png cannot be read as an image"),
        ("page.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "page.png cannot be read as an image"),
        ("large.png", bytes(300_001), "large.png has 300,001 bytes; the limit here is 300,000"),
    ],
)
def test_bad_image_is_a_sentence(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert words in told(path, lambda p: open_upload(str(p), LIMITS))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "gif"])
def test_broken_bytes_of_an_image_are_a_sentence_or_an_image(tmp_path: Path, kind: str) -> None:
    stream = io.BytesIO()
    Image.effect_noise((64, 48), 50).convert("RGB").save(stream, kind)
    chance, path = random.Random(0), tmp_path / f"noise.{kind}"
    for _ in range(60):
        data = bytearray(stream.getvalue())
        for _ in range(chance.randint(1, 12)):
            data[chance.randrange(min(len(data), 400))] = chance.randrange(256)
        path.write_bytes(data[: chance.randint(10, len(data))])
        try:
            open_upload(str(path), LIMITS)
        except ValueError as error:
            assert f"noise.{kind}" in str(error) and str(tmp_path) not in str(error)


# --- circuits and caches --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def circuit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    items = [Steer(layer=4, vector=torch.ones(256), alpha=1.0), ScaleNeurons(layer=2, neurons=[1, 2], factor=2.0)]
    return Circuit(items, name="two", meta={"emotion": "happy"}).save(
        tmp_path_factory.mktemp("files") / "good.safetensors"
    )


@pytest.fixture(scope="module")
def cache(served: Explorer, face: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with served.using(NAME) as model:
        inputs = model.prepare(text=QUESTION, images=face.image)
        parts = ("attn.hook_rot_q", "attn.hook_rot_k", "hook_resid_post")
        names = [n for n in model.hook_dict if n.startswith(("blocks.0.", "blocks.1.")) and n.endswith(parts)]
        _, found = model.run_with_cache(inputs, names_filter=names)
        path = tmp_path_factory.mktemp("files") / "good.safetensors"
        return save_cache(found, path, pictures=[face.image], tokenizer=model.tokenizer, model_name=NAME)


def changed(source: Path, target: Path, change: Any) -> Path:
    """A copy of a safetensors file, after `change(tensors, metadata)`."""
    with safe_open(str(source), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, str(target), metadata=metadata)
    return target


def edit(key: str, *path: Any, to: Any) -> Any:
    """Change one entry of JSON metadata."""

    def change(_: Any, metadata: dict[str, str]) -> None:
        about = json.loads(metadata[key])
        place = about
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to
        metadata[key] = json.dumps(about)

    return change


def replace_all(key: str, text: str) -> Any:
    return lambda _, metadata: metadata.__setitem__(key, text)


def tensors_with(name: str, value: Any) -> Any:
    return lambda tensors, _: tensors.update({n: value(t) for n, t in tensors.items() if n.endswith(name)})


VIEW, FILE = "veena_lens.view", "veena_lens"
NAN = float("nan")
BAD_CACHES = {
    "not JSON": replace_all(VIEW, "{"),
    "deep JSON": replace_all(VIEW, "[" * 50_000),
    "a list": replace_all(VIEW, "[1]"),
    "no format": replace_all(FILE, "{}"),
    "many images": edit(VIEW, "pictures", to=10**9),
    "less than no images": edit(VIEW, "pictures", to=-1),
    "one image more": edit(VIEW, "pictures", to=2),
    "a number of a name": edit(VIEW, "model", to=3),
    "few words": edit(VIEW, "texts", to=["a"]),
    "words of numbers": edit(VIEW, "texts", to=[1, 2]),
    "windows": edit(VIEW, "windows", to=["x"]),
    "scale": edit(VIEW, "scale", to="x"),
    "infinite scale": edit(VIEW, "scale", to=NAN),
    "no image": tensors_with("picture.0", lambda t: t[:10].clone()),
    "a bomb": tensors_with("picture.0", lambda t: torch.tensor(list(png(50_000, 50_000)), dtype=torch.uint8)),
    "NaN queries": tensors_with("hook_rot_q", lambda t: t * NAN),
    "infinite residual": tensors_with("hook_resid_post", lambda t: t / 0.0),
    "short keys": tensors_with("hook_rot_k", lambda t: t[:, :-1].clone()),
    "flat queries": tensors_with("hook_rot_q", lambda t: t.flatten(-2).clone()),
    "more heads in one layer": tensors_with("0.attn.hook_rot_q", lambda t: t.repeat_interleave(2, -2)),
    "other widths": tensors_with("hook_rot_k", lambda t: t[..., :-1].clone()),
    "no tokens": tensors_with("inputs.tokens", lambda t: t[:, :0].clone()),
    "a long answer": edit(FILE, "inputs", "spans", 0, "answer", to=[0, 10**12]),
    "a long image": edit(FILE, "inputs", "spans", 0, "images", to=[[0, 10**12]]),
    "a negative span": edit(FILE, "inputs", "spans", 0, "query", to=[-5, 3]),
    "a span of words": edit(FILE, "inputs", "spans", 0, "query", to=["a", "b"]),
    "a last of nothing": edit(FILE, "inputs", "spans", 0, "last", to=None),
    "a large grid": edit(FILE, "inputs", "grids", to=[[[10**6, 10**6]]]),
    "no spans": edit(FILE, "inputs", "spans", to=[]),
    "inputs of a number": edit(FILE, "inputs", to=3),
}


@pytest.mark.parametrize("kind", BAD_CACHES)
def test_bad_cache_is_a_sentence(explorer: Explorer, cache: Path, tmp_path: Path, kind: str) -> None:
    bad = changed(cache, tmp_path / "bad.safetensors", BAD_CACHES[kind])
    assert "bad.safetensors" in told(bad, lambda p: look.look_at_cache(explorer, p))


def test_cache_of_too_long_a_prompt_is_refused(cache: Path) -> None:
    small = Explorer([NAME], Limits(maps_bytes=2000))
    with pytest.raises(
        ValueError, match=r"good.safetensors is of too long a prompt: its view needs .* limit here is 2.0 KB"
    ):
        look.look_at_cache(small, cache)


BAD_CIRCUITS = {
    "not JSON": replace_all(FILE, "{"),
    "deep JSON": replace_all(FILE, "[" * 50_000),
    "a list": replace_all(FILE, "[]"),
    "no edits": edit(FILE, "interventions", to=None),
    "an edit of a number": edit(FILE, "interventions", to=[3]),
    "an unknown kind": edit(FILE, "interventions", 0, "kind", to="Evil"),
    "an unknown field": edit(FILE, "interventions", 0, "evil", to=1),
    "a lost vector": edit(FILE, "interventions", 0, "vector", to={"tensor": "x"}),
    "NaN vector": tensors_with("vector", lambda t: t * NAN),
    "meta of a number": edit(FILE, "meta", to=3),
    "emotion of a list": edit(FILE, "meta", "emotion", to=["happy"]),
}


@pytest.mark.parametrize("kind", BAD_CIRCUITS)
def test_bad_circuit_is_a_sentence(session: Session, circuit: Path, tmp_path: Path, kind: str) -> None:
    bad = changed(circuit, tmp_path / "bad.safetensors", BAD_CIRCUITS[kind])
    told(bad, lambda p: steer.load_circuit(session, p))
    assert "circuit" not in session.kept


def test_broken_bytes_of_a_file_are_a_sentence(
    explorer: Explorer, session: Session, circuit: Path, cache: Path, tmp_path: Path
) -> None:
    chance, path = random.Random(0), tmp_path / "broken.safetensors"
    ways = ((circuit, lambda p: steer.load_circuit(session, p)), (cache, lambda p: look.look_at_cache(explorer, p)))
    for source, run in ways:
        whole = source.read_bytes()
        header = 8 + struct.unpack("<Q", whole[:8])[0]
        for _ in range(25):
            data = bytearray(whole)
            for _ in range(chance.randint(1, 6)):
                data[chance.randrange(header)] = chance.randrange(256)
            path.write_bytes(data[: chance.choice([len(data), chance.randint(0, len(data))])])
            try:
                run(path)
            except ValueError as error:
                assert " " in str(error) and str(tmp_path) not in str(error)


# --- archives -------------------------------------------------------------------------------------------------


def packed(path: Path, *entries: Any, how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


FACE = png(8, 8)


def with_flag(data: bytes, flag: int) -> bytes:
    """An archive whose entries claim a flag, in their headers and in the list."""
    out = bytearray(data)
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = out.find(mark)
        while place >= 0:
            out[place + at] |= flag
            place = out.find(mark, place + 4)
    return bytes(out)


def test_bad_archives_are_sentences(session: Session, tmp_path: Path) -> None:
    def refused(*entries: Any, how: int = zipfile.ZIP_STORED, flag: int = 0) -> str:
        path = packed(tmp_path / "faces.zip", *entries, how=how)
        path.write_bytes(with_flag(path.read_bytes(), flag))
        return told(path, lambda p: take_zip(session, p, LIMITS))

    assert "sad/0.png in faces.zip is encrypted; pack it without a password" in refused(("sad/0.png", FACE), flag=1)
    assert "packed in an unusual way" in refused(("sad/0.png", FACE), how=zipfile.ZIP_LZMA)
    assert "whose name has 404 characters; shorten it" in refused(("a" * 400 + ".png", FACE))
    assert "whose name has" in refused(("a/" * 600 + "b.png", FACE))
    refused(("sad/0.png", FACE), ("sad/0.png/1.png", FACE))  # a file that is a folder, too
    for name in ("../x.png", "a/../../x.png", "C:/x.png", "\\\\host\\x.png", "/x.png", "..\\x.png"):
        assert "leads out of its folder" in refused((name, FACE)), name
    lines = "".join(json.dumps({"file": f"{i}.png", "emotion": "sad"}) + "\n" for i in range(9))
    assert "names 9 images; the limit here is 4 pairs" in refused(("manifest.jsonl", lines))
    for manifest in (
        "[" * 50_000,
        '{"file": 3}',
        '{"file": "a\\u0000b"}',
        "null",
        "\xff",
        '{"file": {"a": 1}}',
        "[NaN]",
    ):
        refused(("manifest.jsonl", manifest), ("sad/0.png", FACE))
    assert "lists 1,000 files" in refused(*((f"{i}.txt", b"") for i in range(1000)))
    assert "sad/0.png unpacks to more than 300,000 bytes" in refused(
        ("sad/0.png", bytes(10**7)), how=zipfile.ZIP_DEFLATED
    )
    assert not list(session.folder.iterdir()) and "own_pairs" not in session.kept


def test_broken_bytes_of_an_archive_are_a_sentence(session: Session, tmp_path: Path) -> None:
    entries = [(f"{kind}/{i}.png", FACE) for kind in ("sad", "neutral") for i in range(2)]
    whole, chance = packed(tmp_path / "x.zip", *entries, how=zipfile.ZIP_DEFLATED).read_bytes(), random.Random(0)
    path = tmp_path / "faces.zip"
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            take_zip(session, path, LIMITS)
        except ValueError as error:
            assert " " in str(error) and str(session.folder) not in str(error) and str(tmp_path) not in str(error)


# --- errors in words ------------------------------------------------------------------------------------------


def test_errors_without_a_sentence_get_one(tmp_path: Path) -> None:
    for error in (KeyError("layer"), struct.error("bad"), RecursionError("deep"), AttributeError("x"), IndexError()):
        with (
            pytest.raises(ValueError, match="a.bin cannot be used as a circuit: it is damaged"),
            reading(tmp_path / "a.bin", "a circuit"),
        ):
            raise error
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")):
        with pytest.raises(type(error)), reading(tmp_path / "a.bin", "a circuit"):
            raise error
        assert "out of memory" in str(message(error).message)
    assert message(KeyError("layer")).message == "Unexpected error, please report it: KeyError: layer"
    assert message(KeyError("no such hook")).message == "no such hook"


def test_cells_hold_no_numbers_that_json_lacks() -> None:
    cells = cells_value(torch.tensor([[NAN, float("inf")]]), [0], [0, 1], row_name="a", column_name="b", title="t")
    assert json.loads(cells, parse_constant=pytest.fail)["values"] == [[None, None]]
