"""Weights stay in their files where they can, and what happens to those files is noticed."""

from __future__ import annotations

import copy
import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from tests.cases import BY_NAME, build_hf, counted, raw_inputs
from veena_lens import HookedVLM
from veena_lens.checkpoints import filling, mapped
from veena_lens.memory import in_words

NAME = "three-images-and-none"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mapped")
    build_hf(BY_NAME[NAME]).save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture(autouse=True)
def files_of_any_size_are_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "SMALL", 0)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def mapped_ranges() -> list[tuple[int, int]]:
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
    return [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]  # type: ignore[misc]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(model.inputs_from_hf(**counted(raw_inputs(BY_NAME[NAME]))))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_weights_of_the_stored_dtype_lie_in_the_files_and_others_in_memory(folder: Path) -> None:
    model, cast = HookedVLM.from_pretrained(folder), HookedVLM.from_pretrained(folder, dtype="float32")
    ranges = mapped_ranges()

    def is_mapped(p: torch.Tensor) -> bool:
        return any(start <= p.data_ptr() < stop for start, stop in ranges)

    assert model.cfg.dtype == torch.float64
    assert all(is_mapped(p) for p in model.parameters())
    assert not any(is_mapped(p) for p in cast.parameters())
    assert cast.mapped_files == ()
    assert sum(len(file.places) for file in model.mapped_files) == len(list(model.parameters()))


def test_a_change_of_a_parameter_stays_in_memory(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model, plain = HookedVLM.from_pretrained(folder), logits(HookedVLM.from_pretrained(folder))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert not torch.equal(logits(model), plain)
    assert torch.equal(logits(HookedVLM.from_pretrained(folder)), plain)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_that_is_written_to_is_named_and_one_that_is_replaced_does_no_harm(folder: Path) -> None:
    model = HookedVLM.from_pretrained(folder)
    plain, shard = logits(model), sorted(folder.glob("*.safetensors"))[0]
    twin, moved = copy.deepcopy(model), pickle.loads(pickle.dumps(model.state_dict()))
    other = {key: torch.zeros_like(x) for key, x in load_file(shard).items()}
    save_file(other, folder / "beside", metadata={"format": "pt"})
    kept = shard.read_bytes()
    os.replace(folder / "beside", shard)  # as a download does it
    assert torch.equal(logits(model), plain)

    again = HookedVLM.from_pretrained(folder)
    with shard.open("r+b") as file:
        file.write(kept)
    os.utime(shard, ns=(1, 1))
    with pytest.raises(RuntimeError, match=rf"{shard.name} was written to while.*Load the model again"):
        logits(again)
    assert torch.equal(logits(model), plain)  # mapped from the file that was there before
    assert torch.equal(logits(twin), plain)
    again.load_state_dict({name: value.clone() for name, value in moved.items()}, assign=True)
    assert torch.equal(logits(again), plain)  # no weight lies in the file any more


def test_a_large_file_is_read_beside_other_work_and_judged_before_the_first_pass(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    numbers = load_file(shard)
    key = next(key for key, x in numbers.items() if x.numel() > 4)
    numbers[key].view(-1)[3] = float("nan")
    save_file(numbers, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{key} has 1 numbers of .* NaN or infinite"):
        HookedVLM.from_pretrained(folder)
    monkeypatch.setattr(mapped, "LARGE", 0)
    monkeypatch.setattr(mapped, "CHUNK", 64)
    model = HookedVLM.from_pretrained(folder)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{key} has 1 numbers of .* NaN or infinite"):
            logits(model)
    with pytest.raises(ValueError, match="NaN or infinite"):
        logits(copy.deepcopy(model))


def test_a_sum_that_overflows_is_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.full((40,), 65000.0, dtype=torch.float16), "b": torch.zeros(0)}, file)
    mapped.require_finite_file(file, {"a": torch.float16, "b": torch.float32})


def test_files_that_cannot_be_mapped_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = logits(HookedVLM.from_pretrained(folder))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    model = HookedVLM.from_pretrained(folder)
    assert model.mapped_files == ()
    assert torch.equal(logits(model), plain)


def test_weights_beyond_the_free_memory_are_refused_with_what_would_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = sum(p.numel() for p in HookedVLM.from_pretrained(folder).parameters())
    monkeypatch.setattr(filling, "free_memory", lambda device: 2 * n)
    with pytest.raises(MemoryError) as raised:
        HookedVLM.from_pretrained(folder)
    assert f"take {in_words(8 * n)} as torch.float64 on cpu, where {in_words(2 * n)} are free" in str(raised.value)
    assert f"dtype=torch.bfloat16 would take {in_words(2 * n)}" in str(raised.value)
    assert HookedVLM.from_pretrained(folder, dtype="bfloat16").cfg.dtype == torch.bfloat16
    monkeypatch.setattr(filling, "free_memory", lambda device: 2 * n - 1)
    with pytest.raises(MemoryError, match="4 bits") as raised:
        HookedVLM.from_pretrained(folder, dtype="bfloat16")
    assert "dtype=" not in str(raised.value)
    monkeypatch.setattr(filling, "free_memory", lambda device: None)
    HookedVLM.from_pretrained(folder)
