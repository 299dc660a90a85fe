"""The Python behind a figure: the call that made a value is the call that the page shows.

`make` calls a function and keeps, beside what it returned, how a user calls it: the function's own source where it
is defined here, else its import, and the arguments as they were given. A program is the lines of a value and of all
that it was made from, so it runs as shown and cannot differ from what ran.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any


@dataclass(frozen=True, eq=False)
class Made:
    """A value, the expression that names it in a program, and the lines that must run before.

    functions: what the lines call."""

    value: Any
    expression: str
    lines: tuple[str, ...] = ()
    functions: tuple[Any, ...] = ()

    def parts(self) -> list[Made]:
        """Return each value where the lines assign several."""
        names = self.expression.split(", ")
        return [replace(self, value=value, expression=name) for name, value in zip(names, self.value, strict=True)]


def make(
    name: str,
    function: Callable[..., Any],
    /,
    *arguments: Any,
    hidden: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Made:
    """Call a function, and keep the call as a line that assigns its result to `name` (or to several names).

    Arguments and settings may be, or hold, values that were made. `hidden` settings belong to this server alone
    (limits, folders, labels, which part of a sweep runs now) and are not shown.
    """
    value = function(*_value(arguments), **_value({**settings, **(hidden or {})}))
    every = [*arguments, *settings.values()]
    parts = list(_made_in(every))
    shown = [*map(_expression, arguments), *(f"{key}={_expression(v)}" for key, v in settings.items())]
    call = f"{function.__qualname__}({', '.join(shown)})"
    if len(call) + len(name) > 110:
        call = f"{function.__qualname__}(\n" + "".join(f"    {part},\n" for part in shown) + ")"
    lines = dict.fromkeys([line for part in parts for line in part.lines] + [f"{name} = {call}"])
    functions = dict.fromkeys([f for part in parts for f in part.functions] + [function])
    return Made(value, name, tuple(lines), tuple(functions))


def model_of(model: Any, name: str) -> Made:
    """Return the model as the first line of every program loads it."""
    from veena_lens import HookedVLM

    return Made(model, "model", (f"model = HookedVLM.from_pretrained({name!r})",), (HookedVLM,))


def program(*made: Made, then: Sequence[str] = ()) -> str:
    """Return the whole program: imports, the sources of functions that are defined here, the lines, and what
    follows."""
    needed = _Needed()
    for function in dict.fromkeys(function for one in made for function in one.functions):
        needed.add(function)
    if any(line.startswith("plots.") for line in then):
        needed.names.setdefault("veena_lens", set()).add("plots")
    lines = dict.fromkeys(line for one in made for line in one.lines)
    sources = "".join(f"\n\n{source}\n" for source in needed.sources.values())
    return needed.imports() + sources + "\n" * (1 + bool(sources)) + "\n".join([*lines, *then]) + "\n"


# --- values and expressions -----------------------------------------------------------------------------------


def _value(given: Any) -> Any:
    if isinstance(given, Made):
        return given.value
    if isinstance(given, (list, tuple)):
        return type(given)(map(_value, given))
    if isinstance(given, dict):
        return {key: _value(value) for key, value in given.items()}
    return given


def _expression(given: Any) -> str:
    if isinstance(given, Made):
        return given.expression
    if isinstance(given, list):
        return f"[{', '.join(map(_expression, given))}]"
    if isinstance(given, tuple):
        return f"({', '.join(map(_expression, given))}{',' * (len(given) == 1)})"
    if isinstance(given, dict):
        return f"{{{', '.join(f'{key!r}: {_expression(value)}' for key, value in given.items())}}}"
    return repr(given)


def _made_in(given: Any) -> Iterator[Made]:
    if isinstance(given, Made):
        yield given
    elif isinstance(given, (list, tuple)):
        for one in given:
            yield from _made_in(one)
    elif isinstance(given, dict):
        yield from _made_in(list(given.values()))


# --- sources and imports --------------------------------------------------------------------------------------


class _Needed:
    """The imports and sources that a program needs to call its functions."""

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self.names: dict[str, set[str]] = {}
        self.sources: dict[str, str] = {}

    def imports(self) -> str:
        """Return the lines that import, modules first."""
        names = [f"from {module} import {', '.join(sorted(each))}" for module, each in sorted(self.names.items())]
        return "".join(f"{line}\n" for line in [*sorted(self.modules), *names])

    def add(self, function: Any) -> None:
        """Add a function or class: its import, or its source and what that needs in turn."""
        name = function.__qualname__.partition(".")[0]
        if _is_here(function.__module__):
            self.add_name(name, function.__module__)
        else:
            self.names.setdefault(_public(function.__module__, name), set()).add(name)

    def add_name(self, name: str, module: str) -> None:
        """Add a name as a module of the explorer knows it."""
        names = _names_of(module)
        if name in self.sources or name not in names:  # a builtin, or a name within a function
            return
        node, text = names[name]
        if isinstance(node, ast.Import):
            self.modules.add(text)
        elif isinstance(node, ast.ImportFrom) and _is_here(node.module or ""):
            self.add_name(name, node.module or "")
        elif isinstance(node, ast.ImportFrom):
            self.names.setdefault(node.module or "", set()).add(text)
        else:
            self.sources[name] = text
            for other in sorted({n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - {name}):
                self.add_name(other, module)
            self.sources[name] = self.sources.pop(name)  # after what it needs


@cache
def _names_of(module: str) -> dict[str, tuple[ast.stmt, str]]:
    """Return every name that a module imports or defines at its top, with its statement and how a program writes it."""
    source = inspect.getsource(sys.modules[module])
    tree, names = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                text = alias.name + (f" as {alias.asname}" if alias.asname else "")
                text = f"import {text}" if isinstance(node, ast.Import) else text
                names[alias.asname or alias.name] = (node, text)
    for node in tree.body:
        text = ast.get_source_segment(source, node) or ""
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = (node, text)
        elif isinstance(node, ast.Assign):
            names |= {
                n.id: (node, text) for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)
            }
    return names


def _is_here(module: str) -> bool:
    return module.startswith(f"{__package__}.")


def _public(module: str, name: str) -> str:
    """Return the package nearest to the root that exports a name, else its module."""
    parts = module.split(".")
    packages = [".".join(parts[:n]) for n in range(1, len(parts))]
    return next((p for p in packages if name in getattr(sys.modules[p], "__all__", ())), module)
