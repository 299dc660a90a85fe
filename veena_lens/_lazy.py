"""Public names of a package that resolve on first use, so that one tool does not import the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def homes_of(package: str, names: Mapping[str, str]) -> dict[str, str]:
    """Return the full name of the module that holds each public name.

    Args:
        package: the package's `__name__`.
        names: the public names of each module, separated by spaces, by the module's name inside the package.
    """
    return {name: f"{package}.{module}" for module, listed in names.items() for name in listed.split()}


def resolver(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package whose public names live in `homes`.

    Raises: AttributeError, when called with any other name."""

    def __getattr__(name: str) -> Any:
        if name in homes:
            return getattr(import_module(homes[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__
