"""What a head or neuron adds to the residual stream, also where a norm follows attention and MLP (Gemma).

Without such a norm a head adds z W_O and a neuron a W_out. With one, what attention or MLP gives is divided by one
denominator a position and multiplied by the norm's factor w. Given the denominator s (as a run had it) that is linear:
a head adds z (W_O w) / s, a neuron a (W_out w) / s, and their sums are `hook_attn_out` and `hook_mlp_out` exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

NORMS = {"attn": "ln1_post", "mlp": "ln2_post"}


def head_rows(block: Any) -> Float[Tensor, "n_heads d_head d_model"]:
    """W_O, times the factor of the norm that follows attention, where there is one."""
    return block.attn.W_O * block.ln1_post.w if block.has_post_norms else block.attn.W_O


def neuron_rows(block: Any) -> Float[Tensor, "d_mlp d_model"]:
    """W_out, times the factor of the norm that follows the MLP, where there is one."""
    return block.mlp.W_out * block.ln2_post.w if block.has_post_norms else block.mlp.W_out


def denominators(cfg: Any, names: list[str]) -> dict[str, str]:
    """Of each activation of heads or neurons ("blocks.3.attn.hook_z") the hook of the denominator that divides what it
    adds; empty where no norm follows."""
    if not cfg.post_norms:
        return {}
    found = {}
    for name in names:
        block, layer, part, _ = name.split(".")
        found[name] = f"{block}.{layer}.{NORMS[part]}.hook_scale"
    return found


def divided(get: Callable[[str], Tensor], name: str, by: dict[str, str]) -> Tensor:
    """An activation [... pos units ...] over its denominator [... pos 1]; the activation itself without one."""
    value = get(name)
    if name not in by:
        return value
    scale = get(by[name]).to(value)
    return value / scale.reshape(*scale.shape[:-1], *[1] * (value.ndim - scale.ndim + 1))
