"""Units of work: kept and taken again, a file cut short, names by content, keys of models and methods."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.emotion.asked import bundled, examples
from veena_lens.emotion import work as module
from veena_lens.emotion.enhance.veena import vee
from veena_lens.emotion.methods import Method
from veena_lens.emotion.pairs.pair_set import Example
from veena_lens.emotion.work import ResumableStore, content, example_key, method_key, model_key, slot_key
from veena_lens.interventions import BoostAttention, Steer

EMBEDDED = "tiny-llava-emotion"


def counted(values: list[Any]) -> Any:
    return lambda: {"n": len(values), "x": torch.tensor([1.5])} if values.append(1) is None else {}


def test_a_result_is_computed_once_an_experiment_and_name(tmp_path: Path) -> None:
    calls: list[Any] = []
    for experiment, name in (({"a": 1}, "one"), ({"a": 1}, "one"), ({"a": 1}, "two"), ({"a": 2}, "one")):
        found = ResumableStore(tmp_path, experiment).do(name, counted(calls))
        assert found["x"].tolist() == [1.5] and found["n"] >= 1
    assert len(calls) == 3 and "2 units done" in repr(ResumableStore(tmp_path, {"a": 1}))


def test_without_a_folder_nothing_is_kept_and_nothing_is_named() -> None:
    def never() -> Any:
        raise AssertionError("asked for a name that nobody needs")

    work, calls = ResumableStore(None, never), []
    assert [work.do(never, counted(calls))["n"] for _ in range(2)] == [1, 2]
    assert repr(work) == "Work(not kept)"


def test_a_file_cut_short_is_done_again_and_a_full_disk_says_so(tmp_path: Path, monkeypatch: Any) -> None:
    calls: list[Any] = []
    work = ResumableStore(tmp_path, {})
    work.do("one", counted(calls))
    (path,) = tmp_path.glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:20])
    work.do("one", counted(calls))
    assert len(calls) == 2 and ResumableStore(tmp_path, {}).do("one", counted(calls))["n"] == 2

    def full(*given: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="is full; results so far are kept. Free some space and run again"):
        work.do("two", counted(calls))


def test_an_example_is_named_by_its_picture_s_content_and_its_prompt(tmp_path: Path) -> None:
    path = examples()[0].picture
    copy = tmp_path / "elsewhere.png"
    copy.write_bytes(Path(path).read_bytes())

    def key(picture: Any, question: str = "How?", **more: Any) -> str:
        return example_key(Example(picture=picture, emotion="happy", question=question, **more))

    assert key(path) == key(str(path)) == key(copy) != key(examples()[1].picture)
    assert key(path) != key(path, "Why?") and key(path) != key(path, context="Alas.", context_emotion="sad")
    with Image.open(path) as opened:
        one, other = opened.convert("RGB"), opened.convert("RGB")
    assert one is not other and key(one) == key(other), "two copies in memory are one picture"
    other.putpixel((0, 0), (1, 2, 3))
    assert key(one) != key(other)
    copy.write_bytes(Path(examples()[1].picture).read_bytes())
    assert key(copy) != key(path), "a file that changed is another picture"


def test_a_method_is_named_by_what_it_does() -> None:
    a, b = torch.randn(4, generator=torch.Generator().manual_seed(0)), torch.ones(4)
    one = Method(name="one", interventions=vee([(1, 2)], 3.0), settings={"x": 1})
    assert method_key(one) == method_key(Method(name="two", interventions=list(vee([(1, 2)], 3.0))))
    others = [vee([(1, 3)], 3.0), vee([(1, 2)], 2.0), [Steer(1, a)], [Steer(1, b)], [Steer(1, b, 2.0)], []]
    keys = [str(method_key(Method(name="one", interventions=x))) for x in others]
    assert len({*keys, str(method_key(one))}) == 7
    long = [BoostAttention(1, heads=list(range(20))), BoostAttention(1, heads=[*range(9), 10, *range(10, 20)])]
    assert content(long[0]) != content(long[1]), "a repr would show both alike"
    for named in (
        Method(name="m", prompt=str.upper, settings={"k": 1}),
        Method(name="m", interventions=lambda model, inputs: [], settings={"k": 1}),
        Method(name="m", interventions=[SimpleNamespace()], settings={"k": 1}),
    ):
        assert method_key(named) == ["m", {"k": 1}]


def test_a_model_is_another_once_any_of_its_weights_is() -> None:
    from veena_lens import HookedVLM

    model = HookedVLM.from_pretrained(EMBEDDED)
    key = model_key(model)
    assert key == model_key(bundled(EMBEDDED)) and key == model_key(model)
    with torch.no_grad():
        model.blocks[3].attn.q.weight[0] += 1e-3
    assert model_key(model) != key


def test_slots_of_other_tokens_are_other_slots() -> None:
    def slot(**tokens: tuple[int, ...]) -> Any:
        return SimpleNamespace(lead_in="The person feels", tokens=tokens)

    assert slot_key(None) is None and slot_key(slot(a=(1, 2))) == slot_key(slot(a=(1, 2))) != slot_key(slot(a=(1, 3)))
