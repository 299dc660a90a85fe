"""List every hook point in one table: name, axes, when it is computed.

The documentation, `veena-lens inspect`, slicing of caches, position selectors, plots and the test that every hook acts
all read this table. `{l}` stands for the layer. `python -m veena_lens.hook_table` prints it as Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Literal

from veena_lens.config import HookedVLMConfig, TransformerConfig
from veena_lens.flags import Flags

Live = Literal["always", "when hooked"]


@dataclass(frozen=True)
class Hook:
    """Describe one hook point; `axes` as in jaxtyping, `live` says when it is computed, `what` what the value is."""

    name: str
    axes: str
    what: str
    live: Live = "always"
    needs: str = ""  # condition on the configuration, "" for none

    @property
    def axis_names(self) -> tuple[str, ...]:
        return tuple(self.axes.split())

    @property
    def of_text(self) -> bool:
        """Return True where the first axis counts rows of the batch: the value lies in the text decoder."""
        return self.axis_names[0] == "batch"

    @property
    def of_tower(self) -> bool:
        """Return True where the first axis counts crops: the value lies in the vision tower or the connector."""
        return self.axis_names[0] == "crop"

    @property
    def of_features(self) -> bool:
        """Return True where the first axis counts image tokens: the value is what enters the text of the images, row
        after row."""
        return self.axis_names[0] == "n_image_tokens"

    @property
    def by_default(self) -> bool:
        """Say whether it is cached if `names_filter` is None and no flag of the configuration is set: all except the
        large copies of the residual, and the outputs of heads in it."""
        return Flags().caches(self.part)

    @property
    def part(self) -> str:
        """Return the last part of the name, such as "hook_z"."""
        return self.name.rsplit(".", 1)[-1]


def _block(kind: str) -> tuple[Hook, ...]:
    """Return the hooks of one block; `kind` is the first axis: rows of text ("batch") or crops ("crop")."""
    b = kind
    hooked: Live = "when hooked"
    result = "head outputs in the residual stream" + (", before ln1_post if there is one" if b == "batch" else "")
    return (
        Hook("blocks.{l}.hook_resid_pre", f"{b} pos d_model", "residual stream that enters the block"),
        Hook("blocks.{l}.hook_deepstack", f"{b} pos d_model", "inner features of the tower added", needs="deepstack"),
        Hook(
            "blocks.{l}.hook_attn_in",
            f"{b} pos n_heads d_model",
            "residual before ln1, one copy per head for q, k and v",
            hooked,
            "shared_copies",
        ),
        Hook(
            "blocks.{l}.hook_q_input",
            f"{b} pos n_heads d_model",
            "residual before ln1, one copy per query head",
            hooked,
        ),
        Hook("blocks.{l}.hook_k_input", f"{b} pos n_key_value_heads d_model", "the same for keys", hooked),
        Hook("blocks.{l}.hook_v_input", f"{b} pos n_key_value_heads d_model", "the same for values", hooked),
        Hook("blocks.{l}.ln1.hook_scale", f"{b} pos 1", "denominator of the norm before attention", hooked),
        Hook("blocks.{l}.ln1.hook_normalized", f"{b} pos d_model", "its output (RMS: before the weight)"),
        Hook("blocks.{l}.attn.hook_q", f"{b} pos n_heads d_head", "queries, bias added"),
        Hook("blocks.{l}.attn.hook_k", f"{b} pos n_key_value_heads d_head", "keys, bias added"),
        Hook("blocks.{l}.attn.hook_v", f"{b} pos n_key_value_heads d_head", "values, bias added"),
        Hook("blocks.{l}.attn.q_norm.hook_scale", f"{b} pos n_heads 1", "query norm: denominator", hooked, "qk_norm"),
        Hook("blocks.{l}.attn.q_norm.hook_normalized", f"{b} pos n_heads d_head", "before the weight", needs="qk_norm"),
        Hook("blocks.{l}.attn.k_norm.hook_scale", f"{b} pos n_key_value_heads 1", "key norm", hooked, "qk_norm"),
        Hook(
            "blocks.{l}.attn.k_norm.hook_normalized", f"{b} pos n_key_value_heads d_head", "as for q", needs="qk_norm"
        ),
        Hook("blocks.{l}.attn.hook_rot_q", f"{b} pos n_heads d_head", "queries after rotary", needs="rotary"),
        Hook("blocks.{l}.attn.hook_rot_k", f"{b} pos n_key_value_heads d_head", "keys after rotary", needs="rotary"),
        Hook("blocks.{l}.attn.hook_attn_scores", f"{b} n_heads query_pos key_pos", "scaled logits, masked", hooked),
        Hook("blocks.{l}.attn.hook_pattern", f"{b} n_heads query_pos key_pos", "attention weights", hooked),
        Hook("blocks.{l}.attn.hook_z", f"{b} pos n_heads d_head", "head outputs before W_O"),
        Hook("blocks.{l}.attn.hook_result", f"{b} pos n_heads d_model", result, hooked),
        Hook("blocks.{l}.ln1_post.hook_scale", f"{b} pos 1", "denominator of the norm after it", hooked, "post_norms"),
        Hook("blocks.{l}.ln1_post.hook_normalized", f"{b} pos d_model", "before the weight", needs="post_norms"),
        Hook("blocks.{l}.hook_attn_out", f"{b} pos d_model", "what attention adds to the residual"),
        Hook("blocks.{l}.hook_resid_mid", f"{b} pos d_model", "residual after attention"),
        Hook("blocks.{l}.hook_mlp_in", f"{b} pos d_model", "residual before ln2, a copy for the MLP", hooked),
        Hook("blocks.{l}.ln2.hook_scale", f"{b} pos 1", "denominator of the norm before the MLP", hooked),
        Hook("blocks.{l}.ln2.hook_normalized", f"{b} pos d_model", "its output (RMS: before the weight)"),
        Hook("blocks.{l}.mlp.hook_pre", f"{b} pos d_mlp", "input of the activation function"),
        Hook("blocks.{l}.mlp.hook_pre_linear", f"{b} pos d_mlp", "the linear branch of a gated MLP", needs="gated_mlp"),
        Hook("blocks.{l}.mlp.hook_post", f"{b} pos d_mlp", "neuron activations"),
        Hook("blocks.{l}.ln2_post.hook_scale", f"{b} pos 1", "denominator of the norm after it", hooked, "post_norms"),
        Hook("blocks.{l}.ln2_post.hook_normalized", f"{b} pos d_model", "before the weight", needs="post_norms"),
        Hook("blocks.{l}.hook_mlp_out", f"{b} pos d_model", "what the MLP adds to the residual"),
        Hook("blocks.{l}.hook_resid_post", f"{b} pos d_model", "residual stream that leaves the block"),
    )


DECODER_HOOKS: tuple[Hook, ...] = (
    Hook("hook_embed", "batch pos d_model", "merged sequence: token embeddings, image features at image tokens"),
    *_block("batch"),
    Hook("ln_final.hook_scale", "batch pos 1", "denominator of the last norm", "when hooked"),
    Hook("ln_final.hook_normalized", "batch pos d_model", "its output (RMS: before the weight)"),
    Hook("unembed.hook_in", "batch pos d_model", "input of the unembedding"),
    Hook("unembed.hook_out", "batch pos d_vocab", "logits"),
)
VISION_HOOKS: tuple[Hook, ...] = (
    Hook("vision.hook_embed", "crop pos d_model", "patch embeddings, class token first if there is one"),
    Hook("vision.hook_pos_embed", "crop pos d_model", "position embeddings", needs="pos_embed"),
    Hook("vision.ln_pre.hook_scale", "crop pos 1", "denominator of the norm after them", "when hooked", "ln_pre"),
    Hook("vision.ln_pre.hook_normalized", "crop pos d_model", "its output", needs="ln_pre"),
    *(
        Hook(f"vision.{h.name}", h.axes, h.what, h.live, h.needs)
        for h in _block("crop")
        if h.needs not in ("deepstack", "post_norms", "shared_copies")
    ),
    Hook("vision.ln_post.hook_scale", "crop pos 1", "denominator of the last norm", "when hooked", "ln_post"),
    Hook("vision.ln_post.hook_normalized", "crop pos d_model", "its output (RMS: before the weight)", needs="ln_post"),
)
CONNECTOR_HOOKS: tuple[Hook, ...] = (
    Hook("connector.hook_in", "crop pos d_in", "features that the projector reads (Qwen, Idefics3: merged squares)"),
    Hook("connector.norm.hook_scale", "crop pos 1", "its norm: denominator", "when hooked", "normed_connector"),
    Hook("connector.norm.hook_normalized", "crop pos d_in", "before the weight", needs="normed_connector"),
    Hook("connector.hook_pre", "crop pos d_hidden", "before its activation function", needs="hidden_layer"),
    Hook("connector.hook_post", "crop pos d_hidden", "after its activation function", needs="hidden_layer"),
    Hook("connector.hook_out", "crop pos d_model", "projected features"),
    Hook("hook_image_features", "n_image_tokens d_model", "features put into the sequence, row after row"),
)
CONNECTOR_NEEDS = {"mlp": "hidden_layer", "normed": "normed_connector"}  # the additional rows of each kind
DEEPSTACK_HOOKS: tuple[Hook, ...] = (
    Hook("deepstack.{l}.hook_out", "n_image_tokens d_model", "what block l + 1 adds", needs="deepstack"),
)
HOOK_TABLE: tuple[Hook, ...] = (*VISION_HOOKS, *CONNECTOR_HOOKS, *DEEPSTACK_HOOKS, *DECODER_HOOKS)


def _has(cfg: TransformerConfig, need: str, decoder: bool) -> bool:
    if need == "":
        return True
    kind = getattr(cfg, "kind", "")
    if need == "rotary":
        return decoder or getattr(cfg, "rope_theta", None) is not None
    if need == "ln_pre":
        return kind == "clip"
    if need == "ln_post":
        return kind == "qwen" or bool(getattr(cfg, "has_last_norm", False))
    if need == "pos_embed":
        return kind in ("clip", "siglip") or bool(getattr(cfg, "position_grid", 0))
    if need == "shared_copies":
        return cfg.n_key_value_heads == cfg.n_heads
    if need == "deepstack":
        return bool(getattr(cfg, "n_deepstack", 0))
    return bool(getattr(cfg, need))


def _expand(rows: Iterable[Hook], cfg: TransformerConfig, decoder: bool) -> dict[str, Hook]:
    rows = [h for h in rows if _has(cfg, h.needs, decoder)]
    first = next((i for i, h in enumerate(rows) if "{l}" in h.name), len(rows))
    last = max((i for i, h in enumerate(rows) if "{l}" in h.name), default=first - 1)
    out = {h.name: h for h in rows[:first]}
    for layer in range(cfg.n_layers):
        receives = 1 <= layer <= getattr(cfg, "n_deepstack", 0)
        out |= {h.name.format(l=layer): h for h in rows[first : last + 1] if h.needs != "deepstack" or receives}
    return out | {h.name: h for h in rows[last + 1 :]}


@lru_cache(maxsize=32)
def hooks_of(cfg: HookedVLMConfig) -> dict[str, Hook]:
    """Return every hook point of a model with this configuration, in the order of computation: name -> row."""
    table: dict[str, Hook] = {}
    if cfg.vision is not None:
        table |= _expand(VISION_HOOKS, cfg.vision, decoder=False)
        kind = "mlp" if cfg.connector is None else cfg.connector.kind
        table |= {h.name: h for h in CONNECTOR_HOOKS if h.needs in ("", CONNECTOR_NEEDS.get(kind))}
        table |= {h.name.format(l=i): h for h in DEEPSTACK_HOOKS for i in range(cfg.n_deepstack)}
    return table | _expand(DECODER_HOOKS, cfg, decoder=True)


_LAYER = re.compile(r"((?<=blocks\.)|(?<=deepstack\.))\d+(?=\.)")
_ROW = {h.name: h for h in HOOK_TABLE}
# transformer_lens 4 has these below attn; both names mean the same point.
_ALIAS = re.compile(r"^((?:vision\.)?blocks\.\d+\.)attn\.(hook_[qkv]_input)$")


def canonical(name: str) -> str:
    """Return the table's name of a hook point; the name of transformer_lens 4 is accepted."""
    return _ALIAS.sub(r"\1\2", name)


