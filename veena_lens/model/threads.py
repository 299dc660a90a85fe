"""What threads that use one model share: passes take turns, and the hooks of a block belong to the thread in it.

Hooks of a `with` block are taken away one by one, so that a block that is left late takes no other's with it, and they
do nothing in passes of other threads. Backward hooks act in whichever thread runs the backward pass; while a block with
backward hooks is open, other threads run nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

from torch import Tensor
from transformer_lens.hook_points import HookPoint, LensHandle

_REGISTRY = threading.RLock()  # held while hooks are added or taken away, never while one runs


class Turns:
    """Lets one pass run at a time; a copy of a model has turns of its own."""

    def __init__(self) -> None:
        self._lock, self._process = threading.RLock(), os.getpid()
        self._kept_by: threading.Thread | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Turns, ()

    @contextmanager
    def taken(self, keeps: bool = False) -> Iterator[None]:
        """Wait for the passes of other threads, and let theirs wait, inside the block.

        keeps: others raise instead of waiting, since the block may last as long as its thread likes.
        Raises: RuntimeError while another thread keeps the turn."""
        if self._process != os.getpid():  # forked while another thread had the turn, which does not exist here
            self.__init__()
        lock, me = self._lock, threading.current_thread()
        while not lock.acquire(timeout=0.05):
            if self._kept_by is not None:
                raise RuntimeError(
                    f"The thread {self._kept_by.name!r} is in a block with backward hooks on this model (model.hooks("
                    "bwd_hooks=...)), which would act on other threads' gradients. Leave it first, or give each thread "
                    "its own copy.deepcopy(model)."
                )
        before = self._kept_by
        try:
            self._kept_by = me if keeps else before
            yield
        finally:
            self._kept_by = before
            lock.release()


class Added:
    """The hooks that a block of the current thread adds to hook points."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = threading.current_thread()
        self._handles: list[tuple[HookPoint, LensHandle]] = []

    def add(
        self,
        point: HookPoint,
        fn: Callable[..., Any],
        dir: Literal["fwd", "bwd"] = "fwd",
        *,
        level: int | None = None,
        is_permanent: bool = False,
        is_bias: bool = False,
    ) -> None:
        """Add a hook to a point.

        is_permanent: whether it outlasts `reset_hooks`. is_bias: whether the fused kernel can take its edit."""
        run = partial(self._in_my_thread, fn) if dir == "fwd" else fn
        with _REGISTRY:
            handle = point.add_hook(run, dir=dir, level=level, is_permanent=is_permanent)
            handle.user_hook = fn
            added = _functions(point, dir)[handle.hook.id]
            added.added, added.thread, added.is_bias = self, self._thread, is_bias
            self._handles.append((point, handle))

    def _in_my_thread(self, fn: Callable[..., Any], tensor: Tensor, hook: HookPoint) -> Any:
        """Run a forward hook, in passes of the block's own thread alone."""
        return fn(tensor, hook=hook) if self._thread in (None, threading.current_thread()) else None

    def remove(self) -> None:
        """Take the hooks away."""
        with _REGISTRY:
            for point, handle in self._handles:
                _take(point, lambda other, handle=handle: other is handle)

    def release(self) -> None:
        """Let the hooks stay on the model, as any thread's."""
        self._thread = None
        for point, handle in self._handles:
            for functions in (point._forward_hooks, point._backward_hooks):
                if handle.hook.id in functions:
                    vars(functions[handle.hook.id])["thread"] = None


def _functions(point: HookPoint, dir: str) -> dict[int, Any]:
    return cast("dict[int, Any]", point._forward_hooks if dir == "fwd" else point._backward_hooks)


def _take(point: HookPoint, wanted: Callable[[LensHandle], bool], dirs: tuple[str, ...] = ("fwd", "bwd")) -> None:
    """Take away the hooks of a point that are wanted."""
    for dir in dirs:
        name = f"{dir}_hooks"
        for handle in getattr(point, name):
            if wanted(handle):
                handle.hook.remove()
        setattr(point, name, [h for h in getattr(point, name) if h.hook.id in _functions(point, dir)])


def reset(point: HookPoint, direction: str, including_permanent: bool, level: int | None) -> None:
    """Remove a point's hooks (of one context level, or all); those of another thread's open blocks stay."""
    dirs = ("fwd", "bwd") if direction == "both" else (direction,)

    def wanted(handle: LensHandle) -> bool:
        fns = [point._forward_hooks.get(handle.hook.id), point._backward_hooks.get(handle.hook.id)]
        thread = next((getattr(fn, "thread", None) for fn in fns if fn is not None), None)
        mine = thread in (None, threading.current_thread())
        return mine and (including_permanent or not handle.is_permanent) and level in (None, handle.context_level)

    with _REGISTRY:
        _take(point, wanted, dirs)


def without_blocks(point: HookPoint) -> None:
    """Take away what open blocks put on a point of a copied model: the blocks are the original's."""
    for functions in (point._forward_hooks, point._backward_hooks):
        for number in [n for n, fn in functions.items() if getattr(fn, "thread", None) is not None]:
            del functions[number]
    point.fwd_hooks = [h for h in point.fwd_hooks if h.hook.id in point._forward_hooks]
    point.bwd_hooks = [h for h in point.bwd_hooks if h.hook.id in point._backward_hooks]
