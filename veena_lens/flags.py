"""The few settings of a configuration that may change after a model was built, under HookedTransformer's names.

All other fields are frozen: the weights and hook points of a model follow from them. The flags decide what a cache
holds by default, how keys and values are split, and whether text gets a BOS token; `n_ctx` may be shortened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, fields
from difflib import get_close_matches
from typing import Any


@dataclass
class Flags:
    """What was set by hand; None where nothing was.

    use_attn_result, use_split_qkv_input, use_hook_mlp_in, use_attn_in: True puts `attn.hook_result`, the three split
        inputs, `hook_mlp_in`, or `hook_attn_in` into a cache of everything. Each can always be hooked, and cached by
        name.
    ungroup_grouped_query_attention: keys, values and their inputs have one copy per query head.
    default_prepend_bos: whether text gets the BOS token where nobody says.
    tokenizer_prepends_bos: asks the tokenizer whether it writes one itself; None without a tokenizer.
    longest_context: the context that the weights reach, once `n_ctx` was set to a shorter one."""

    use_attn_result: bool | None = None
    use_split_qkv_input: bool | None = None
    use_hook_mlp_in: bool | None = None
    use_attn_in: bool | None = None
    ungroup_grouped_query_attention: bool | None = None
    default_prepend_bos: bool | None = None
    tokenizer_prepends_bos: Callable[[], bool] | None = None
    longest_context: int | None = None

    def caches(self, name: str) -> bool:
        """Return True where a cache of everything holds a hook point, by its name's last part."""
        return bool(getattr(self, _OWNERS[name])) if name in _OWNERS else True


_OWNERS = {
    "hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_attn_in": "use_attn_in",
}
SETTABLE = (*(f.name for f in fields(Flags) if f.name not in ("tokenizer_prepends_bos", "longest_context")), "n_ctx")


class Settable:
    """Read the flags of a configuration; mixin of the dataclass that holds them."""

    flags: Flags
    n_heads: int
    n_key_value_heads: int
    n_ctx: int

    # Values behind hooks are computed whenever a hook reads them, so these are True until somebody says otherwise.
    use_attn_result = property(lambda self: self.flags.use_attn_result is not False)
    use_split_qkv_input = property(lambda self: self.flags.use_split_qkv_input is not False)
    use_hook_mlp_in = property(lambda self: self.flags.use_hook_mlp_in is not False)
    use_attn_in = property(lambda self: bool(self.flags.use_attn_in))
    ungroup_grouped_query_attention = property(lambda self: bool(self.flags.ungroup_grouped_query_attention))

    @property
    def tokenizer_prepends_bos(self) -> bool:
        """Say whether the model's tokenizer writes a BOS token itself."""
        asked = self.flags.tokenizer_prepends_bos
        return True if asked is None else asked()

    @property
    def default_prepend_bos(self) -> bool:
        """Say whether text gets a BOS token where nobody says: as set, else as the tokenizer does itself."""
        given = self.flags.default_prepend_bos
        return self.tokenizer_prepends_bos if given is None else given

    def set_context(self, n_ctx: Any) -> None:
        """Let texts be cut to, and passes refused beyond, another number of tokens, at most what the weights reach."""
        longest = max(self.flags.longest_context or 0, self.n_ctx)
        if isinstance(n_ctx, bool) or not isinstance(n_ctx, int) or not 1 <= n_ctx <= longest:
            raise ValueError(f"cfg.n_ctx={n_ctx!r} must be an integer from 1 to {longest}, which the weights reach.")
        self.flags.longest_context = longest
        object.__setattr__(self, "n_ctx", n_ctx)

    def require_attn_in(self) -> None:
        """Raise ValueError where queries, keys and values have no common copies of the residual to edit."""
        if self.n_key_value_heads != self.n_heads:
            raise ValueError(
                "hook_attn_in is one copy of the residual per head, and this model has fewer heads for keys and values "
                f"({self.n_key_value_heads}) than for queries ({self.n_heads}); use hook_q_input, hook_k_input and "
                "hook_v_input."
            )


def has_settable_flags(cls: type) -> type:
    """Let the flags of a frozen dataclass be set as its attributes; `flags` is the field that holds them."""

    def set_attribute(self: Any, name: str, value: Any) -> None:
        if name not in SETTABLE:
            near = get_close_matches(name, SETTABLE, n=1, cutoff=0.75)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise FrozenInstanceError(
                f"cfg.{name} cannot be set: weights and hook points follow from it.{hint} What can be set is "
                f"{', '.join(SETTABLE)}; for another configuration build another model of "
                "dataclasses.replace(cfg, ...)."
            )
        if name == "n_ctx":
            return self.set_context(value)
        if not isinstance(value, bool) and not (value is None and name == "default_prepend_bos"):
            raise TypeError(f"cfg.{name} must be True or False, not {value!r}.")
        if name == "use_attn_in" and value:
            self.require_attn_in()
        setattr(self.flags, name, value)

    type.__setattr__(cls, "__setattr__", set_attribute)
    return cls