def aliases(name: str) -> tuple[str, ...]:
    """Return other names of this hook point."""
    found = re.match(r"^((?:vision\.)?blocks\.\d+\.)(hook_[qkv]_input)$", name)
    return (f"{found[1]}attn.{found[2]}",) if found else ()


def row_of(name: str) -> Hook:
    """Return the row of a full hook name such as "blocks.3.attn.hook_z" (gradients: "..._grad").

    Raises: ValueError for an unknown name, with near names."""
    bare = canonical(name.removesuffix("_grad"))
    key = _LAYER.sub("{l}", bare)
    if key not in _ROW:
        raise ValueError(f"There is no hook point {name!r}{near_names(key, _ROW)}.")
    return _ROW[key]


def axes_of(name: str) -> tuple[str, ...]:
    """Return the axes of a hook point's value, of one's own that the table does not list too: rows and positions of
    text, then anything."""
    try:
        return row_of(name).axis_names
    except ValueError:
        return ("batch", "pos", "...")


def layer_of(name: str) -> int | None:
    """Return the block index in a hook name (or the number of a deep-stack merger); None if there is none."""
    found = _LAYER.search(name)
    return int(found[0]) if found else None


def near_names(name: str, known: Collection[str]) -> str:
    """Return "; near names: ..." for an error message, or "" if no name is near."""
    near = get_close_matches(name, list(known), n=4, cutoff=0.5)
    return f"; near names: {', '.join(near)}" if near else ""


