"""Going back: a native model's weights under Hugging Face's names, bit for bit, and a folder that loads there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from veena_lens.checkpoints.quantised import as_if_float
from veena_lens.config import HookedVLMConfig
from veena_lens.weight_map import Adapter


def to_hf_state_dict(module: nn.Module, adapter: Adapter, cfg: HookedVLMConfig) -> dict[str, Tensor]:
    """Hugging Face name (as in its model's `state_dict()`) -> tensor, sharing storage with the model where a
    parameter is stored alone. Quantised weights are dequantised."""
    weights = adapter.weight_map(cfg)
    out = {}
    for theirs, names in weights.owners.items():
        tensors = [_value(module, ours) for ours in names]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat([t.to(tensors[0].device) for t in tensors])
        out[theirs] = tensor.reshape(weights.reshapes[names[0]]) if names[0] in weights.reshapes else tensor
    if cfg.tie_word_embeddings:
        out["lm_head.weight"] = _value(module, "embed.weight")
    return out


def _value(module: nn.Module, name: str) -> Tensor:
    """A parameter's tensor; of a quantised weight a dequantised copy."""
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf).detach()


def save_pretrained(model: Any, folder: str | Path, hf_config: Any) -> Path:
    """Write config, weights (in shards of 5 GB), generation config and processor as a folder that Hugging Face and
    `from_pretrained` load.

    `hf_config` is the one of the checkpoint that the model came from (`open_checkpoint(...).hf_config`, or
    `hf_model.config`). The weights keep today's in-memory names, which transformers 5 takes as they are.
    Raises: ValueError for a model that came from no checkpoint."""
    if model.adapter is None:
        raise ValueError("save_pretrained: this model came from no Hugging Face checkpoint, so it has no names there.")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.cpu().contiguous() for k, v in to_hf_state_dict(model, model.adapter, model.cfg).items()}
    if model.cfg.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    save_torch_state_dict(tensors, path, max_shard_size="5GB")
    config = copy.deepcopy(as_if_float(hf_config))  # what is written are float weights
    config.architectures, config.dtype = [model.cfg.architecture], model.cfg.dtype
    config.save_pretrained(path)
    for part in (model.generation_config, model.processor):
        if part is not None:
            part.save_pretrained(path)
    return path
