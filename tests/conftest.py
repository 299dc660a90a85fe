"""Fixtures: tiny models, built once a run, and the certainty that a test leaves no hook on them."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("tests", deadline=None, max_examples=10, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Names with an address in them differ between processes, and workers side by side refuse to start."""
    if named := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError("test names hold an address; give these parameters ids:\n  " + "\n  ".join(named))


@pytest.fixture
def model_of() -> Iterator[Callable[..., Any]]:
    """`model_of(case, dtype, casts, gain)`: the shared native model; after the test no hook may be left on it."""
    from tests.cases import Case, native_model

    used: list[Any] = []

    def get(case: Case, dtype: torch.dtype = torch.float64, casts: str = "hf", gain: float = 1.0) -> Any:
        model = native_model(case, dtype, casts, gain)
        used.append(model)
        return model

    yield get
    for model in used:
        left = [name for name, hook in model.hook_dict.items() if hook._forward_hooks or hook._backward_hooks]
        model.reset_hooks(including_permanent=True)
        assert not left, f"the test left hooks on {left}"


@pytest.fixture(autouse=True)
def fresh_start() -> Iterator[None]:
    """Every test starts from the same global seed with gradients on; what it does to either ends with it."""
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        yield
