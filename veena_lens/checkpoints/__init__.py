"""Read and write checkpoints: find an adapter, read files, fill a model, prepare inputs, save.

Names resolve on first use, because most modules here import torch and transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from veena_lens._lazy import homes_of, resolver

if TYPE_CHECKING:
    from veena_lens.checkpoints.files import bundled_names, bundled_pairs, bundled_path, bundled_pictures
    from veena_lens.checkpoints.filling import fill_from_files, fill_from_state_dict, require_layers
    from veena_lens.checkpoints.finite import device_of, dtype_of
    from veena_lens.checkpoints.loading import (
        Checkpoint,
        complete_processor,
        load_generation_config,
        load_processor,
        open_checkpoint,
        save_pretrained,
        to_hf_state_dict,
    )
    from veena_lens.checkpoints.lora import base_of, is_lora_folder, open_lora
    from veena_lens.checkpoints.padding import give_pad_token, pad_token_of, padding_mask
    from veena_lens.checkpoints.processing import inputs_from_hf, prepare
    from veena_lens.checkpoints.registry import all_adapters, find_adapter

_HOMES = homes_of(
    __name__,
    {
        "files": "bundled_names bundled_pairs bundled_path bundled_pictures",
        "filling": "fill_from_files fill_from_state_dict require_layers",
        "finite": "device_of dtype_of",
        "loading": "Checkpoint complete_processor load_generation_config load_processor open_checkpoint "
        "save_pretrained to_hf_state_dict",
        "lora": "base_of is_lora_folder open_lora",
        "padding": "give_pad_token pad_token_of padding_mask",
        "processing": "inputs_from_hf prepare",
        "registry": "all_adapters find_adapter",
    },
)
__all__ = [
    "Checkpoint",
    "all_adapters",
    "base_of",
    "bundled_names",
    "bundled_pairs",
    "bundled_path",
    "bundled_pictures",
    "complete_processor",
    "device_of",
    "dtype_of",
    "fill_from_files",
    "fill_from_state_dict",
    "find_adapter",
    "give_pad_token",
    "inputs_from_hf",
    "is_lora_folder",
    "load_generation_config",
    "load_processor",
    "open_checkpoint",
    "open_lora",
    "pad_token_of",
    "padding_mask",
    "prepare",
    "require_layers",
    "save_pretrained",
    "to_hf_state_dict",
]
__getattr__ = resolver(__name__, _HOMES)
