"""Models from checkpoints, and from Hugging Face models in memory: the bodies of `from_pretrained` and `from_hf`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from veena_lens import checkpoints
from veena_lens.model.conveniences import PROCESSING, refuse_processing
from veena_lens.model.encoding import refuse_unknown

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
    further: dict[str, Any],
) -> HookedVLM:
    """Return a checkpoint as a model: see `HookedVLM.from_pretrained`."""
    further, dtype = _known_settings(further), checkpoints.dtype_of(dtype)
    found = checkpoints.device_of(device)
    device = device if isinstance(device, str) else found
    if further["hf_model"] is not None:
        model = from_hf(cls, further["hf_model"], further["tokenizer"], False, casts).to(device, dtype)
        return _with_defaults(model, further)
    if lora is None and checkpoints.is_lora_folder(name):
        name, lora = checkpoints.base_of(name), name
    tuned = None if lora is None else checkpoints.open_lora(lora)
    checkpoint = checkpoints.open_checkpoint(name, dtype=dtype, casts=casts, revision=revision)
    checkpoints.require_layers(checkpoint)
    with torch.device("meta"):
        model = cls(checkpoint.cfg)
    checkpoints.fill_from_files(model, checkpoint, dtype=dtype, device=device, device_map=device_map, lora=tuned)
    generation_config = checkpoints.load_generation_config(checkpoint.path, checkpoint.hf_config)
    processor = checkpoints.load_processor(checkpoint.path)
    if further["tokenizer"] is not None:
        if hasattr(processor, "tokenizer"):
            processor.tokenizer = further["tokenizer"]
        else:
            processor = further["tokenizer"]
    return _with_defaults(_finished(model, checkpoint.adapter, processor, generation_config), further)


def _with_defaults(model: HookedVLM, further: dict[str, Any]) -> HookedVLM:
    """Return the model with the defaults for text that HookedTransformer's `from_pretrained` sets."""
    if further["default_padding_side"] is not None:
        model.set_tokenizer(model.tokenizer, further["default_padding_side"])
    if further["default_prepend_bos"] is not None:
        model.cfg.default_prepend_bos = further["default_prepend_bos"]
    return model


def _known_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of HookedTransformer's `from_pretrained` that are followed.

    Raises: ValueError for weights that should be changed, or a setting without meaning here; TypeError for an unknown
    one."""
    given = dict(given)
    refuse_processing("from_pretrained", given)
    for name in ("checkpoint_index", "checkpoint_value"):
        if given.pop(name, None) is not None:
            raise ValueError(f"from_pretrained: {name} is not taken; name the checkpoint's revision with revision=.")
    if given.pop("n_devices", 1) != 1:
        raise ValueError('from_pretrained: n_devices is not taken; device_map="auto" spreads the blocks over the GPUs.')
    given.pop("move_to_device", None)
    out = {
        name: given.pop(name, None) for name in ("hf_model", "tokenizer", "default_padding_side", "default_prepend_bos")
    }
    known = ("dtype", "device", "device_map", "casts", "revision", "lora", *out, *PROCESSING)
    refuse_unknown("from_pretrained", given, known)
    return out


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
