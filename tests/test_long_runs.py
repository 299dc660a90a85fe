"""Long runs: units kept and taken again, damaged files, names by content, many processes, rows of one file."""

from __future__ import annotations

import errno
import functools
import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.emotion.asked import bundled, examples
from veena_lens import long_runs
from veena_lens.emotion import AnswerPosition
from veena_lens.emotion.enhance.veena import vee
from veena_lens.emotion.methods import Method
from veena_lens.emotion.pairs.pair_set import Example
from veena_lens.interventions import BoostAttention, Steer
from veena_lens.long_runs import Lines, Store, digest, fingerprint, progress
from veena_lens.sweeps.metrics import project, soft_hit

EMBEDDED = "tiny-llava-emotion"


def counted(values: list[Any]) -> Any:
    return lambda: {"n": len(values), "x": torch.tensor([1.5])} if values.append(1) is None else {}


# --- units --------------------------------------------------------------------------------------------


def test_a_result_is_computed_once_an_experiment_and_name(tmp_path: Path) -> None:
    calls: list[Any] = []
    for experiment, name in (({"a": 1}, "one"), ({"a": 1}, "one"), ({"a": 1}, "two"), ({"a": 2}, "one")):
        found = Store(tmp_path, experiment).do(name, counted(calls))
        assert found["x"].tolist() == [1.5] and found["n"] >= 1
    assert len(calls) == 3 and "2 units done" in repr(Store(tmp_path, {"a": 1}))


def test_without_a_folder_nothing_is_kept_and_nothing_is_named() -> None:
    class Unnamed:
        def fingerprint(self) -> str:
            raise AssertionError("asked for a name that nobody needs")

    store, calls = Store(None, Unnamed()), []
    assert [store.do(Unnamed(), counted(calls))["n"] for _ in range(2)] == [1, 2]
    assert store.key(Unnamed()) is None and store.under("part").read("one") is None and store.manifest() == []
    assert repr(store) == "Store(not kept)"


def test_a_damaged_file_is_done_again_and_a_full_disk_says_so(tmp_path: Path, monkeypatch: Any) -> None:
    calls: list[Any] = []
    store = Store(tmp_path, {})
    store.do("one", counted(calls))
    (path,) = tmp_path.glob("*/*.safetensors")
    whole = path.read_bytes()
    changed = whole[:-1] + bytes([whole[-1] ^ 1])  # a bit that fell over on the disk
    for n, damaged in enumerate((whole[:20], whole[:-1], b"", changed), start=2):
        path.write_bytes(damaged)
        store.do("one", counted(calls))
        assert len(calls) == n and Store(tmp_path, {}).do("one", counted(calls))["n"] == n

    def full(*given: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left")

    for error in (OSError(errno.ENOSPC, "No space left"), ValueError("I/O error: No space left (os error 28)")):
        monkeypatch.setattr(long_runs, "save_file", lambda *given, error=error, **more: (_ for _ in ()).throw(error))
        with pytest.raises(OSError, match="is full; results so far are kept. Free some space and run again"):
            store.do("two", counted(calls))
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".part"] == []


def test_a_store_reads_what_it_wrote_and_nothing_unfinished(tmp_path: Path) -> None:
    store = Store(tmp_path, {"a": 1}).under("pair0")
    assert store.read("000000") is None
    store.do("000000", lambda: {"": torch.arange(3.0), "named": torch.ones(3)})
    back = store.read("000000")
    assert back is not None and set(back) == {"", "named"} and torch.equal(back[""], torch.arange(3.0))
    assert store.folder is not None
    (store.folder / "000001.part").write_bytes(b"half")
    assert store.read("000001") is None
    assert Store(tmp_path, {"a": 2}).under("pair0").read("000000") is None


def test_each_item_is_a_unit_by_its_own_name_or_a_given_one(tmp_path: Path) -> None:
    calls: list[int] = []

    def double(n: int) -> dict[str, Any]:
        calls.append(n)
        return {"twice": 2 * n}

    store = Store(tmp_path, "experiment")
    assert [x["twice"] for x in store.each([1, 2, 3], double)] == [2, 4, 6]
    assert [x["twice"] for x in store.each([3, 4], double)] == [6, 8] and calls == [1, 2, 3, 4]
    store.each([4], double, name=lambda n: f"number {n}")
    assert calls == [1, 2, 3, 4, 4]


def test_the_manifest_lists_finished_units_with_their_checksums(tmp_path: Path) -> None:
    store = Store(tmp_path, {"what": "x"})
    store.do(["a pair", 1], counted([]))
    store.under("part").do("000007", counted([]))
    rows = {str(row["name"]): row for row in store.manifest()}
    assert set(rows) == {"['a pair', 1]", "000007"} and rows["000007"]["file"] == "part/000007.safetensors"
    assert all(row["bytes"] > 0 and len(row["checksum"]) == 64 for row in rows.values())
    assert store.folder is not None and json.loads((store.folder / "experiment.json").read_text()) == {"what": "x"}


def work_on(folder: Path, worker: int) -> None:
    store = Store(folder, "shared")
    for n in range(20):
        store.do(f"unit-{n}", lambda n=n: {"n": n, "by": worker, "x": torch.full((50,), float(n))})


def test_several_processes_fill_one_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work_on, args=(tmp_path, i)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0, 0]
    store = Store(tmp_path, "shared")
    units = [store.read(f"unit-{n}") for n in range(20)]
    assert [u["n"] for u in units if u is not None] == list(range(20))
    assert not list(tmp_path.rglob("*.part")) and len(store.manifest()) == 20


