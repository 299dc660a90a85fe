"""The model a second time, written plainly: float64, no fused kernel, every named value edited where it arises.

It reads a Hugging Face state dict and configuration, shares no code with the library, and is what an edit at
any hook point is compared with. `edits` maps a hook's name to a function of the value (given a copy). One decoder
serves all families; their images are in `tests/reference_towers.py`, LLaVA's here.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Edits = Mapping[str, Callable[[Tensor], Tensor]]
TOWER, PROJECTOR, DECODER = "model.vision_tower", "model.multi_modal_projector", "model.language_model"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Reference:
    """One forward pass; `values` holds every named value as it went on, edits included.

    With `tracked` each named value is a tensor of its own that keeps its gradient. The class's constants are what
    tells a decoder from LLaVA's: the norms of a block by their keys, and what is added to the weight of a norm."""

    norms: Mapping[str, str] = dict(ln1="input_layernorm", ln2="post_attention_layernorm")
    weight_offset = 0.0

    def __init__(
        self, config: Any, state: Mapping[str, Tensor], edits: Edits | None = None, tracked: bool = False
    ) -> None:
        self.root, self.edits, self.values = config, dict(edits or {}), {}
        self.tracked = tracked
        self.text = getattr(config, "text_config", config)
        self.vision = getattr(config, "vision_config", None)
        self.state = {_today(k): v.double() for k, v in state.items()}

    @classmethod
    def logits(
        cls, config: Any, state: Mapping[str, Tensor], raw: Mapping[str, Tensor], edits: Edits | None = None
    ) -> Tensor:
        """Logits [batch pos d_vocab] of the plain model, float64."""
        with torch.no_grad():
            return cls(config, state, edits).forward(**raw)

    @classmethod
    def named_values(cls, config: Any, state: Mapping[str, Tensor], raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every named value of an unedited pass."""
        plain = cls(config, state)
        with torch.no_grad():
            plain.forward(**raw)
        return plain.values

    def at(self, name: str, value: Tensor) -> Tensor:
        """The named value, after its edit."""
        if name in self.edits:
            value = self.edits.pop(name)(value.clone())
        if self.tracked:
            value = value.clone().requires_grad_()
            value.retain_grad()
        self.values[name] = value
        return value

    def linear(self, key: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{key}.weight"], self.state.get(f"{key}.bias"))

    # --- norms ---------------------------------------------------------------------------------------
    def rms(self, name: str, key: str, x: Tensor) -> Tensor:
        eps = 1e-6 if "visual" in key else self.text.rms_norm_eps  # fixed in Qwen's towers
        if key.startswith(PROJECTOR):
            eps = self.vision.layer_norm_eps
        scale = self.at(f"{name}.hook_scale", (x.pow(2).mean(-1, keepdim=True) + eps).sqrt())
        return self.at(f"{name}.hook_normalized", x / scale) * (self.weight_offset + self.state[f"{key}.weight"])

    def layer_norm(self, name: str, key: str, x: Tensor) -> Tensor:
        variance = x.var(-1, keepdim=True, unbiased=False)
        eps = getattr(self.vision, "layer_norm_eps", 1e-6)  # Qwen's towers have it fixed
        scale = self.at(f"{name}.hook_scale", (variance + eps).sqrt())
        out = (x - x.mean(-1, keepdim=True)) / scale * self.state[f"{key}.weight"] + self.state[f"{key}.bias"]
        return self.at(f"{name}.hook_normalized", out)

    # --- one block -----------------------------------------------------------------------------------
    def block(
        self,
        b: str,
        keys: Mapping[str, str],
        x: Tensor,
        norm: Any,
        heads: tuple[int, int, int],
        allowed: Any,
        rotate: Any,
        act: Any,
        added: Tensor | None = None,
    ) -> Tensor:
        n, kv, e = heads
        x = self.at(f"{b}.hook_resid_pre", x)
        if added is not None:
            x = self.at(f"{b}.hook_deepstack", x + added)
        projected = {}
        common, common_edited = x[:, :, None], False
        if n == kv and not b.startswith("vision."):  # one copy per head for all three
            common_edited = f"{b}.hook_attn_in" in self.edits
            common = self.at(f"{b}.hook_attn_in", common.expand(-1, -1, n, -1))
        for letter, count in (("q", n), ("k", kv), ("v", kv)):
            copies = common.expand(-1, -1, count, -1)
            edited = common_edited or f"{b}.hook_{letter}_input" in self.edits
            copies = self.at(f"{b}.hook_{letter}_input", copies)
            projected[letter] = copies if edited else None
        normed = norm(f"{b}.ln1", keys["ln1"], x)
        for letter, count in (("q", n), ("k", kv), ("v", kv)):
            copies = projected[letter]
            if copies is None:
                out = self.linear(keys[letter], normed).unflatten(-1, (count, e))
            else:  # each head reads its own copy
                quiet = copy.copy(self)
                quiet.edits, quiet.values, quiet.tracked = {}, {}, False
                all_heads = quiet.linear(keys[letter], getattr(quiet, norm.__name__)("", keys["ln1"], copies))
                all_heads = all_heads.unflatten(-1, (count, e))
                out = torch.stack([all_heads[:, :, h, h] for h in range(count)], 2)
            projected[letter] = self.at(f"{b}.attn.hook_{letter}", out)
        q, k, v = projected["q"], projected["k"], projected["v"]
        if "q_norm" in keys:
            q, k = (self.rms(f"{b}.attn.{x}_norm", keys[f"{x}_norm"], t) for x, t in (("q", q), ("k", k)))
        if rotate is not None:
            q, k = self.at(f"{b}.attn.hook_rot_q", rotate(q)), self.at(f"{b}.attn.hook_rot_k", rotate(k))
        wide_k, wide_v = (t.repeat_interleave(n // kv, 2) for t in (k, v))
        has_post_norms = "ln1_post" in keys
        scores = torch.einsum("bqhe,bkhe->bhqk", q, wide_k)
        scores = scores * (self.text.query_pre_attn_scalar if has_post_norms else e) ** -0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        scores = self.at(f"{b}.attn.hook_attn_scores", scores)
        pattern = self.at(f"{b}.attn.hook_pattern", scores.softmax(-1))
        z = self.at(f"{b}.attn.hook_z", torch.einsum("bhqk,bkhe->bqhe", pattern, wide_v))
        weight = self.state[f"{keys['o']}.weight"].unflatten(1, (n, e))
        result = self.at(f"{b}.attn.hook_result", torch.einsum("bqhe,dhe->bqhd", z, weight))
        bias = self.state.get(f"{keys['o']}.bias", torch.zeros((), dtype=torch.float64))
        out = result.sum(2) + bias
        out = norm(f"{b}.ln1_post", keys["ln1_post"], out) if has_post_norms else out
        x = self.at(f"{b}.hook_resid_mid", x + self.at(f"{b}.hook_attn_out", out))
        normed = norm(f"{b}.ln2", keys["ln2"], self.at(f"{b}.hook_mlp_in", x))
        if "gate" in keys:
            gate = self.at(f"{b}.mlp.hook_pre", self.linear(keys["gate"], normed))
            hidden = act(gate) * self.at(f"{b}.mlp.hook_pre_linear", self.linear(keys["up"], normed))
        else:
            hidden = act(self.at(f"{b}.mlp.hook_pre", self.linear(keys["up"], normed)))
        out = self.linear(keys["down"], self.at(f"{b}.mlp.hook_post", hidden))
        out = norm(f"{b}.ln2_post", keys["ln2_post"], out) if has_post_norms else out
        return self.at(f"{b}.hook_resid_post", x + self.at(f"{b}.hook_mlp_out", out))

    # --- the image's way into the sequence ---------------------------------------------------------
    def patches(self, pixels: Tensor) -> Tensor:
        weight, bias = (self.state.get(f"{TOWER}.embeddings.patch_embedding.{part}") for part in ("weight", "bias"))
        assert weight is not None
        return F.conv2d(pixels, weight, bias, stride=self.vision.patch_size).flatten(2).transpose(1, 2)

    def tower_block(self, layer: int, x: Tensor, allowed: Tensor | None = None) -> Tensor:
        """A block of a CLIP or SigLIP tower; `allowed` may be [image 1 1 patch]."""
        c, at = self.vision, f"{TOWER}.encoder.layers.{layer}"
        keys = {letter: f"{at}.self_attn.{letter}_proj" for letter in "qkv"}
        keys |= dict(ln1=f"{at}.layer_norm1", ln2=f"{at}.layer_norm2", o=f"{at}.self_attn.out_proj")
        keys |= dict(up=f"{at}.mlp.fc1", down=f"{at}.mlp.fc2")
        heads = (c.num_attention_heads, c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        act = ACTIVATIONS[c.hidden_act]
        return self.block(f"vision.blocks.{layer}", keys, x, self.layer_norm, heads, allowed, None, act)

    def features(self, pixels: Tensor) -> Tensor:
        """Image features [tokens d_model] of LLaVA-1.5."""
        c, is_clip = self.vision, self.vision.model_type == "clip_vision_model"
        x = self.patches(pixels)
        if is_clip:
            x = torch.cat([self.state[f"{TOWER}.embeddings.class_embedding"].expand(len(x), 1, -1), x], 1)
        x = self.at("vision.hook_embed", x)
        positions = self.state[f"{TOWER}.embeddings.position_embedding.weight"].expand_as(x)
        x = x + self.at("vision.hook_pos_embed", positions)
        if is_clip:
            x = self.layer_norm("vision.ln_pre", f"{TOWER}.pre_layrnorm", x)
        wanted = self.root.vision_feature_layer
        wanted = [wanted] if isinstance(wanted, int) else list(wanted)
        wanted = [i % (c.num_hidden_layers + 1) for i in wanted]
        states = []  # hidden state l is the residual that enters block l, as its hook leaves it
        for layer in range(max(wanted)):
            x = self.tower_block(layer, x)
            states.append(self.values[f"vision.blocks.{layer}.hook_resid_pre"])
        states.append(x)
        drop = self.root.vision_feature_select_strategy == "default"
        x = torch.cat([states[i][:, 1:] if drop else states[i] for i in wanted], -1)
        x = self.at("connector.hook_in", x)
        x = self.at("connector.hook_pre", self.linear(f"{PROJECTOR}.linear_1", x))
        x = self.at("connector.hook_post", ACTIVATIONS[self.root.projector_hidden_act](x))
        x = self.at("connector.hook_out", self.linear(f"{PROJECTOR}.linear_2", x))
        return self.at("hook_image_features", x.flatten(0, 1))

    # --- what tells one decoder from another ----------------------------------------------------------
    def see(self, raw: Mapping[str, Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """(the images' features, what the layers after 0, 1, ... add to them)."""
        pixels = raw.get("pixel_values")
        return None if pixels is None else self.features(pixels.double()), []

    def filled(self, raw: Mapping[str, Tensor]) -> Tensor:
        """True at the tokens that images fill [batch pos]."""
        return raw["input_ids"] == getattr(self.root, "image_token_id", -1)

    def embedded(self, ids: Tensor) -> Tensor:
        return self.state[f"{DECODER}.embed_tokens.weight"][ids]

    def positions(self, raw: Mapping[str, Tensor]) -> Tensor:
        """Rotary positions [batch pos], or of several streams [stream batch pos]."""
        given = raw.get("position_ids")
        return torch.arange(raw["input_ids"].shape[1]).expand_as(raw["input_ids"]) if given is None else given

    def angles(self, layer: int, positions: Tensor, d_head: int) -> Tensor:
        """Angles [batch pos d_head / 2] of a layer's rotary positions."""
        rope = self.text.rope_parameters
        rope = rope if "rope_theta" in rope else rope[self.text.layer_types[layer]]
        # The frequencies are constants of the model, kept in float32 as Hugging Face has them.
        exponents = torch.arange(0, d_head, 2, dtype=torch.int64).float() / d_head
        frequencies = (1.0 / rope["rope_theta"] ** exponents / rope.get("factor", 1.0)).double()
        return positions[..., None].double() * frequencies

    def reads(self, raw: Mapping[str, Tensor]) -> Tensor:
        """True where a query may read a key, windows aside [batch query_pos key_pos]."""
        length = raw["input_ids"].shape[1]
        return torch.ones(length, length, dtype=torch.bool).tril().expand(len(raw["input_ids"]), -1, -1)

    def window(self, layer: int) -> int | None:
        types = getattr(self.text, "layer_types", None)
        if types is not None and types[layer] != "sliding_attention":
            return None
        return getattr(self.text, "sliding_window", None)

    # --- the whole -----------------------------------------------------------------------------------
    def forward(self, **raw: Tensor) -> Tensor:
        """Logits of what a processor gives."""
        c, ids = self.text, raw["input_ids"]
        d_head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        heads = (c.num_attention_heads, c.num_key_value_heads, d_head)
        act = ACTIVATIONS[c.hidden_activation if hasattr(c, "hidden_activation") else c.hidden_act]
        features, added = self.see(raw)
        x, filled = self.embedded(ids), self.filled(raw)[..., None]
        if features is not None:
            x = x.masked_scatter(filled, features)
        x = self.at("hook_embed", x)
        positions, places = self.positions(raw), torch.arange(ids.shape[1])
        allowed = (self.reads(raw) & raw["attention_mask"].bool()[:, None, :])[:, None]
        for layer in range(c.num_hidden_layers):
            at, window = f"{DECODER}.layers.{layer}", self.window(layer)
            keys = {letter: f"{at}.self_attn.{letter}_proj" for letter in "qkvo"}
            keys |= {part: f"{at}.mlp.{part}_proj" for part in ("gate", "up", "down")}
            keys |= {norm: f"{at}.{name}" for norm, name in self.norms.items()}
            keys |= {
                f"{letter}_norm": f"{at}.self_attn.{letter}_norm"
                for letter in "qk"
                if f"{at}.self_attn.{letter}_norm.weight" in self.state
            }
            seen = allowed if window is None else allowed & (places[:, None] - places < window)
            rotate = turn(self.angles(layer, positions, d_head))
            more = added[layer - 1] if 1 <= layer <= len(added) else None
            more = None if more is None else torch.zeros_like(x).masked_scatter(filled, more)
            x = self.block(f"blocks.{layer}", keys, x, self.rms, heads, seen, rotate, act, more)
        if len(added) >= c.num_hidden_layers:
            x = x + torch.zeros_like(x).masked_scatter(filled, added[c.num_hidden_layers - 1])
        x = self.at("unembed.hook_in", self.rms("ln_final", f"{DECODER}.norm", x))
        head = "lm_head" if "lm_head.weight" in self.state else f"{DECODER}.embed_tokens"
        logits = self.at("unembed.hook_out", self.linear(head, x))
        assert not self.edits, f"edits that met no value: {sorted(self.edits)}"
        return logits


def turn(angles: Tensor) -> Callable[[Tensor], Tensor]:
    """Rotation of queries or keys [batch pos heads d_head] by [batch pos d_head / 2] angles."""
    both = torch.cat([angles, angles], -1)[:, :, None]

    def rotate(t: Tensor) -> Tensor:
        left, right = t.chunk(2, -1)
        return t * both.cos() + torch.cat([-right, left], -1) * both.sin()

    return rotate


def _today(key: str) -> str:
    """Names of a text-only model as they are inside a LLaVA."""
    if key.startswith("model.") and not key.startswith((f"{DECODER}.", f"{TOWER}.", f"{PROJECTOR}.", "model.visual.")):
        return f"{DECODER}." + key.removeprefix("model.")
    return key


def text_loss(logits: Tensor, raw: Mapping[str, Tensor], filled: Tensor) -> Tensor:
    """Mean next-token loss over targets that are text, of real tokens; `filled` marks those of images."""
    total, n = logits.new_zeros(()), 0
    for row, keep in enumerate(raw["attention_mask"]):
        for now, following in itertools.pairwise(keep.nonzero().flatten().tolist()):
            if not filled[row, following]:
                total = total - logits[row, now].log_softmax(-1)[raw["input_ids"][row, following]]
                n += 1
    return total / n


def reference_gradients(plain: Reference, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of the loss with respect to every named value of a tracked pass."""
    text_loss(plain.forward(**raw), raw, plain.filled(raw)).backward()
    return {name: torch.zeros_like(v) if v.grad is None else v.grad for name, v in plain.values.items()}
