"""Rows of one file: a stopped run goes on, and only the same run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from veena_lens.json_lines import Lines


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
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept[0] == {"run": {"set": "meld"}} and [row["name"] for row in kept[1:]] == ["a", "b"]
    assert all(len(row["check"]) == 12 for row in kept[1:])
    with pytest.raises(ValueError, match=r"another run: \{'set': 'meld'\} instead of \{'set': 'sims'\}"):
        Lines(path, {"set": "sims"})
