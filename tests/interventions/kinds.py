"""The cases that interventions are tried on, their runs, and every kind that is tried on each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.cases import BY_NAME, QWEN, Case, relative_error
from veena_lens.interventions import (
    Ablate,
    BoostAttention,
    KnockOutAttention,
    Patch,
    ScaleNeurons,
    Steer,
    SteerKeepingNorm,
    SuppressHeads,
)

# One case for each feature that an edit can meet: images that read themselves, several streams, deep-stack features.
SEVERAL, BIDIRECTIONAL = "three-images-and-none", "gemma3-unequal-rows"
ROWS = ("2 i4x4 1 i2x4 3", "1 v2x2x4 1 i2x2 2", "5")
CASES = {name: BY_NAME[name] for name in (SEVERAL, BIDIRECTIONAL)}
CASES |= {family: Case(name="edits", family=family, rows=ROWS) for family in QWEN}
VECTOR = torch.randn(48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Ready:
    """A model in pure float64, inputs with their logits and cache, and the cache of other images and words."""

    name: str
    model: Any
    inputs: Any
    plain: Tensor
    cache: Any
    source: Any

    def logits(self, interventions: Any) -> Tensor:
        with torch.no_grad(), self.model.intervene(interventions):
            return self.model(self.inputs)

    def hooked(self, *hooks: Any) -> Tensor:
        with torch.no_grad():
            return self.model.run_with_hooks(self.inputs, fwd_hooks=list(hooks))

    def differs(self, ours: Tensor, theirs: Tensor) -> float:
        return relative_error(ours, theirs, self.inputs.attention_mask)


def kinds_of(ready: Ready) -> dict[str, Any]:
    """The interventions that are tried on a case."""
    source, cfg = ready.source, ready.model.cfg
    few = list(range(40))
    found = {
        "steer image tokens": Steer(0, VECTOR, alpha=2.0, positions="image"),
        "patch image tokens": Patch("blocks.1.hook_resid_pre", source, positions="image"),
        "ablate a pattern": Ablate("blocks.1.attn.hook_pattern", heads=[-1], positions="query"),
        "ablate to the mean": Ablate("blocks.0.mlp.hook_post", neurons=few, value="mean", reference=source),
        "ablate features": Ablate("hook_image_features"),
        "scale neurons": ScaleNeurons(1, few[:20], 5.0, positions="query+generated"),
        "boost renorm": BoostAttention(1, [0, 3], factor=8.0),
        "boost scale": BoostAttention(1, [0, 3], factor=8.0, mode="scale"),
        "boost mul": BoostAttention(0, factor=4.0, mode="mul"),
        "boost abs": BoostAttention(0, factor=4.0, mode="abs"),
    }
    if ready.name == SEVERAL:
        found |= {
            "ablate a head": Ablate("blocks.1.attn.hook_z", heads=[1]),
            "ablate neurons to the mean": Ablate(
                "blocks.0.mlp.hook_post", neurons=[0, 5], value="mean", reference=ready.cache
            ),
            "ablate the tower's neurons": Ablate("vision.blocks.1.mlp.hook_post", neurons=[3, 4, 5]),
            "turn": SteerKeepingNorm(1, torch.arange(48, dtype=torch.float64) - 20, 0.8),
            "quiet heads": SuppressHeads(1, keep=0.5, factor=0.1),
        }
    if ready.name in QWEN:
        found |= {
            "steer": Steer(1, VECTOR, alpha=2.0),
            "patch a head": Patch("blocks.1.attn.hook_z", source, heads=[1, 2], positions="query"),
            "patch rotated keys": Patch("blocks.1.attn.hook_rot_k", source, positions="image"),
            "patch the tower": Patch("vision.blocks.1.attn.hook_z", source, heads=[0], positions="all"),
            "ablate a last pattern": Ablate("blocks.2.attn.hook_pattern", heads=[-1], positions="query"),
        }
    if cfg.n_deepstack:
        found |= {
            "patch the addition": Patch("blocks.1.hook_deepstack", source, positions="image+last"),
            "ablate inner features": Ablate("deepstack.0.hook_out"),
            "ablate normed queries": Ablate("blocks.1.attn.q_norm.hook_normalized", heads=[1], positions="all"),
        }
    if ready.name == BIDIRECTIONAL:
        found |= {
            "steer on": Steer(1, VECTOR, positions="image+generated"),
            "patch attention": Patch("blocks.1.hook_attn_out", source, positions="image"),
            "ablate a norm": Ablate("blocks.0.ln1_post.hook_normalized", positions="query+generated"),
            "ablate in the connector": Ablate("connector.norm.hook_normalized", positions=[1, 2]),
            "neurons": ScaleNeurons(2, [3, 4], 3.0, positions="image+query+generated"),
            "boost": BoostAttention(1, keys="image", queries="image+query+generated", factor=4.0),
            "boost of scores": BoostAttention(0, keys="image", queries="image", factor=2.0, mode="abs"),
            "cut": KnockOutAttention(1, keys="image", queries="image"),
            "quiet": SuppressHeads(1, 0.5, queries="image+generated"),
            "turn": SteerKeepingNorm(1, VECTOR, 0.3, positions="image+generated"),
        }
    return found