def test_what_was_kept_first_stays_whoever_comes_later(tmp_path: Path) -> None:
    store = Store(tmp_path, "shared")

    def slow() -> dict[str, Any]:
        Store(tmp_path, "shared").do("one", lambda: {"by": "the other"})
        return {"by": "me"}

    assert store.do("one", slow) == {"by": "the other"} == store.read("one")


# --- names by content ---------------------------------------------------------------------------------


def own(scale: float) -> Any:
    return lambda logits: scale * logits[:, 0]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (own(1.0), own(2.0)),
        (lambda x: x[:, 0] + 1, lambda x: x[:, 0] + 2),
        (project("blocks.0.hook_resid_post", torch.ones(9)), project("blocks.0.hook_resid_post", torch.ones(9) + 1e-7)),
        (soft_hit([1], [[2]]), soft_hit([1], [[3]])),
        (functools.partial(max, 1), functools.partial(max, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.tensor(1.0), torch.tensor(2.0)),
        (torch.arange(2000).numpy(), torch.arange(2000).flip(0).numpy()),
        ({"a": [1, slice(0, 3)]}, {"a": [1, slice(0, 4)]}),
    ],
)
def test_other_contents_have_other_fingerprints(a: Any, b: Any) -> None:
    assert fingerprint(a) == fingerprint(a)
    assert fingerprint(a) != fingerprint(b) and digest(a) != digest(b)


def test_equal_functions_made_twice_are_the_same_metric() -> None:
    assert fingerprint(own(2.0)) == fingerprint(own(2.0))


def test_an_example_is_named_by_its_picture_s_content_and_its_prompt(tmp_path: Path) -> None:
    path = examples()[0].picture
    copy = tmp_path / "elsewhere.png"
    copy.write_bytes(Path(path).read_bytes())

    def key(picture: Any, question: str = "How?", **more: Any) -> str:
        return fingerprint(Example(picture=picture, emotion="happy", question=question, **more))

    assert key(path) == key(str(path)) == key(copy) != key(examples()[1].picture)
    assert key(path) != key(path, "Why?") and key(path) != key(path, context="Alas.", context_emotion="sad")
    with Image.open(path) as opened:
        one, other = opened.convert("RGB"), opened.convert("RGB")
    assert one is not other and key(one) == key(other), "two copies in memory are one picture"
    assert fingerprint(one) == fingerprint(other)
    other.putpixel((0, 0), (1, 2, 3))
    assert key(one) != key(other) and fingerprint(one) != fingerprint(other)
    copy.write_bytes(Path(examples()[1].picture).read_bytes())
    assert key(copy) != key(path), "a file that changed is another picture"


def test_a_method_is_named_by_what_it_does() -> None:
    a, b = torch.randn(4, generator=torch.Generator().manual_seed(0)), torch.ones(4)
    one = Method(name="one", interventions=vee([(1, 2)], 3.0), settings={"x": 1})
    assert fingerprint(one) == fingerprint(Method(name="two", interventions=list(vee([(1, 2)], 3.0))))
    others = [vee([(1, 3)], 3.0), vee([(1, 2)], 2.0), [Steer(1, a)], [Steer(1, b)], [Steer(1, b, 2.0)], []]
    keys = [digest(Method(name="one", interventions=x)) for x in others]
    assert len({*keys, digest(one)}) == 7
    long = [BoostAttention(1, heads=list(range(20))), BoostAttention(1, heads=[*range(9), 10, *range(10, 20)])]
    assert fingerprint(long[0]) != fingerprint(long[1]), "a repr would show both alike"
    for named in (
        Method(name="m", prompt=str.upper, settings={"k": 1}),
        Method(name="m", interventions=lambda model, inputs: [], settings={"k": 1}),
        Method(name="m", interventions=[SimpleNamespace()], settings={"k": 1}),
    ):
        assert fingerprint(named) == ["m", {"k": 1}]


def test_a_model_is_another_once_any_of_its_weights_is() -> None:
    from veena_lens import HookedVLM

    model = HookedVLM.from_pretrained(EMBEDDED)
    key = fingerprint(model)
    assert key == fingerprint(bundled(EMBEDDED)) and key == fingerprint(model)
    with torch.no_grad():
        model.blocks[3].attn.q.weight[0] += 1e-3
    assert fingerprint(model) != key


def test_slots_of_other_tokens_are_other_slots() -> None:
    def slot(**tokens: tuple[int, ...]) -> Any:
        return AnswerPosition(lead_in="The person feels", tokens=tokens)

    assert fingerprint(slot(a=(1, 2))) == fingerprint(slot(a=(1, 2))) != fingerprint(slot(a=(1, 3)))


# --- progress and rows of a file ----------------------------------------------------------------------


def test_progress_gives_the_items_in_order_shown_or_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), "items", show=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(progress(iter([[1, 2], [3]]), "batches", total=3, size=len)) == [[1, 2], [3]]
    assert "batches" in capsys.readouterr().err


def test_lines_go_on_where_they_stopped_and_only_in_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    lines = Lines(path, {"set": "meld"})
    assert lines.rows == [] and not path.exists()
    lines.add([{"name": "a"}])
    with path.open("a") as file:
        file.write('{"name": "b", "ans')
    again = Lines(path, {"set": "meld"})
    assert again.rows == [{"name": "a"}]
    again.add([{"name": "b"}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"run": {"set": "meld"}}, {"name": "a"}, {"name": "b"},
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"another run: \{'set': 'meld'\} instead of \{'set': 'sims'\}"):
        Lines(path, {"set": "sims"})
