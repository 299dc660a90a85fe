"""What the residual stream is made of, as transformer_lens decomposes it: layers, heads, neurons.

Two things are added to its sums: what deep-stack features bring (Qwen3-VL), and norms that follow attention and MLP
(Gemma). Without such a norm a head adds z W_O and a neuron a W_out. With one, what attention or MLP gives is divided by
one denominator per position and multiplied by the norm's factor w. Given the denominator s (as a run had it) that is
linear: a head adds z (W_O w) / s, a neuron a (W_out w) / s, and their sums are `hook_attn_out` and `hook_mlp_out`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache as _ActivationCache
from transformer_lens.utilities import Slice

NORMS = {"attn": "ln1_post", "mlp": "ln2_post"}


def head_rows(block: Any) -> Float[Tensor, "n_heads d_head d_model"]:
    """Return W_O, times the factor of the norm that follows attention, where there is one."""
    return block.attn.W_O * block.ln1_post.w if block.has_post_norms else block.attn.W_O


def neuron_rows(block: Any) -> Float[Tensor, "d_mlp d_model"]:
    """Return W_out, times the factor of the norm that follows the MLP, where there is one."""
    return block.mlp.W_out * block.ln2_post.w if block.has_post_norms else block.mlp.W_out


def denominators(cfg: Any, names: list[str]) -> dict[str, str]:
    """Return activation of heads or neurons ("blocks.3.attn.hook_z") -> hook of the denominator that divides it.

    Empty where no norm follows attention and MLP."""
    if not cfg.post_norms:
        return {}
    found = {}
    for name in names:
        block, layer, part, _ = name.split(".")
        found[name] = f"{block}.{layer}.{NORMS[part]}.hook_scale"
    return found


def divided(get: Callable[[str], Tensor], name: str, by: dict[str, str]) -> Tensor:
    """Return an activation [... pos units ...] over its denominator [... pos 1]; the activation itself without one."""
    value = get(name)
    if name not in by:
        return value
    scale = get(by[name]).to(value)
    return value / scale.reshape(*scale.shape[:-1], *[1] * (value.ndim - scale.ndim + 1))


class ResidualParts(_ActivationCache):
    """Mixin of ActivationCache: decompositions of the residual stream that sum to it."""

    inputs: Any
    model: Any
    _n_layers: Callable[[], int]
    _need_inputs: Callable[[str], Any]

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """Return what sums to the residual that enters a layer, [component ... d_model], as in transformer_lens.

        Where deep-stack features join the residual, what a layer adds of them ("1_deepstack") is a component of
        mode "all" and stands before that layer's attention."""
        position = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        if layer is None or layer == -1:
            layer = self._n_layers()
        found: Any = super().decompose_resid(layer, mlp_input, mode, False, position, incl_embeds, True)
        parts, labels = found
        added = self._deepstack_terms(layer, mlp_input, position) if mode == "all" else {}
        if added:
            whole = dict(zip(labels, parts, strict=True))
            labels = [each for label in labels for each in (*_before(label, added), label)]
            labels += [each for each in added if each not in labels]
            parts = torch.stack([added[each] if each in added else whole[each] for each in labels])
        if apply_ln:
            parts = self.apply_ln_to_stack(parts, layer, pos_slice=position, mlp_input=mlp_input)
        return (parts, labels) if return_labels else parts

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Any:
        """Return the components of the residual as in transformer_lens.

        What layers add of deep-stack features stands before the last component ("bias")."""
        position = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        if layer is None or layer == -1:
            layer = self._n_layers()
        parts, labels = super().get_full_resid_decomposition(
            layer, mlp_input, expand_neurons, apply_ln, position, True, project_output_onto
        )
        added = self._deepstack_terms(layer, mlp_input, position)
        if added:
            more = torch.stack(list(added.values()))
            if apply_ln:
                more = self.apply_ln_to_stack(more, layer, pos_slice=position, mlp_input=mlp_input)
            if project_output_onto is not None:
                more = more @ project_output_onto
            parts, labels = torch.cat([parts[:-1], more, parts[-1:]]), [*labels[:-1], *added, labels[-1]]
        return (parts, labels) if return_labels else parts

    # --- heads and neurons where a norm follows them -----------------------------------------------------
    def stack_head_results(
        self,
        layer: int = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Any = None,
        apply_ln: bool = False,
    ) -> Any:
        """Return what each head adds to the residual, [head ... d_model], as in transformer_lens.

        Where a norm follows attention (Gemma), a head's result is its share after that norm, by the run's own
        denominator (`ln1_post.hook_scale` must be cached), so that heads sum to `hook_attn_out`."""
        cache: _ActivationCache = self
        if self._has_post_norms:
            self._ensure_head_results()
            last = self._n_layers() if layer is None or layer == -1 else layer
            names = [f"blocks.{i}.attn.hook_result" for i in range(last)]
            by = denominators(self.model.cfg, names)
            added = {n: divided(self.__getitem__, n, by) * self.model.blocks[i].ln1_post.w for i, n in enumerate(names)}
            cache = _ActivationCache({**self.cache_dict, **added}, self.model, has_batch_dim=self.has_batch_dim)
        return _ActivationCache.stack_head_results(cache, layer, return_labels, incl_remainder, pos_slice, apply_ln)

    def get_neuron_results(
        self, layer: int, neuron_slice: Any = None, pos_slice: Any = None, project_output_onto: Tensor | None = None
    ) -> Tensor:
        """Return what each neuron adds as in transformer_lens, after a norm that follows as in `stack_head_results`."""
        if not self._has_post_norms:
            return super().get_neuron_results(layer, neuron_slice, pos_slice, project_output_onto)
        position, units = (s if isinstance(s, Slice) else Slice(s) for s in (pos_slice, neuron_slice))
        name = f"blocks.{layer}.mlp.hook_post"
        a = divided(self.__getitem__, name, denominators(self.model.cfg, [name]))
        a = units.apply(position.apply(a, dim=-2), dim=-1)
        rows = units.apply(neuron_rows(self.model.blocks[layer]), dim=0)
        if project_output_onto is not None:
            rows = rows @ project_output_onto
        return a * rows if rows.ndim == 1 else a[..., None] * rows

    def _stack_neuron_results_apply_ln_projected(
        self, layer: int, pos_slice: Slice, neuron_slice: Slice, project_2d: Tensor, mlp_input: bool = False
    ) -> Tensor:
        if not self._has_post_norms or layer == 0:
            return super()._stack_neuron_results_apply_ln_projected(
                layer, pos_slice, neuron_slice, project_2d, mlp_input
            )
        found = [self.get_neuron_results(i, neuron_slice, pos_slice, project_2d) for i in range(layer)]
        scale = self._get_cached_ln_scale(layer, mlp_input, pos_slice)
        return torch.cat(found, -2).movedim(-2, 0) / scale

    @property
    def _has_post_norms(self) -> bool:
        return getattr(getattr(self.model, "cfg", None), "post_norms", False)

    def _deepstack_terms(self, layer: int, mlp_input: bool, position: Slice) -> dict[str, Tensor]:
        """Return label -> what deep-stack features added before a layer's attention (or MLP) reads, [... d_model]."""
        model: Any = self.model
        n_layers, n_deepstack = model.cfg.n_layers, model.cfg.n_deepstack
        terms = {
            f"{i}_deepstack": position.apply(self["deepstack", i] - self["resid_pre", i], dim=-2)
            for i in range(1, min(layer + int(mlp_input), n_layers, n_deepstack + 1))
        }
        last = f"deepstack.{n_layers - 1}.hook_out"
        if layer == n_layers <= n_deepstack and last in self:  # added after the last block, where no block hears it
            added = model.scatter_deepstack(self[last], self._need_inputs("A decomposition"))
            terms[f"{n_layers}_deepstack"] = position.apply(added if self.has_batch_dim else added[0], dim=-2)
        return terms


def _before(label: str, added: Mapping[str, Tensor]) -> list[str]:
    """Return the component that a layer's attention follows, where there is one."""
    own = label.removesuffix("_attn_out") + "_deepstack"
    return [own] if label.endswith("_attn_out") and own in added else []
