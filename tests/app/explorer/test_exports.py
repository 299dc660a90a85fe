"""What is pinned is what is exported, and every file says what it is of; examples are what the tabs compute."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from safetensors import safe_open

from tests.app.explorer.conftest import NAME, QUESTION
from veena_lens import __version__
from veena_lens.app.explorer import examples, look
from veena_lens.app.explorer.examples import compute, example
from veena_lens.app.explorer.exports import keep_pinned
from veena_lens.app.explorer.state import Explorer, Session
from veena_lens.circuits import image_attention


def test_pinned_place_is_exported_and_files_say_what_they_are_of(
    explorer: Explorer, session: Session, face: Any
) -> None:
    *_, answer = look.ask(explorer, session, NAME, [face], QUESTION, 16)
    view, _ = look.look(explorer, session)
    explorer.show(session, "look", view)
    query = view.header["query"] + 1
    pinned = {"query": query, "layer": 2, "head": 5, "patch": None, "mode": "attention"}
    keep_pinned(session, "look", SimpleNamespace(_data=pinned))  # type: ignore[arg-type]
    files = {Path(f).name: Path(f) for f in look.export_look(explorer, session)}
    table = pd.read_csv(files["attention.csv"])
    assert set(table["layer"]) == {2} and set(table["head"]) == {5} and len(table) == 64
    for column, value in (("model", NAME), ("question", QUESTION), ("answer", answer), ("veena_lens", __version__)):
        assert set(table[column]) == {value}
    with explorer.using(NAME) as model:
        asked = session.kept["asked"]
        wanted = image_attention(model, asked.inputs, [query], layers=[2], heads=[5]).values.flatten()
    assert table["value"].tolist() == pytest.approx(wanted.tolist(), rel=1e-5)
    with safe_open(str(files["cache.safetensors"]), framework="pt") as file:
        about = json.loads(next(v for v in file.metadata().values() if "about" in v and QUESTION in v))["about"]
    assert about == {"model": NAME, "question": QUESTION, "answer": answer, "veena_lens": __version__}
    again, _ = look.look_at_cache(explorer, files["cache.safetensors"])
    assert again.header["query"] == view.header["query"]
    for bad in ({**pinned, "layer": 99}, {**pinned, "head": "x"}, {**pinned, "query": 10**6}):
        with pytest.raises(ValueError, match=r"no such place|in numbers"):
            keep_pinned(session, "look", SimpleNamespace(_data=bad))  # type: ignore[arg-type]
    explorer.show(session, "look", view)
    assert "look" not in session.pinned  # a new view opens where it opens


def test_examples_are_what_the_tabs_compute() -> None:
    kept, made = json.loads(examples.FILE.read_text(encoding="utf-8")), json.loads(json.dumps(compute()))
    assert {k: v for k, v in kept.items() if k not in ("lens", "cells", "neurons", "tokens")} == {
        k: v for k, v in made.items() if k not in ("lens", "cells", "neurons", "tokens")
    }
    for one, other in zip(
        kept["lens"]["values"] + kept["cells"]["values"], made["lens"]["values"] + made["cells"]["values"]
    ):
        assert one == pytest.approx(other, abs=1e-3)
    assert [row[:2] for row in kept["neurons"]["data"][:5]] == [row[:2] for row in made["neurons"]["data"][:5]]
    assert example().lens.labels["word"][0] == "happy" and len(example().pairs) == 6
