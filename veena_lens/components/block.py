"""A transformer block: attention and MLP, each reading a norm of the residual stream and adding to it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from veena_lens.components.attention import Attention, AttentionInputs
from veena_lens.components.context import Context
from veena_lens.components.hooks import heard
from veena_lens.components.mlp import MLP
from veena_lens.components.norms import make_norm
from veena_lens.config import TransformerConfig


class Block(nn.Module):
    """Pre-norm block of a decoder or a vision tower (the same hooks in both)."""

    hook_out_is_single_residual_stream = True  # transformer_lens's lenses ask

    def __init__(self, cfg: TransformerConfig, layer: int, has_rotary: bool) -> None:
        super().__init__()
        self.ln1, self.ln2 = make_norm(cfg), make_norm(cfg)
        self.attn, self.mlp = Attention(cfg, layer, has_rotary), MLP(cfg)
        self.n_heads, self.n_kv = cfg.n_heads, cfg.n_key_value_heads
        self.hook_resid_pre = HookPoint()
        self.hook_q_input, self.hook_k_input, self.hook_v_input = HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_out, self.hook_resid_mid = HookPoint(), HookPoint()
        self.hook_mlp_in, self.hook_mlp_out, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], context: Context
    ) -> Float[Tensor, "batch pos d_model"]:
        return self.rest(self.hook_resid_pre(resid), context)

    def rest(self, resid: Float[Tensor, "batch pos d_model"], context: Context) -> Float[Tensor, "batch pos d_model"]:
        """The block from just after `hook_resid_pre`: a tower takes its features there."""
        attn_out = self.hook_attn_out(self.attn(self._attention_inputs(resid), context))
        resid_mid = self.hook_resid_mid(resid + attn_out)
        mlp_in = self.hook_mlp_in(resid_mid.clone()) if heard(self.hook_mlp_in) else resid_mid
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(mlp_in)))
        return self.hook_resid_post(resid_mid + mlp_out)

    def _attention_inputs(self, resid: Tensor) -> AttentionInputs:
        normed = self.ln1.run(resid)
        if not heard(self.hook_q_input, self.hook_k_input, self.hook_v_input):
            return AttentionInputs(normed.out)

        def copies(hook: HookPoint, n: int) -> Tensor | None:
            if not heard(hook):
                return None
            # A view made by expand must be cloned before hooks see it: they may write in place.
            return self.ln1.of_copies(hook(resid[:, :, None].expand(-1, -1, n, -1).clone()), normed)

        return AttentionInputs(
            normed.out,
            copies(self.hook_q_input, self.n_heads),
            copies(self.hook_k_input, self.n_kv),
            copies(self.hook_v_input, self.n_kv),
        )
