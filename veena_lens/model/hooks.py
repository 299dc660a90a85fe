"""Hooks and caches on a model: the root module, with names checked and images respected.

`HookedRoot` is transformer_lens's HookedRootModule where a text-only reading of names and axes would go wrong: unknown
names raise, positions are sliced by the hook table's axes, vision activations are never sliced by text positions, and
a cache beside user hooks stores copies (a hook may write in place).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import Slice

from veena_lens.components.hooks import heard
from veena_lens.config import HookedVLMConfig
from veena_lens.hook_table import aliases, axes_of, canonical, hooks_of, require_hook
from veena_lens.inputs import MultimodalInputs
from veena_lens.model.cache_size import require_room
from veena_lens.model.threads import Added, Turns, reset, without_blocks

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM


DIRECTIONS: tuple[Literal["fwd"], Literal["bwd"]] = ("fwd", "bwd")


def checked(hook: Any, name: str, dir: str) -> Callable[..., Any]:
    """Return a hook whose results are checked: None, or a tensor like the one that it was given.

    Raises: TypeError for a hook that is not a function, or later returns anything else; ValueError where it returns a
    tensor of another shape, dtype or device."""
    if not callable(hook):
        raise TypeError(f"The hook for {name} must be a function fn(tensor, hook), not {hook!r}.")
    return partial(_run_checked, hook, name, dir)


def _run_checked(fn: Callable[..., Any], name: str, dir: str, tensor: Tensor, hook: HookPoint) -> Any:
    out = fn(tensor, hook=hook)
    if out is None:
        return None
    given = out[0] if dir == "bwd" and isinstance(out, tuple) and len(out) == 1 else out
    if not isinstance(given, Tensor):
        raise TypeError(
            f"The hook at {name} returned {type(given).__name__}; return None, or a tensor like the one that it "
            f"was given: {_kind(tensor)}."
        )
    if (given.shape, given.dtype, given.device) != (tensor.shape, tensor.dtype, tensor.device):
        raise ValueError(
            f"The hook at {name} returned a tensor {_kind(given)}; it must be like the one that it was given: "
            f"{_kind(tensor)}."
        )
    return out


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}, {tensor.dtype}, on {tensor.device}"


class HookDict(dict[str, HookPoint]):
    """Hook points by name, the split inputs also under transformer_lens 4's names (one point, two keys).

    An unknown name raises with near ones; `canonical_names` lists each point once, as the hook table does."""

    @property
    def canonical_names(self) -> list[str]:
        return [name for name in self if canonical(name) == name]

    def __missing__(self, name: str) -> HookPoint:
        full = require_hook(name, self)
        return dict.__getitem__(self, full)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and dict.__contains__(self, canonical(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 (dict.get skips __missing__)


class HookedRoot(HookedRootModule):
    """The root of a module tree whose hook points the hook table names."""

    cfg: HookedVLMConfig
    _turns: Turns

    def setup(self) -> None:
        """Name every module and hook point."""
        super().setup()
        self.hook_dict = HookDict(self.hook_dict)
        for name, point in list(self.hook_dict.items()):
            for alias in aliases(name):
                self.mod_dict[alias] = self.hook_dict[alias] = point

    @property
    def _points(self) -> HookDict:
        assert isinstance(self.hook_dict, HookDict)
        return self.hook_dict

    def _hook_names(self, name: str | Callable[[str], bool]) -> list[str]:
        """Return the canonical names meant by a name or a predicate. Raises: ValueError for an unknown name."""
        if isinstance(name, str):
            return [require_hook(name, self.hook_dict)]
        return [n for n in self._points.canonical_names if name(n) or any(name(a) for a in aliases(n))]

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook: Any,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Add a hook until `reset_hooks`, at a hook point or wherever a predicate on names holds.

        Raises: ValueError for an unknown name, with near names."""
        for full in self._hook_names(name):
            self.hook_dict[full].add_hook(
                checked(hook, full, dir), dir=dir, is_permanent=is_permanent, level=level, prepend=prepend
            )  # type: ignore[arg-type]

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Any = (),
        bwd_hooks: Any = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Any]:
        """Add hooks for the length of a `with` block; they are removed however it ends.

        The block is its thread's: passes of other threads do not see the forward hooks, and none may run beside
        backward hooks.
        fwd_hooks, bwd_hooks: `(name or predicate, fn)` pairs. reset_hooks_end: False keeps the hooks.
        clear_contexts: whether the points' contexts are cleared at the end.
        A name may be given as HookedTransformer or transformer_lens 4 spells it.
        Raises: ValueError for an unknown name before any hook is added."""
        with self._hooked(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts, keeps=True):
            yield self

    @contextmanager
    def _hooked(
        self, fwd_hooks: Any, bwd_hooks: Any, reset_hooks_end: bool, clear_contexts: bool, keeps: bool = False
    ) -> Iterator[None]:
        """Add hooks inside the block; other threads wait for one with backward hooks, or raise where it `keeps`."""
        resolved: list[tuple[Literal["fwd", "bwd"], str, Any]] = [
            (dir, full, checked(fn, full, dir))
            for dir, pairs in zip(DIRECTIONS, (fwd_hooks, bwd_hooks), strict=True)
            for name, fn in pairs
            for full in self._hook_names(name)
        ]
        turn = self._turns.taken(keeps) if any(dir == "bwd" for dir, _, _ in resolved) else nullcontext()
        added = Added()
        with turn:
            self.context_level += 1
            try:
                for dir, full, fn in resolved:
                    added.add(self.hook_dict[full], fn, dir, level=self.context_level)
                yield
            finally:
                if reset_hooks_end:
                    added.remove()
                    self.is_caching = False
                    if clear_contexts:
                        self.clear_contexts()
                else:
                    added.release()
                self.context_level -= 1

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Any = (),
        bwd_hooks: Any = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Run forward with temporary hooks `fn(tensor, hook=HookPoint) -> None | tensor`.

        Backward hooks act in a later `backward()` only with `reset_hooks_end=False`; otherwise use
        `with model.hooks(bwd_hooks=...)` around forward and backward."""
        with self._hooked(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(*model_args, **model_kwargs)

    def get_caching_hooks(
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
        """Return (cache, forward hooks, backward hooks), not yet added; the arguments are those of `run_with_cache`."""
        cache = {} if cache is None else cache
        position = Slice.unwrap(pos_slice)
        # A user's hook may write into a tensor that two names share: then the cache needs copies.
        copies = any(p._forward_hooks for p in self.hook_dict.values())

        def save(tensor: Tensor, hook: HookPoint, suffix: str = "") -> None:
            axes = list(axes_of(str(hook.name)))
            kept = tensor.detach()
            in_text = axes[0] == "batch"
            if in_text and position.mode != "identity":
                axis = next((a for a in ("pos", "query_pos") if a in axes), None)
                if axis is not None:
                    kept = position.apply(kept, dim=axes.index(axis))
            if remove_batch_dim and in_text:
                kept = kept[0]
            moved = kept.to(device) if device is not None else kept
            shared = (
                moved.device == tensor.device
                and moved.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            )
            cache[f"{hook.name}{suffix}"] = moved.clone() if copies and shared else moved

        def save_gradient(tensor: Tensor, hook: HookPoint) -> None:
            save(tensor, hook, "_grad")

        names = self.names_of(names_filter)
        return cache, [(n, save) for n in names], [(n, save_gradient) for n in names] if incl_bwd else []

    def add_caching_hooks(
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Add hooks that fill the returned dictionary in every later forward, until `reset_hooks`."""
        cache, fwd, bwd = self.get_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, cache)
        for name, fn in fwd:
            self.add_hook(name, fn, dir="fwd")
        for name, fn in bwd:
            self.add_hook(name, fn, dir="bwd")
        self.is_caching = True
        return cache

    def names_of(self, names_filter: Any) -> list[str]:
        """Return the hook names that a filter selects: None (the default set), a name, names, or a predicate.

        Raises: ValueError for an unknown name."""
        if names_filter is None:
            table = hooks_of(self.cfg)
            caches, points = self.cfg.flags.caches, self._points
            # An edit of heads' outputs can be read off nothing else.
            return [
                n
                for n in points.canonical_names
                if n not in table or caches(table[n].part) or (table[n].part == "hook_result" and heard(points[n]))
            ]
        if isinstance(names_filter, str):
            return self._hook_names(names_filter)
        if callable(names_filter):
            return self._hook_names(lambda name: bool(names_filter(name)))
        return list(dict.fromkeys(full for name in names_filter for full in self._hook_names(name)))

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Any = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove hooks (of one context level, or all); interventions stay to the end of their block."""
        if clear_contexts:
            self.clear_contexts()
        for point in self.hook_dict.values():
            if point.fwd_hooks or point.bwd_hooks:
                reset(point, direction, including_permanent, level)
        self.is_caching = False

    def __deepcopy__(self, memo: dict[int, Any]) -> HookedRoot:
        """Return a copy without what open blocks have put in force, which stays with the original."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for point in twin.hook_dict.values():
            without_blocks(point)
        return twin


