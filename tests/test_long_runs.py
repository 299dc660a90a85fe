"""Long runs: units kept and taken again, damaged files, names by content, many processes, rows of one file."""

from __future__ import annotations

import errno
import json
import multiprocessing
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from veena_lens import long_runs
from veena_lens.long_runs import Store, progress, save_tensors, write_file

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
    store.do("other", lambda: {"n": 99, "x": torch.tensor([9.0])})
    another = Store(tmp_path, {"another": "experiment"})
    another.do("one", lambda: {"n": 98, "x": torch.tensor([8.0])})
    assert store.folder is not None and another.folder is not None
    replaced = [(folder / name).read_bytes() for folder, name in (
        (store.folder, "other.safetensors"), (another.folder, "one.safetensors"))]  # fmt: skip
    for n, damaged in enumerate((whole[:20], whole[:-1], b"", changed, *replaced), start=2):
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


# --- files in one step --------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.html"
    write_file(path, "first")
    write_file(path, b"\xff\x00")
    assert path.read_bytes() == b"\xff\x00"
    save_tensors(tmp_path / "t.safetensors", {"x": torch.ones(2)}, {"a": "b"})
    before = (tmp_path / "t.safetensors").read_bytes()

    def full(*given: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(long_runs, "save_file", full)
    with pytest.raises(OSError, match="is full; nothing that was there has changed. Free some space and run again"):
        write_file(path, "second")
    with pytest.raises(OSError, match="is full; nothing that was there has changed"):
        save_tensors(tmp_path / "t.safetensors", {"x": torch.zeros(2)}, {})
    assert path.read_bytes() == b"\xff\x00" and (tmp_path / "t.safetensors").read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))


def save_often(path: Path, text: str) -> None:
    for _ in range(200):
        write_file(path, text)


def test_processes_that_write_one_file_leave_a_whole_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    texts = [letter * 5000 for letter in "ab"]
    workers = [context.Process(target=save_often, args=(tmp_path / "x.json", text)) for text in texts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0] and (tmp_path / "x.json").read_text() in texts


# --- progress ----------------------------------------------------------------------


def test_progress_gives_the_items_in_order_shown_or_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_runs, "has_screen", lambda: True)
    assert list(progress(range(3), "items", show=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(progress(iter([[1, 2], [3]]), "batches", total=3, size=len)) == [[1, 2], [3]]
    assert "batches" in capsys.readouterr().err


def test_a_log_and_a_pipe_get_no_bar_and_a_terminal_and_a_notebook_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import IPython

    assert list(progress(range(3), "items")) == [0, 1, 2]
    assert capsys.readouterr().err == "" and not long_runs.has_screen()
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel="a notebook's"))
    assert long_runs.has_screen()
    monkeypatch.setattr(IPython, "get_ipython", lambda: None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert long_runs.has_screen()
