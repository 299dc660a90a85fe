"""Free memory is that of the machine or the container, whichever is less; sizes are said in words."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from veena_lens import memory


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def write(group: Path, limit: str, used: int, cached: int) -> None:
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 1\n")


def test_without_a_limit_the_machine_decides(group: Path) -> None:
    free = memory.free_memory("cpu")
    assert free is not None
    assert 0 < free <= psutil.virtual_memory().total
    write(group, "max", 10, 1)
    unlimited = memory.free_memory("cpu")
    assert unlimited is not None
    assert unlimited > 1000


def test_a_container_leaves_what_is_below_its_limit_and_what_it_only_caches(group: Path) -> None:
    write(group, "1000", 700, 49)
    assert memory.free_memory(torch.device("cpu")) == 1000 - 700 + 50
    write(group, "1000", 1700, 0)
    assert memory.free_memory("cpu") == 0


def test_a_device_that_cannot_be_asked_has_no_answer() -> None:
    assert memory.free_memory("meta") is None


@pytest.mark.parametrize(
    ("n", "words"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (2**20 * 12, "12 MiB"), (2**40, "1,024.0 GiB")],
)
def test_sizes_in_words(n: int, words: str) -> None:
    assert memory.in_words(n) == words
