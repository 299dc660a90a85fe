"""Read the safetensors files that this package wrote: the words in the header against a schema, then the tensors.

A schema names fields and what they hold: a type, a tuple of types, `[kind]` for a list, `{str: kind}` for an object.
A field whose name ends in "?" may be missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

from safetensors import SafetensorError, safe_open

from veena_lens.regular_files import json_object, require_regular

Schema = Mapping[str, Any]
NUMBER = (int, float)


@contextmanager
def opened(path: str | Path, what: str, device: str = "cpu") -> Iterator[Any]:
    """Open a safetensors file that should hold `what` ("a circuit") for reading, its tensors on `device`.

    Raises: FileNotFoundError without the file; ValueError, with the path, for whatever else turns out to be wrong with
    it while the block runs: a file that was cut short, is of another kind, or holds what `what` cannot be made of."""
    path = Path(path)
    if "\0" in str(path) or not path.exists():
        raise FileNotFoundError(f"No {what.split(' ', 1)[-1]} at {path}.")
    size = require_regular(path)
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({size:,} bytes) cannot be read as {what}: {error}. It was cut short or is another "
            "kind of file; copy it again, or save it anew."
        ) from error
    except OSError:
        raise
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path} does not hold {what}: {error}") from error
    except Exception as error:  # fields and tensors of other types than the ones that were saved
        raise ValueError(
            f"{path} cannot be read as {what}: it was changed after it was saved ({type(error).__name__}: "
            f"{short_repr(str(error))}). Copy it again, or save it anew."
        ) from error


def words_of(file: Any, field: str, schema: Schema, path: str | Path) -> dict[str, Any]:
    """Return the JSON object in a field of a header, once it holds what the schema says.

    file: an open safetensors file.
    field: of its metadata; a missing one is an empty object.
    schema: what the object holds.
    path: what messages call the file.

    Raises: ValueError with the field, its value and what was expected."""
    words = json_object((file.metadata() or {}).get(field, "{}"), f"{path}, {field!r}", finite=False)
    require_words(words, schema, str(path))
    return words


def require_words(words: Mapping[str, Any], schema: Schema, where: str) -> None:
    """Check an object against a schema. Raises: ValueError with the field, its value and what was expected."""
    for name, kind in schema.items():
        bare = name.removesuffix("?")
        if bare not in words:
            if name.endswith("?"):
                continue
            raise ValueError(f"{where} lacks the field {bare!r}; save it anew.")
        if not _fits(words[bare], kind):
            raise ValueError(f"{where}: the field {bare!r} is {short_repr(words[bare])}; expected {_named(kind)}.")


def tensors_of(file: Any) -> dict[str, Any]:
    """Return every tensor of an open safetensors file by its name."""
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, tuple):
        return any(_fits(value, one) for one in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(one, kind[0]) for one in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(_fits(one, kind[str]) for one in value.values())
    if kind is None:
        return value is None
    return isinstance(value, kind) and (kind in (bool, object) or not isinstance(value, bool))


def _named(kind: Any) -> str:
    if isinstance(kind, tuple):
        return " or ".join(map(_named, kind))
    if isinstance(kind, list):
        return f"a list of {_named(kind[0])}"
    if isinstance(kind, dict):
        return f"an object of {_named(kind[str])}"
    names = {
        str: "text",
        int: "whole numbers",
        float: "numbers",
        bool: "true or false",
        dict: "an object",
        list: "a list",
    }
    return "null" if kind is None else names.get(kind, "anything")
