"""Listening to hook points without changing what is computed.

A value that costs extra is computed when a hook listens. If the hooks only read it, the model goes on with the
number of its fast path, so that listening never changes a bit; if they edit it, it goes on with the edit. `listen`
says which, `carry` gives the fast number the gradient of the value that the hooks saw.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformer_lens.hook_points import HookPoint

AnyForward = TypeVar("AnyForward", bound=Callable[..., Any])


def heard(*hooks: nn.Module) -> bool:
    """Return True when somebody listens at any of the points: a forward or backward hook of this thread's, or of no
    thread's in particular, a module in the point's place, or a global hook of torch."""
    return any(map(_is_heard, hooks)) or bool(torch_module._has_any_global_hook())


def _is_heard(hook: nn.Module) -> bool:
    if type(hook) is not HookPoint or hook._forward_pre_hooks or hook._backward_pre_hooks or "forward" in vars(hook):
        return True
    return any(acts_here(fn) for hooks in (hook._forward_hooks, hook._backward_hooks) for fn in list(hooks.values()))


def acts_here(fn: Any) -> bool:
    """Return whether a hook on a point is more than a bias that the fused kernel takes, and is not another thread's."""
    return not getattr(fn, "is_bias", False) and getattr(fn, "thread", None) in (None, threading.current_thread())


def listen(hook: nn.Module, value: Shaped[Tensor, ...]) -> tuple[Any, bool]:
    """Pass a value through a hook point; return what comes out and whether a hook edited it."""
    if value.is_inference():  # such tensors count no versions, so an edit in place shows by comparison only
        before = value.clone() if hook._forward_hooks or heard(hook) else value
        out = hook(value)
        return out, out is not before and not torch.equal(out, before)
    version = value._version
    out = hook(value)
    if value._version != version:
        return out, True
    if out is value:
        return out, False
    # A backward hook alone, or a wrapped point, gives a new tensor with the same numbers.
    may_wrap = type(hook) is not HookPoint or hook._backward_hooks or not hook._forward_hooks
    return out, not (may_wrap and out.shape == value.shape and torch.equal(out, value))


def uncompiled(forward: AnyForward) -> AnyForward:
    """Let a forward run eagerly inside `torch.compile`, whose graphs would not see hooks that come and go."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _disabled(forward)(*args, **kwargs)
        return forward(*args, **kwargs)

    return cast(AnyForward, run)


_DISABLED: dict[Callable[..., Any], Callable[..., Any]] = {}  # by forward, made when it is first compiled


def _disabled(forward: Callable[..., Any]) -> Callable[..., Any]:
    if forward not in _DISABLED:
        _DISABLED[forward] = torch.compiler.disable(forward, reason="Hooks and interventions act in eager mode only.")
    return _DISABLED[forward]


class _Carry(torch.autograd.Function):
    """Forward: the first argument. Backward: the whole gradient to the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, proxy: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[None, Tensor]:
        return None, grad[0]


def carry(value: Shaped[Tensor, ...], proxy: Shaped[Tensor, ...]) -> Shaped[Tensor, ...]:
    """Return the numbers of `value` with the gradient of `proxy` (both are one quantity, rounded differently)."""
    if torch.is_grad_enabled() and proxy.requires_grad:
        return _Carry.apply(value.detach(), proxy)  # type: ignore[no-any-return]
    return value


def drop_hooks(module: nn.Module) -> None:
    """Take the hook points out of modules that never run, so that no dead name is listed."""
    for part in list(module.modules()):
        for name in [n for n, child in part.named_children() if isinstance(child, HookPoint)]:
            delattr(part, name)
