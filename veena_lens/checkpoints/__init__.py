"""Read and write checkpoints: find an adapter, read files, fill a model, prepare inputs, save.

Names resolve on first use, because most modules here import torch and transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veena_lens.checkpoints.files import bundled_names, bundled_pairs, bundled_path, bundled_pictures
    from veena_lens.checkpoints.filling import fill_from_files, fill_from_state_dict
    from veena_lens.checkpoints.loading import (
        Checkpoint,
        load_generation_config,
        load_processor,
        open_checkpoint,
        save_pretrained,
        to_hf_state_dict,
    )
    from veena_lens.checkpoints.lora import base_of, is_lora_folder, open_lora
    from veena_lens.checkpoints.processing import inputs_from_hf, pad_token_of, prepare
    from veena_lens.checkpoints.registry import all_adapters, find_adapter

_HOMES = {
    "bundled_names": "files",
    "bundled_pairs": "files",
    "bundled_path": "files",
    "bundled_pictures": "files",
    "fill_from_files": "filling",
    "fill_from_state_dict": "filling",
    "Checkpoint": "loading",
    "load_generation_config": "loading",
    "load_processor": "loading",
    "open_checkpoint": "loading",
    "base_of": "lora",
    "is_lora_folder": "lora",
    "open_lora": "lora",
    "inputs_from_hf": "processing",
    "pad_token_of": "processing",
    "prepare": "processing",
    "all_adapters": "registry",
    "find_adapter": "registry",
    "save_pretrained": "loading",
    "to_hf_state_dict": "loading",
}
__all__ = [
    "Checkpoint",
    "all_adapters",
    "base_of",
    "bundled_names",
    "bundled_pairs",
    "bundled_path",
    "bundled_pictures",
    "fill_from_files",
    "fill_from_state_dict",
    "find_adapter",
    "inputs_from_hf",
    "is_lora_folder",
    "load_generation_config",
    "load_processor",
    "open_checkpoint",
    "open_lora",
    "pad_token_of",
    "prepare",
    "save_pretrained",
    "to_hf_state_dict",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"veena_lens.checkpoints.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'veena_lens.checkpoints' has no attribute {name!r}")