def run_with_cache(
    model: HookedVLM,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    names_filter: Any,
    device: Any,
    remove_batch_dim: bool,
    incl_bwd: bool,
    reset_hooks_end: bool,
    clear_contexts: bool,
    pos_slice: Any,
    max_bytes: int | str | None,
) -> tuple[Any, dict[str, Tensor], MultimodalInputs | None]:
    """Run forward with `args` and `kwargs`; return its output, the activations and the inputs (None where positions are
    sliced): see `HookedVLM.run_with_cache`."""
    inputs = _inputs_of(model, args, kwargs)
    if inputs is not None and kwargs.get("start_at_layer") is None:
        args = (inputs, *args[1:])
    if remove_batch_dim and inputs is not None and len(inputs) != 1:
        raise ValueError(f"remove_batch_dim asks for one row; the batch has {len(inputs)}.")
    cache, fwd, bwd = model.get_caching_hooks(
        names_filter, incl_bwd, device, remove_batch_dim=remove_batch_dim, pos_slice=pos_slice
    )
    if inputs is not None:
        require_room(model, inputs, (name for name, _ in fwd), Slice.unwrap(pos_slice), device, max_bytes)
    with model._hooked(fwd, bwd, reset_hooks_end, clear_contexts):
        out = model(*args, **kwargs)
        if incl_bwd:
            out.backward()
    sliced = Slice.unwrap(pos_slice).mode != "identity"
    return out, cache, None if sliced else inputs


def _inputs_of(model: HookedVLM, args: Sequence[Any], kwargs: dict[str, Any]) -> MultimodalInputs | None:
    """Return the inputs of a coming forward, prepared once so that a cache can keep them; None for a residual."""
    if kwargs.get("start_at_layer") is not None:
        given = kwargs.get("tokens")
        return given if isinstance(given, MultimodalInputs) else None
    if not args or kwargs.get("past_kv_cache") is not None:
        return None
    how: dict[str, Any] = {name: kwargs.pop(name, None) for name in ("prepend_bos", "padding_side")}
    return model.as_inputs(args[0], kwargs.pop("attention_mask", None), kwargs.pop("position_ids", None), **how)
