"""Numbers agree with their nouns."""

from __future__ import annotations

from veena_lens.scores import counted


def test_one_is_singular_and_every_other_number_plural() -> None:
    assert [counted(n, "row") for n in (0, 1, 2, 2048)] == ["0 rows", "1 row", "2 rows", "2,048 rows"]
    assert counted(1, "entry", "entries") == "1 entry" and counted(3, "entry", "entries") == "3 entries"
