"""Gemma-3 a second time, written plainly in float64; blocks are those of `tests/reference.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gemma_cases import IMAGE, SLIDE
from tests.reference import ACTIVATIONS, Reference

TOWER, PROJECTOR = "model.vision_tower", "model.multi_modal_projector"


class GemmaReference(Reference):
    """One forward pass."""

    def rms(self, name: str, key: str, x: Tensor) -> Tensor:
        eps = self.vision.layer_norm_eps if key.startswith(PROJECTOR) else self.text.rms_norm_eps
        scale = self.at(f"{name}.hook_scale", (x.pow(2).mean(-1, keepdim=True) + eps).sqrt())
        return self.at(f"{name}.hook_normalized", x / scale) * (1 + self.state[f"{key}.weight"])

    def features(self, pixels: Tensor) -> Tensor:
        c = self.vision
        weight, bias = (self.state[f"{TOWER}.embeddings.patch_embedding.{part}"] for part in ("weight", "bias"))
        x = F.conv2d(pixels, weight, bias, stride=c.patch_size)
        side = x.shape[-1]
        x = self.at("vision.hook_embed", x.flatten(2).transpose(1, 2))
        positions = self.state[f"{TOWER}.embeddings.position_embedding.weight"].expand_as(x)
        x = x + self.at("vision.hook_pos_embed", positions)
        heads = (c.num_attention_heads, c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        for layer in range(c.num_hidden_layers):
            at = f"{TOWER}.encoder.layers.{layer}"
            keys = {letter: f"{at}.self_attn.{letter}_proj" for letter in "qkv"}
            keys |= dict(ln1=f"{at}.layer_norm1", ln2=f"{at}.layer_norm2", o=f"{at}.self_attn.out_proj")
            keys |= dict(up=f"{at}.mlp.fc1", down=f"{at}.mlp.fc2")
            act = ACTIVATIONS[c.hidden_act]
            x = self.block(f"vision.blocks.{layer}", keys, x, self.layer_norm, heads, None, None, act)
        x = self.layer_norm("vision.ln_post", f"{TOWER}.post_layernorm", x).unflatten(1, (side, side))
        n = int(self.root.mm_tokens_per_image**0.5)
        m = side // n
        cells = [x[:, y * m : (y + 1) * m, z * m : (z + 1) * m].mean((1, 2)) for y in range(n) for z in range(n)]
        x = self.at("connector.hook_in", torch.stack(cells, 1))
        x = self.rms("connector.norm", f"{PROJECTOR}.mm_soft_emb_norm", x)
        x = self.at("connector.hook_out", x @ self.state[f"{PROJECTOR}.mm_input_projection_weight"])
        return self.at("hook_image_features", x.flatten(0, 1))

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        c, model = self.text, "model.language_model"
        x = self.state[f"{model}.embed_tokens.weight"][input_ids] * float(torch.tensor(c.hidden_size**0.5))
        image = input_ids == IMAGE
        if pixel_values is not None:
            x = x.masked_scatter(image[..., None], self.features(pixel_values.double()))
        x = self.at("hook_embed", x)
        places, length = torch.arange(input_ids.shape[1]), input_ids.shape[1]
        distance = places[:, None] - places[None, :]
        allowed = (distance >= 0).expand(len(input_ids), -1, -1).clone()
        for row in range(len(input_ids)) if pixel_values is not None else ():
            at = 0
            while at < length:  # every run of image tokens reads itself
                stop = at
                while stop < length and image[row, stop]:
                    stop += 1
                allowed[row, at:stop, at:stop] = True
                at = max(stop, at + 1)
        allowed = (allowed & attention_mask.bool()[:, None, :])[:, None]
        heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        for layer, kind in enumerate(c.layer_types):
            rope = c.rope_parameters[kind]
            exponents = torch.arange(0, c.head_dim, 2, dtype=torch.int64).float() / c.head_dim
            frequencies = (1.0 / rope["rope_theta"] ** exponents / rope.get("factor", 1.0)).double()
            angles = places[:, None].double() * frequencies
            cos, sin = (f(torch.cat([angles, angles], -1))[None, :, None] for f in (torch.cos, torch.sin))

            def rotate(t: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
                left, right = t.chunk(2, -1)
                return t * cos + torch.cat([-right, left], -1) * sin

            at = f"{model}.layers.{layer}"
            keys = {letter: f"{at}.self_attn.{letter}_proj" for letter in "qkvo"}
            keys |= {f"{letter}_norm": f"{at}.self_attn.{letter}_norm" for letter in "qk"}
            keys |= {part: f"{at}.mlp.{part}_proj" for part in ("gate", "up", "down")}
            keys |= dict(ln1=f"{at}.input_layernorm", ln2=f"{at}.pre_feedforward_layernorm")
            keys |= dict(ln1_post=f"{at}.post_attention_layernorm", ln2_post=f"{at}.post_feedforward_layernorm")
            reads = allowed & (distance < c.sliding_window) if kind == SLIDE else allowed
            act = ACTIVATIONS[c.hidden_activation]
            x = self.block(f"blocks.{layer}", keys, x, self.rms, heads, reads, rotate, act)
        x = self.at("unembed.hook_in", self.rms("ln_final", f"{model}.norm", x))
        head = "lm_head" if "lm_head.weight" in self.state else f"{model}.embed_tokens"
        logits = self.at("unembed.hook_out", self.linear(head, x))
        assert not self.edits, f"edits that met no value: {sorted(self.edits)}"
        return logits


reference_logits, reference_values = GemmaReference.logits, GemmaReference.named_values


def reference_gradients(
    config: Any, state: Mapping[str, Tensor], raw: Mapping[str, Tensor], weigh: Any
) -> dict[str, Tensor]:
    """d weigh(logits) / d value at every named value."""
    plain = GemmaReference(config, state, tracked=True)
    weigh(plain.forward(**raw)).backward()
    return {name: value.grad for name, value in plain.values.items() if value.grad is not None}
