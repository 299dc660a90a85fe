"""Names of HookedTransformer beside its forward pass, hooks and weights: what a notebook calls, and what it misses.

What makes sense for weights as they are stored works the same. What does not raises a sentence with the replacement;
`hasattr` is False for names that do not exist here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.checkpoints import device_of, dtype_of
from veena_lens.components.context import Context
from veena_lens.config import HookedVLMConfig
from veena_lens.inputs import MultimodalInputs
from veena_lens.model import forward
from veena_lens.model.encoding import refuse_unknown
from veena_lens.model.span import PassSpan
from veena_lens.model.text import inputs_of_residual

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM


class AbsentName(AttributeError):
    """Raised for a name of HookedTransformer that has no meaning here; says what takes its place."""


_ROTARY = (
    "positions are rotary, applied to queries and keys (attn.hook_rot_q, attn.hook_rot_k), and no matrix of positions "
    "is added to the residual stream"
)
_WEIGHTS = (
    "weights stay as they are stored. The norms' weights are model.blocks[l].ln1.w, ln2.w and model.ln_final.w; "
    "tokens_to_residual_directions has the last one folded in"
)
_DATA = "a checkpoint does not say what it was trained on; load a set with the datasets package and use to_tokens"
_RUN = "run_with_cache(inputs, names_filter=..., stop_at_layer=l) computes blocks 0 .. l - 1 and caches them"
ABSENT = {
    "W_pos": _ROTARY,
    "W_E_pos": f"{_ROTARY}; the token embedding is W_E",
    "pos_embed": _ROTARY,
    "hook_pos_embed": _ROTARY,
    "run_with_cache_until": _RUN,
    "sample_datapoint": _DATA,
    "load_sample_training_dataset": _DATA,
    "dataset": _DATA,
    "fold_layer_norm": _WEIGHTS,
    "fold_value_biases": _WEIGHTS,
    "center_writing_weights": _WEIGHTS,
    "center_unembed": _WEIGHTS,
    "refactor_factored_attn_matrices": _WEIGHTS,
    "load_and_process_state_dict": "load_state_dict takes the weights under this model's own names",
    "enable_compatibility_mode": _WEIGHTS,
    "hf_generate": "generate takes transformers' settings, logits processors and stopping criteria",
    "init_weights": "HookedVLM(cfg) makes random weights",
}
PROCESSING = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "refactor_factored_attn_matrices",
    "fold_value_biases",
)
_OF_FORWARD = (
    *("return_type", "loss_per_token", "prepend_bos", "padding_side", "start_at_layer", "stop_at_layer", "tokens"),
    *("attention_mask", "position_ids", "past_kv_cache"),
)


def refuse_arguments_of_forward(unknown: dict[str, Any]) -> None:
    """Raise TypeError for what `forward` does not take; HookedTransformer's further arguments may be None."""
    if unknown.pop("shortformer_pos_embed", None) is not None:
        raise TypeError(f"forward: shortformer_pos_embed has no meaning here: {_ROTARY}.")
    if unknown.pop("past_left_attention_mask", None) is not None:
        raise TypeError("forward: past_left_attention_mask is not taken; past_kv_cache holds that mask.")
    for name in ("input_ids", "pixel_values"):
        if name in unknown:
            raise TypeError(
                f"forward: {name} is Hugging Face's; model.forward_hf(**batch) takes a processor's tensors."
            )
    if "images" in unknown:
        raise TypeError("forward takes prepared inputs: model(model.prepare(text=..., images=...)).")
    refuse_unknown("forward", unknown, _OF_FORWARD)


def refuse_processing(what: str, given: dict[str, Any]) -> None:
    """Raise ValueError for a change of weights that is asked for, TypeError for an unknown one; take those left out."""
    wanted = [name for name in PROCESSING if given.pop(name, None)]
    if wanted:
        raise ValueError(f"{what}: {', '.join(wanted)} is not done: {_WEIGHTS}.")


def context_alone(model: HookedVLM, resid: Float[Tensor, "batch pos d_model"]) -> Context:
    """Return what a block reads where it is called by itself: no padding, positions counted from 0."""
    span = PassSpan.whole(inputs_of_residual(model, resid, None, None, None))
    return forward.blocks_share(model, span, {}, None, None)


def _device_or_dtype(name: str) -> torch.device | torch.dtype | None:
    """Return the device or the dtype that a text names. Raises: ValueError for neither."""
    try:
        torch.device(name)
    except RuntimeError:
        try:
            return dtype_of(name)
        except ValueError as error:
            raise ValueError(f"{name!r} names no device such as 'cpu' or 'cuda:0', and no dtype: {error}") from None
    return device_of(name)