_ABSENT = {
    "hook_pos_embed": "positions are rotary, applied to queries and keys: blocks.{l}.attn.hook_rot_q, hook_rot_k",
    "hook_tokens": "tokens are no activation: pass other tokens, or edit hook_embed, which their embeddings pass",
    "blocks.{l}.hook_attn_in": "keys and values have fewer heads than queries here: blocks.{l}.hook_q_input, "
    "hook_k_input, hook_v_input",
    "blocks.{l}.mlp.hook_mid": "no norm stands inside the MLP: blocks.{l}.mlp.hook_pre, hook_post",
}


def require_hook(name: str, known: Collection[str]) -> str:
    """Return the canonical name of an existing hook point.

    Raises: ValueError for an unknown name, with near names."""
    full = canonical(name)
    if full not in known:
        instead = _ABSENT.get(_LAYER.sub("{l}", full))
        if instead is not None:
            raise ValueError(f"No hook point {name!r}: {instead}.")
        raise ValueError(
            f"No hook point {name!r}{near_names(full, known)}. "
            "`veena-lens inspect MODEL` and `model.hook_dict` list them all."
        )
    return full


def to_markdown(rows: Iterable[Hook] = HOOK_TABLE) -> str:
    """Return the table as Markdown, for the documentation."""
    lines = ["| hook point | axes | live | what it is |", "|---|---|---|---|"]
    for h in rows:
        what = h.what + (f" (with {h.needs})" if h.needs else "")
        lines.append(f"| `{h.name}` | `{h.axes}` | {h.live} | {what} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(to_markdown())
