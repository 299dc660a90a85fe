"""Runs that are stopped in their midst."""

from __future__ import annotations

from typing import Any

import pytest


def stop_at(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, call: int) -> list[tuple[Any, ...]]:
    """Let the function `where.name` raise KeyboardInterrupt at its call of this number, counted from 1.

    Returns the arguments of every call, which the list goes on to collect."""
    real, calls = getattr(where, name), []

    def stopping(*given: Any, **more: Any) -> Any:
        calls.append(given)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*given, **more)

    monkeypatch.setattr(where, name, stopping)
    return calls
