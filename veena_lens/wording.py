"""Words that messages share."""

from __future__ import annotations


def counted(n: int, singular: str, plural: str | None = None) -> str:
    """A number with its noun in agreement: "1 row", "2,048 rows"; `plural` where an s is not enough."""
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"
