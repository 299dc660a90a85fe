"""Errors as the visitor reads them: what went wrong, in one sentence, in the page."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import torch

# What a user can mend; anything else is a fault of ours and is printed on the server as well.
EXPECTED = (ValueError, TypeError, FileNotFoundError, IndexError, KeyError, ImportError)
MEMORY = (MemoryError, torch.OutOfMemoryError)


def told(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors become messages of the page; works for functions and generators."""
    if inspect.isgeneratorfunction(handler):

        @wraps(handler)
        def steps(*args: Any, **kwargs: Any) -> Any:
            try:
                yield from handler(*args, **kwargs)
            except gr.Error:
                raise
            except Exception as error:
                raise message(error) from error

        return steps

    @wraps(handler)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise message(error) from error

    return call


@contextmanager
def by_name(path: str | Path) -> Iterator[None]:
    """Errors about a visitor's file name it as the visitor does, without the folder that the server put it in."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), Path(path).name)) from error


def message(error: Exception) -> gr.Error:
    """What the page shows of an error."""
    if isinstance(error, MEMORY):
        return gr.Error("The machine's memory is full; nothing was changed. Use a smaller picture, a shorter prompt or "
                        "fewer positions.", duration=None, print_exception=False)  # fmt: skip
    text = str(error) or type(error).__name__
    if isinstance(error, EXPECTED):
        return gr.Error(text, duration=None, print_exception=False)
    return gr.Error(f"This should not have happened: {type(error).__name__}: {text}", duration=None)
