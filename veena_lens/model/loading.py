"""Models from checkpoints, and from Hugging Face models in memory: the bodies of `from_pretrained` and `from_hf`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from veena_lens import checkpoints

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM


@torch.inference_mode(False)  # parameters made in it take no gradient ever after
def from_pretrained(
    cls: type[HookedVLM],
    name: str | Path,
    *,
    dtype: torch.dtype | str | None,
    device: str | torch.device | None,
    device_map: Any,
    casts: str,
    revision: str | None,
    lora: str | Path | None,
) -> HookedVLM:
    """Return a checkpoint as a model: see `HookedVLM.from_pretrained`."""
    if lora is None and checkpoints.is_lora_folder(name):
        name, lora = checkpoints.base_of(name), name
    tuned = None if lora is None else checkpoints.open_lora(lora)
    checkpoint = checkpoints.open_checkpoint(name, dtype=dtype, casts=casts, revision=revision)
    checkpoints.require_layers(checkpoint)
    with torch.device("meta"):
        model = cls(checkpoint.cfg)
    checkpoints.fill_from_files(model, checkpoint, dtype=dtype, device=device, device_map=device_map, lora=tuned)
    generation_config = checkpoints.load_generation_config(checkpoint.path, checkpoint.hf_config)
    return _finished(model, checkpoint.adapter, checkpoints.load_processor(checkpoint.path), generation_config)


@torch.inference_mode(False)
def from_hf(cls: type[HookedVLM], hf_model: Any, processor: Any, copy: bool, casts: str) -> HookedVLM:
    """Return a Hugging Face model in memory as a model: see `HookedVLM.from_hf`."""
    adapter = checkpoints.find_adapter(type(hf_model).__name__)
    cfg = replace(adapter.read_config(hf_model.config), architecture=adapter.architecture, casts=casts)
    cfg = replace(cfg, model_name=getattr(hf_model.config, "_name_or_path", "") or "")
    with torch.device("meta"):
        model = cls(cfg)
    checkpoints.fill_from_state_dict(model, hf_model.state_dict(), adapter, cfg, copy=copy)
    if cfg.scales_embeddings:  # the factor as their model holds it, rounded to the dtype that it was made in
        model.embed.scale = float(hf_model.get_input_embeddings().embed_scale)
    processor = checkpoints.complete_processor(processor, hf_model.config)
    return _finished(model, adapter, processor, getattr(hf_model, "generation_config", None))


def _finished(model: HookedVLM, adapter: Any, processor: Any, generation_config: Any) -> HookedVLM:
    """Attach what belongs to a checkpoint beside its weights."""
    model.adapter, model.generation_config = adapter, generation_config
    model.setup()  # quantised weights came in modules of their own
    model.tokenizer, model.processor = getattr(processor, "tokenizer", processor), processor
    model.eval()
    model._refresh_cfg()
    return model
