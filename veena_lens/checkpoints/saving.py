"""Going back: a native model's weights under Hugging Face's names, bit for bit, and a folder that loads there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from veena_lens.config import HookedVLMConfig
from veena_lens.weight_map import Adapter


def to_hf_state_dict(module: nn.Module, adapter: Adapter, cfg: HookedVLMConfig) -> dict[str, Tensor]:
    """Hugging Face name (as in its model's `state_dict()`) -> tensor, sharing storage with the model."""
    weights = adapter.weight_map(cfg)
    own = dict(module.named_parameters())
    out = {}
    for ours, theirs in weights:
        tensor = own[ours].detach()
        out[theirs] = tensor.reshape(weights.reshapes[ours]) if ours in weights.reshapes else tensor
    if cfg.tie_word_embeddings:
        out["lm_head.weight"] = own["embed.weight"].detach()
    return out


def save_pretrained(model: Any, folder: str | Path, hf_config: Any) -> Path:
    """Write config, weights and processor as a folder that Hugging Face and `from_pretrained` load.

    The weights keep today's in-memory names, which every loader of transformers 5 takes as they are."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.cpu().contiguous() for k, v in to_hf_state_dict(model, model.adapter, model.cfg).items()}
    if model.cfg.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    save_file(tensors, str(path / "model.safetensors"), metadata={"format": "pt"})
    hf_config.save_pretrained(path)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(path)
    if model.processor is not None:
        model.processor.save_pretrained(path)
    return path
