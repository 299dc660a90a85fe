"""An explorer on the embedded model, and a tab of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("gradio")

from veena_lens.app.explorer.pictures import GivenImage, open_sample, samples
from veena_lens.app.explorer.state import (
    Explorer,
    Limits,
    Session,
)

NAME = "tiny-llava-emotion"
QUESTION = "how does the person in the picture feel?"


@pytest.fixture(scope="session")
def served() -> Explorer:
    return Explorer([NAME, "tiny-qwen2vl-emotion"], Limits(sessions=3))


@pytest.fixture
def explorer(served: Explorer) -> Iterator[Explorer]:
    """The explorer; after the test its models are clean and its sessions gone."""
    yield served
    for model in served._models.values():
        assert model.is_untouched, "the test left something on the model"
    for key in list(served._sessions):
        served.forget(key)


@pytest.fixture
def session(explorer: Explorer) -> Session:
    return explorer.session("a tab")


@pytest.fixture(scope="session")
def face() -> GivenImage:
    """A happy face."""
    return open_sample(next(name for name in samples() if name.startswith("happy")))


@pytest.fixture
def run_code(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a program as a user would, in an empty folder; gives what it defines."""
    monkeypatch.chdir(tmp_path)

    def run(code: str) -> dict[str, Any]:
        defined: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(code, "<copied>", "exec"), defined)
        return defined

    return run
