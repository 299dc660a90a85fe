"""Print a configuration briefly, and check the numbers in it."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, cast


class Printed:
    """Print what was set: one field per line, nested configurations indented, without defaults and repr=False."""

    def __repr__(self) -> str:
        lines = []
        for f in fields(cast(Any, self)):
            value = getattr(self, f.name)
            if not f.repr or (value == f.default and f.name not in ("dtype", "device")):
                continue
            lines.append(f"{f.name}={_short(value)}")
        if sum(map(len, lines)) < 90:
            return f"{type(self).__name__}({', '.join(lines)})"
        body = ",\n".join(lines).replace("\n", "\n    ")
        return f"{type(self).__name__}(\n    {body}\n)"


def _short(value: Any) -> str:
    """Return the repr of a value; a tuple of one repeated value prints as that value times its number."""
    if isinstance(value, tuple) and len(value) > 4 and len(set(map(str, value))) == 1:
        return f"({value[0]!r},) * {len(value)}"
    return repr(value)


MOST = 2**24  # of a size; larger ones are mistakes, and their products would overflow
NOT_SIZES = ("image_token_id", "video_token_id", "pad_token_id", "n_ctx")


def require_numbers(config: Any) -> None:
    """Check that every field declared as a number holds one, finite and of a possible size. Raises: ValueError."""
    for f in fields(config):
        value, kinds = getattr(config, f.name), str(f.type).split(" | ")
        if value is None and "None" in kinds:
            continue
        where = f"{type(config).__name__}: {f.name}={value!r}"
        if "float" in kinds:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{where} must be a finite number.")
        elif "int" in kinds:
            if type(value) is not int:
                raise ValueError(f"{where} must be a whole number.")
            if f.name not in NOT_SIZES and value > MOST:
                raise ValueError(f"{where} must be at most {MOST:,}.")
