"""The package's public names: each resolves, says what it raises, and hides no module."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from veena_lens import circuits


@pytest.mark.parametrize("name", circuits.__all__)
def test_public_name_resolves_and_is_documented(name: str) -> None:
    found = getattr(circuits, name)
    assert found.__module__ == circuits._HOMES[name]
    assert found.__doc__ and len(found.__doc__.split()) > 10
    assert find_spec(f"veena_lens.circuits.{name}") is None, "a module of this name would hide it"


def test_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'head_intentions'"):
        circuits.head_intentions  # noqa: B018
