"""The model a second time, written plainly: float64, no fused kernel, every named value edited where it arises.

It reads a Hugging Face state dict and configuration, shares no code with the library, and is what an edit at
any hook point is compared with. `edits` maps a hook's name to a function of the value (given a copy). Qwen's
images of any size are in `tests/qwen_reference.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Edits = Mapping[str, Callable[[Tensor], Tensor]]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Reference:
    """One forward pass; `values` holds every named value as it went on, edits included.

    With `tracked` each named value is a tensor of its own that keeps its gradient."""

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
        scale = self.at(f"{name}.hook_scale", (x.pow(2).mean(-1, keepdim=True) + eps).sqrt())
        return self.at(f"{name}.hook_normalized", x / scale) * self.state[f"{key}.weight"]

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
        for letter, count in (("q", n), ("k", kv), ("v", kv)):
            copies = x[:, :, None].expand(-1, -1, count, -1)
            edited = f"{b}.hook_{letter}_input" in self.edits
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
    def features(self, pixels: Tensor) -> Tensor:
        tower, c = "model.vision_tower", self.vision
        patches = F.conv2d(
            pixels,
            self.state[f"{tower}.embeddings.patch_embedding.weight"],
            self.state.get(f"{tower}.embeddings.patch_embedding.bias"),
            stride=c.patch_size,
        )
        x = patches.flatten(2).transpose(1, 2)
        if c.model_type == "clip_vision_model":
            x = torch.cat([self.state[f"{tower}.embeddings.class_embedding"].expand(len(x), 1, -1), x], 1)
        x = self.at("vision.hook_embed", x)
        positions = self.state[f"{tower}.embeddings.position_embedding.weight"].expand_as(x)
        x = x + self.at("vision.hook_pos_embed", positions)
        if c.model_type == "clip_vision_model":
            x = self.layer_norm("vision.ln_pre", f"{tower}.pre_layrnorm", x)
        wanted = self.root.vision_feature_layer
        wanted = [wanted] if isinstance(wanted, int) else list(wanted)
        wanted = [i % (c.num_hidden_layers + 1) for i in wanted]
        heads = (c.num_attention_heads, c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        states = []  # hidden state l is the residual that enters block l, as its hook leaves it
        for layer in range(max(wanted)):
            at = f"{tower}.encoder.layers.{layer}"
            keys = dict(
                ln1=f"{at}.layer_norm1",
                ln2=f"{at}.layer_norm2",
                q=f"{at}.self_attn.q_proj",
                k=f"{at}.self_attn.k_proj",
                v=f"{at}.self_attn.v_proj",
                o=f"{at}.self_attn.out_proj",
                up=f"{at}.mlp.fc1",
                down=f"{at}.mlp.fc2",
            )
            act = ACTIVATIONS[c.hidden_act]
            x = self.block(f"vision.blocks.{layer}", keys, x, self.layer_norm, heads, None, None, act)
            states.append(self.values[f"vision.blocks.{layer}.hook_resid_pre"])
        states.append(x)
        drop = self.root.vision_feature_select_strategy == "default"
        x = torch.cat([states[i][:, 1:] if drop else states[i] for i in wanted], -1)
        x = self.at("connector.hook_in", x)
        x = self.at("connector.hook_pre", self.linear("model.multi_modal_projector.linear_1", x))
        x = self.at("connector.hook_post", ACTIVATIONS[self.root.projector_hidden_act](x))
        x = self.at("connector.hook_out", self.linear("model.multi_modal_projector.linear_2", x))
        return self.at("hook_image_features", x.flatten(0, 1))

    # --- the whole -----------------------------------------------------------------------------------
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Tensor:
        c, model = self.text, "model.language_model"
        e = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        heads = (c.num_attention_heads, c.num_key_value_heads, e)
        x = self.state[f"{model}.embed_tokens.weight"][input_ids]
        if pixel_values is not None:
            features = self.features(pixel_values.double())
            x = x.masked_scatter((input_ids == self.root.image_token_id)[..., None], features)
        x = self.at("hook_embed", x)
        length = input_ids.shape[1]
        places = torch.arange(length)
        if position_ids is None:
            position_ids = places.expand(len(input_ids), -1)
        # The frequencies are constants of the model, kept in float32 as Hugging Face has them.
        exponents = torch.arange(0, e, 2, dtype=torch.int64).float() / e
        frequencies = (1.0 / c.rope_parameters["rope_theta"] ** exponents).double()
        angles = position_ids[..., None].double() * frequencies
        cos, sin = (f(torch.cat([angles, angles], -1))[:, :, None] for f in (torch.cos, torch.sin))

        def rotate(t: Tensor) -> Tensor:
            left, right = t.chunk(2, -1)
            return t * cos + torch.cat([-right, left], -1) * sin

        distance = places[:, None] - places[None, :]
        causal = (distance >= 0) & attention_mask.bool()[:, None, None, :]
        types = getattr(c, "layer_types", None)
        for layer in range(c.num_hidden_layers):
            window = getattr(c, "sliding_window", None)
            if types is not None and types[layer] != "sliding_attention":
                window = None
            allowed = causal if window is None else causal & (distance < window)
            at = f"{model}.layers.{layer}"
            keys = dict(
                ln1=f"{at}.input_layernorm",
                ln2=f"{at}.post_attention_layernorm",
                q=f"{at}.self_attn.q_proj",
                k=f"{at}.self_attn.k_proj",
                v=f"{at}.self_attn.v_proj",
                o=f"{at}.self_attn.o_proj",
                gate=f"{at}.mlp.gate_proj",
                up=f"{at}.mlp.up_proj",
                down=f"{at}.mlp.down_proj",
            )
            x = self.block(f"blocks.{layer}", keys, x, self.rms, heads, allowed, rotate, ACTIVATIONS[c.hidden_act])
        x = self.at("unembed.hook_in", self.rms("ln_final", f"{model}.norm", x))
        head = "lm_head" if "lm_head.weight" in self.state else f"{model}.embed_tokens"
        logits = self.at("unembed.hook_out", self.linear(head, x))
        assert not self.edits, f"edits that met no value: {sorted(self.edits)}"
        return logits


def _today(key: str) -> str:
    """Names of a text-only model as they are inside a LLaVA."""
    if key.startswith("model.") and not key.startswith(
        ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector.", "model.visual.")
    ):
        return "model.language_model." + key.removeprefix("model.")
    return key


reference_logits, reference_values = Reference.logits, Reference.named_values
