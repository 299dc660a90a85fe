"""What the server remembers: models, each with a lock, and one session per browser tab; limits and errors.

Every use of a model goes through `Explorer.using`: one at a time, and whatever happens inside, no hook and no
intervention is left on it. Sessions hold results, never hooks, so two tabs cannot mix. What goes wrong in a handler
becomes one sentence in the page.
"""

from __future__ import annotations

import inspect
import os
import secrets
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import torch

from veena_lens.app.demo import few_threads
from veena_lens.app.explorer.uploads import Uploads

if TYPE_CHECKING:
    from veena_lens.app.view import ExplorerView
    from veena_lens.model.model import HookedVLM


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one visitor may ask of the machine. Raises: ValueError for a limit that allows nothing."""

    upload_bytes: int = 10 * 2**20  # of one file
    pixels: int = 24_000_000  # of one image
    images: int = 8  # of one prompt
    pairs: int = 64  # of a direction
    unpacked_bytes: int = 200 * 2**20  # of an archive of pairs
    new_tokens: int = 256
    prompt_characters: int = 20_000
    maps_bytes: int = 256 * 2**20  # maps that a view must compute at the start: the mean over heads of every token
    sweep_bytes: int = 2 * 2**30  # activations of the rows that travel together
    view_bytes: int = 8 * 2**20  # maps that a view carries from the start; the others come when asked for
    stored_bytes: int = 2 * 2**30  # uploads of all visitors; the oldest go first
    sessions: int = 16  # the one unused for longest goes first
    queue: int = 32

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"Limits: {name}={value} must be at least 1.")


# What a user can correct; anything else is a bug, and is printed on the server as well.
EXPECTED = (ValueError, TypeError, FileNotFoundError, IndexError, KeyError, ImportError)
MEMORY = (MemoryError, torch.OutOfMemoryError)
TOAST_SECONDS = 10.0  # in the page's corner; the notice beside the controls stays


def sentence_of(error: BaseException) -> str:
    """Return what an error says; of a `KeyError` without the quotes that Python puts around it."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def is_memory(error: BaseException) -> bool:
    """Return True where memory ran out; PyTorch says so of the CPU's in words alone."""
    return isinstance(error, MEMORY) or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def report_errors(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Turn what a handler raises into a message of the page; for functions and generators."""

    @contextmanager
    def reported() -> Iterator[None]:
        try:
            yield
        except gr.Error:
            raise
        except Exception as error:
            raise message(error) from error

    @wraps(handler)
    def steps(*args: Any, **kwargs: Any) -> Any:
        with reported():
            yield from handler(*args, **kwargs)

    @wraps(handler)
    def call(*args: Any, **kwargs: Any) -> Any:
        with reported():
            return handler(*args, **kwargs)

    return steps if inspect.isgeneratorfunction(inspect.unwrap(handler)) else call


def takes(explorer: Explorer, choices: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn `handler(choices, session)` into a handler of the page: the values of its components, in order, become one
    record of `choices`. Errors are reported."""

    def decorate(handler: Callable[..., Any]) -> Callable[..., Any]:
        def call(request: gr.Request, *values: Any) -> Any:
            return handler(choices(*values), explorer.session(request.session_hash))

        def steps(request: gr.Request, *values: Any) -> Any:
            yield from call(request, *values)

        return report_errors(steps if inspect.isgeneratorfunction(inspect.unwrap(handler)) else call)

    return decorate


@contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Turn whatever a visitor's file causes while it is read as `what` into a ValueError of one sentence.

    It names the file as the visitor does, without the folder that the server put it in.
    """
    path = Path(path)
    try:
        yield
    except Exception as error:
        if is_memory(error):
            raise
        text = sentence_of(error).replace(str(path), path.name).replace(f"{path.parent}{os.sep}", "")
        if not (isinstance(error, EXPECTED) and text.endswith(".")):  # not written for a reader
            text = (
                f"{path.name} cannot be used as {what}: it is damaged, or was not made for this ({text or 'no data'})."
            )
        raise ValueError(text) from error


def message(error: Exception) -> gr.Error:
    """Turn an error into what the page shows of it."""
    if is_memory(error):
        text = (
            "The machine is out of memory; nothing was changed. Use a smaller image, a shorter prompt or fewer "
            "positions."
        )
        return gr.Error(text, TOAST_SECONDS, print_exception=False)
    text = sentence_of(error)
    if isinstance(error, EXPECTED) and " " in text:
        return gr.Error(text, TOAST_SECONDS, print_exception=False)
    return gr.Error(
        f"Unexpected error, please report it: {type(error).__name__}: {text or 'without a message'}", TOAST_SECONDS
    )


def size(n: float | int) -> str:
    """Bytes in words."""
    for unit, scale in (("GB", 2**30), ("MB", 2**20), ("KB", 2**10)):
        if n >= scale:
            return f"{n / scale:.1f} {unit}"
    return f"{n:.0f} bytes"


MOST_MODELS = 2
KEPT_SECONDS = 3600.0  # exported and uploaded files


@dataclass(frozen=True, eq=False)
class Shown:
    """What a result was made from, to compare with the choices of now, and in words."""

    key: tuple[Any, ...] | None
    also: Any
    text: str


@dataclass(eq=False)
class Session:
    """One tab's results by name; an entry of the same name replaces the last, so memory stays that of one of each.

    By tab of the page: what went wrong last, the result that is shown, and the choices of now."""

    key: str
    folder: Path
    kept: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)  # slot of the page -> address of its view
    notices: dict[str, str] = field(default_factory=dict)
    shown: dict[str, Shown] = field(default_factory=dict)
    chosen: dict[str, tuple[Any, ...] | None] = field(default_factory=dict)
    offers: dict[str, Any] = field(default_factory=dict)  # a word of several tokens
    n_notices: int = 0
    asking: tuple[Any, ...] | None = None  # the choices of the last question
    finding: tuple[Any, ...] | None = None  # and of the last direction in the Neurons tab
    pinned: dict[str, dict[str, Any]] = field(default_factory=dict)  # by slot: what is chosen in its view

    def need(self, name: str, what: str) -> Any:
        """Return a result. Raises: ValueError that says what to do first."""
        if name not in self.kept:
            raise ValueError(what)
        return self.kept[name]


class Explorer:
    """Models and sessions of one server."""

    def __init__(
        self,
        names: Sequence[str],
        limits: Limits | None = None,
        cache: Path | None = None,
        loading: Mapping[str, Any] | None = None,
    ) -> None:
        """Serve the named models; `loading`: settings of `HookedVLM.from_pretrained`, such as device and dtype."""
        self.names, self.limits, self.cache = list(names), limits or Limits(), cache
        self._loading = dict(loading or {})
        self._models: OrderedDict[str, HookedVLM] = OrderedDict()
        self._locks: dict[str, threading.RLock] = {name: threading.RLock() for name in names}
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._views: dict[str, ExplorerView] = {}
        self._busy: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
        self._guard = threading.RLock()
        # Uploads, exports and parts of sweeps, for this user alone; gone when the server ends.
        within = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())
        within.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="veena-lens-", dir=within)).resolve()
        self.uploads = Uploads(self.folder / "uploads", self.limits.stored_bytes, KEPT_SECONDS)
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def open(self) -> None:
        """Make the folder anew where it was closed before."""
        self.folder.mkdir(mode=0o700, exist_ok=True)

    def close(self) -> None:
        """Drop every tab's results, and delete all files."""
        for key in list(self._sessions):
            self.forget(key)
        self.uploads.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- models ---------------------------------------------------------------------------------------
    @contextmanager
    def using(self, name: str) -> Iterator[HookedVLM]:
        """Lend the model of this name to this thread alone, and clean it afterwards.

        Raises: ValueError for a model that the server does not offer."""
        if name not in self._locks:
            raise ValueError(f"No model {name!r} here; there are: {', '.join(self.names) or 'none'}.")
        with self._locks[name]:
            model = self._loaded(name)
            with self.alone(model):
                yield model

    @contextmanager
    def alone(self, model: HookedVLM) -> Iterator[None]:
        """Hold a model's lock, also that of one that was replaced in the meantime."""
        with self._guard:
            lock = self._busy.setdefault(model, threading.RLock())
        with lock, few_threads(model):
            try:
                yield
            finally:
                clean(model)

    def _loaded(self, name: str) -> HookedVLM:
        """Return the model; the caller holds its name's lock, so that nobody else waits while it is read from disk."""
        model = self._models.get(name)
        if model is None:
            from veena_lens.model.model import HookedVLM

            model = HookedVLM.from_pretrained(name, **self._loading)
        with self._guard:
            self._models[name] = model
            self._models.move_to_end(name)
            while len(self._models) > MOST_MODELS:
                self._release(self._models.popitem(last=False)[1])
        return model

    def _release(self, model: HookedVLM) -> None:
        """Drop the views that hold a model which is no longer kept, so that its memory is free again."""
        for session in self._sessions.values():
            for slot, token in list(session.tokens.items()):
                view = self._views.get(token)
                if view is not None and getattr(view.runs[0], "model", None) is model:
                    self._views.pop(token)
                    session.tokens.pop(slot)
                    session.kept.pop(slot, None)

    # --- sessions -------------------------------------------------------------------------------------
    def session(self, key: str | None) -> Session:
        """Return the session of a tab; the one unused for longest is dropped where there are too many."""
        key = key or "nobody"
        with self._guard:
            if key not in self._sessions:
                folder = self.folder / secrets.token_urlsafe(24)
                folder.mkdir(mode=0o700)
                self._sessions[key] = Session(key, folder)
                while len(self._sessions) > self.limits.sessions:
                    self._drop(self._sessions.popitem(last=False)[1])
            self._sessions.move_to_end(key)
            return self._sessions[key]

    def forget(self, key: str | None) -> None:
        """Drop a tab's results and files."""
        with self._guard:
            session = self._sessions.pop(key or "nobody", None)
            if session is not None:
                self._drop(session)

    def _drop(self, session: Session) -> None:
        for token in session.tokens.values():
            self._views.pop(token, None)
        session.kept.clear()
        self.uploads.forget(session.key)
        shutil.rmtree(session.folder, ignore_errors=True)

    def own(self, session: Session, given: str | Sequence[str] | None) -> None:
        """Check, before files are opened, that a tab uploaded them. Raises: ForeignFile for another one."""
        for path in [given] if isinstance(given, str) else given or ():
            self.uploads.lend(str(path), session.key)

    def exported(self, path: str) -> Path | None:
        """Return the path of a file in a tab's folder, whose name nobody can guess; None for every other path."""
        with self._guard:
            for session in self._sessions.values():
                name = path.removeprefix(f"{session.folder}{os.sep}")
                if name != path and name not in ("", ".", "..") and not {"/", os.sep} & set(name):
                    return session.folder / name
        return None

    @property
    def n_sessions(self) -> int:
        return len(self._sessions)

    # --- views ----------------------------------------------------------------------------------------
    def show(self, session: Session, slot: str, view: ExplorerView) -> str:
        """Put a view in a slot of a tab; returns its address, which nobody can guess."""
        token = secrets.token_urlsafe(18)
        with self._guard:
            self._views.pop(session.tokens.get(slot, ""), None)
            session.tokens[slot] = token
            session.kept[slot] = view
            session.pinned.pop(slot, None)
            self._views[token] = view
        return token

    def view(self, token: str) -> ExplorerView | None:
        """Return the view at an address, None where it was replaced or its tab is gone."""
        return self._views.get(token)

    def maps(self, token: str, asked: dict[str, Any]) -> bytes | None:
        """Return maps of a view that a page asks for; None where the view is gone."""
        view = self.view(token)
        if view is None:
            return None
        model = getattr(view.runs[0], "model", None)
        if model is None:  # a cache
            return view.maps(asked)
        with self.alone(model):
            return view.maps(asked)


def clean(model: Any) -> None:
    """Take every hook off a model; interventions end with their own blocks."""
    model.reset_hooks(including_permanent=True)
