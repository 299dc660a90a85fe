"""The embedded model, loaded once, and a pair of its images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from veena_lens import HookedVLM
from veena_lens.checkpoints.files import Picture, bundled_pairs

QUESTION = "how does the person in the picture feel?"


@pytest.fixture(scope="session")
def embedded() -> Any:
    return HookedVLM.from_pretrained("tiny-llava-emotion")


@pytest.fixture
def model(embedded: Any) -> Iterator[Any]:
    """The model; after the test no hook may be left on it."""
    yield embedded
    left = [name for name, hook in embedded.hook_dict.items() if hook._forward_hooks or hook._backward_hooks]
    embedded.reset_hooks(including_permanent=True)
    assert not left, f"the test left hooks on {left}"


@pytest.fixture(scope="session")
def pair() -> tuple[Picture, Picture]:
    """A happy face and its neutral twin."""
    return next(p for p in bundled_pairs("test") if p[0].emotion == "happy")