class HookedTransformerNames:
    """View of a model with HookedTransformer's further names."""

    cfg: HookedVLMConfig

    def __getattr__(self, name: str) -> Any:
        if name in ABSENT:
            raise AbsentName(f"HookedVLM has no {name}: {ABSENT[name]}.")
        return super().__getattr__(name)  # type: ignore[misc]

    @classmethod
    def from_pretrained_no_processing(cls, name: Any, **settings: Any) -> Any:
        """Return `from_pretrained(name, **settings)`, which never changes the weights of a checkpoint."""
        return cls.from_pretrained(name, **settings)  # type: ignore[attr-defined]

    def process_weights_(self, **wanted: bool) -> None:
        """Change nothing, where nothing is asked for: `fold_ln=False`, `center_unembed=False` and so on.

        Raises: ValueError for a change that is asked for, by name or, without any name, as HookedTransformer's default.
        """
        given: dict[str, Any] = dict(wanted) if wanted else dict.fromkeys(PROCESSING, True)
        refuse_processing("process_weights_", given)
        refuse_unknown("process_weights_", given, PROCESSING)

    # --- inputs and losses -------------------------------------------------------------------------------
    def input_to_embed(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Tensor | None = None,
        past_kv_cache: Any = None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Any, None, Tensor | None]:
        """Return what enters block 0, the tokens (prepared inputs themselves), None, and the mask of bare tokens.

        `model(resid, start_at_layer=0, tokens=tokens, attention_mask=mask)` goes on from there.
        input .. attention_mask: as `forward` takes them. past_kv_cache: changes nothing here, since positions enter in
            the blocks; pass it to `forward` again, which counts on from what it holds."""
        model = cast("HookedVLM", self)
        inputs = model.as_inputs(input, attention_mask, prepend_bos=prepend_bos, padding_side=padding_side)
        is_prepared = isinstance(input, MultimodalInputs)
        tokens, mask = (inputs, None) if is_prepared else (inputs.tokens, inputs.attention_mask)
        return model.embed_inputs(inputs), tokens, None, mask

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Any,
        attention_mask: Tensor | None = None,
        per_token: bool = False,
    ) -> Float[Tensor, ...]:
        """Return the next-token loss of logits as `forward` does: neither images nor pads are targets.

        tokens: prepared inputs, or tokens [batch pos]. attention_mask: of bare tokens; None masks the pads at a row's
            ends. per_token: [batch pos - 1] instead of the mean over the targets."""
        model = cast("HookedVLM", self)
        return forward.next_token_loss(logits, model.as_inputs(tokens, attention_mask), per_token)

    # --- parameters --------------------------------------------------------------------------------------
    @property
    def n_params_total(self) -> int:
        """Return the number of parameters, tower, embeddings and norms among them; tied ones count once."""
        model = cast("HookedVLM", self)
        return sum(p.numel() for p in model.parameters())

    def tl_named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every text parameter under HookedTransformer's name and in its shape."""
        model = cast("HookedVLM", self)
        yield from model.tl_parameters().items()

    def get_params(self) -> dict[str, Tensor]:
        """Return `tl_parameters()`."""
        return dict(self.tl_named_parameters())

    def to(self, *where: Any, print_details: bool = False, **more: Any) -> Any:
        """Move or cast as torch does; a dtype may be given by its name ("bfloat16"), as to `from_pretrained`.

        print_details: print where it went, as HookedTransformer does.
        Raises: ValueError for a text that names neither a dtype nor a device of this machine."""
        where = tuple(_device_or_dtype(x) if isinstance(x, str) else x for x in where)
        if isinstance(more.get("dtype"), str):
            more["dtype"] = dtype_of(more["dtype"])
        moved = super().to(*where, **more)  # type: ignore[misc]
        if print_details:
            print(f"Moved model to {self.cfg.device}, {self.cfg.dtype}")
        return moved

    def move_model_modules_to_device(self) -> None:
        """Change nothing: weights are where `to` or `device_map` put them, and inputs follow them."""

    # --- flags ---------------------------------------------------------------------------------------------
    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Put `attn.hook_result` into a cache of everything, or leave it out; it can always be hooked."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Put `hook_q_input`, `hook_k_input`, `hook_v_input` into a cache of everything, or leave them out."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Put `hook_mlp_in` into a cache of everything, or leave it out; it can always be hooked."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Put `hook_attn_in` into a cache of everything, or leave it out.

        Raises: ValueError where keys and values have fewer heads than queries."""
        self.cfg.use_attn_in = use_attn_in

    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Give keys, values and their inputs one copy per query head, or, as stored, one per group."""
        self.cfg.ungroup_grouped_query_attention = ungroup_grouped_query_attention
