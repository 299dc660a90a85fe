"""Opening a checkpoint: configuration, adapter, processor and generation settings, before any weight is read."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from veena_lens.checkpoints.files import resolve_folder
from veena_lens.checkpoints.registry import all_adapters, find_adapter
from veena_lens.config import HookedVLMConfig
from veena_lens.weight_map import Adapter


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A folder that was understood: its Hugging Face config, the adapter and the native configuration."""

    path: Path
    hf_config: Any
    adapter: Adapter
    cfg: HookedVLMConfig

    def __repr__(self) -> str:
        return f"Checkpoint({self.path}, {self.adapter.architecture})"


def open_checkpoint(
    name: str | Path, *, dtype: torch.dtype | None = None, casts: str = "hf", revision: str | None = None
) -> Checkpoint:
    """Read a checkpoint's configuration; no weight is touched.

    Raises: FileNotFoundError; ValueError for remote code, or an architecture or value without a mapping."""
    folder = resolve_folder(name, revision)
    hf_config, architecture = read_config(folder)
    adapter = find_adapter(architecture)
    cfg = adapter.read_config(hf_config)
    cfg = replace(cfg, architecture=architecture, model_name=str(name), casts=casts, dtype=dtype)  # type: ignore[arg-type]
    return Checkpoint(folder, hf_config, adapter, cfg)


def read_config(folder: Path) -> tuple[Any, str]:
    """(Hugging Face config object, architecture name) of a folder.

    Raises: ValueError for remote code, or a model type that transformers does not know."""
    import transformers

    raw = json.loads((folder / "config.json").read_text())
    if "AutoConfig" in raw.get("auto_map", {}):
        raise ValueError(
            f"{folder} asks for remote code ({raw['auto_map']['AutoConfig']}), which is never run. Convert the "
            f"checkpoint to one of: {', '.join(all_adapters())}."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"model_type {raw.get('model_type')!r} of {folder} is unknown to transformers {transformers.__version__}; "
            f"adapters exist for: {', '.join(all_adapters())}."
        ) from error
    architectures = getattr(config, "architectures", None) or raw.get("architectures") or []
    if not architectures:
        raise ValueError(f"{folder / 'config.json'} names no architecture; known: {', '.join(all_adapters())}.")
    return config, architectures[0]


def load_processor(path: str | Path) -> Any:
    """The checkpoint's own processor; its tokenizer for a text model; None where the folder has neither."""
    import transformers

    folder = Path(path)
    names = {p.name for p in folder.iterdir()}
    has_tokenizer = names & {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"}
    if not has_tokenizer:
        return None
    if names & {"processor_config.json", "preprocessor_config.json"}:
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        return fill_processor(processor, folder)
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def fill_processor(processor: Any, folder: Path) -> Any:
    """Copies of the hub from before transformers 4.46 leave out what counts image tokens: take it from config.json."""
    if not hasattr(processor, "patch_size") or processor.patch_size is not None:
        return processor
    config, _ = read_config(folder)
    vision = getattr(config, "vision_config", None)
    if vision is not None:
        processor.patch_size = vision.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = int(vision.model_type == "clip_vision_model")
    return processor


def load_generation_config(path: str | Path, hf_config: Any) -> Any:
    """The folder's generation_config.json, or what the model's config says of generation."""
    import transformers

    if (Path(path) / "generation_config.json").is_file():
        return transformers.GenerationConfig.from_pretrained(path)
    return transformers.GenerationConfig.from_model_config(hf_config)
