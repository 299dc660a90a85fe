"""Listening to hook points without changing what is computed.

A value that costs extra is computed when a hook listens. If the hooks only read it, the model goes on with the
number of its fast path, so that listening never changes a bit; if they edit it, it goes on with the edit. `listen`
says which, `carry` gives the fast number the gradient of the value that the hooks saw.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint


def heard(*hooks: HookPoint) -> bool:
    """Return True when any of the points has a forward or backward hook."""
    return any(h._forward_hooks or h._backward_hooks for h in hooks)


def listen(hook: HookPoint, value: Shaped[Tensor, ...]) -> tuple[Any, bool]:
    """Pass a value through a hook point; return what comes out and whether a hook edited it."""
    if value.is_inference():  # such tensors count no versions, so an edit in place shows by comparison only
        before = value.clone() if hook._forward_hooks else value
        out = hook(value)
        return out, out is not before and not torch.equal(out, before)
    version = value._version
    out = hook(value)
    if value._version != version:
        return out, True
    if out is value:
        return out, False
    # A backward hook alone wraps the value in a new tensor with the same numbers.
    return out, not (hook._backward_hooks and out.shape == value.shape and torch.equal(out, value))


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
