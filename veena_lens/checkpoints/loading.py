"""Open a checkpoint (configuration, adapter, processor, generation settings) before any weight is read, and save one.

Saving writes a native model's weights under Hugging Face's names, bit for bit, in a folder that transformers loads.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from veena_lens.checkpoints.files import resolve_folder
from veena_lens.checkpoints.finite import dtype_of
from veena_lens.checkpoints.limits import require_config, require_files, require_processor
from veena_lens.checkpoints.quantised import as_if_float, scheme_of
from veena_lens.checkpoints.registry import all_adapters, find_adapter
from veena_lens.config import HookedVLMConfig
from veena_lens.regular_files import read_json
from veena_lens.weight_map import Adapter


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Hold an opened folder: its Hugging Face config, the adapter and the native configuration.

    `hub_id` and `revision` say where to download weights that are not in the folder yet."""

    path: Path
    hf_config: Any
    adapter: Adapter
    cfg: HookedVLMConfig
    hub_id: str | None = None
    revision: str | None = None

    def __repr__(self) -> str:
        return f"Checkpoint({self.path}, {self.adapter.architecture})"


def open_checkpoint(
    name: str | Path, *, dtype: torch.dtype | str | None = None, casts: str = "hf", revision: str | None = None
) -> Checkpoint:
    """Read a checkpoint's configuration; no weight is read or downloaded.

    name: an embedded checkpoint, a folder, or a hub id.
    dtype: of the model, or its name ("bfloat16"). None: as stored.
    casts: "hf" rounds where Hugging Face does, "none" stays in the model's dtype.
    revision: of the hub. None: the newest.

    Raises: FileNotFoundError for an unknown name; ValueError for remote code, or an architecture or field without a
    mapping."""
    kind = dtype_of(dtype)
    folder = resolve_folder(name, revision)
    hf_config, architecture = read_config(folder.path)
    adapter = find_adapter(architecture)
    scheme_of(hf_config)  # report an unsupported quantisation first
    file = folder.path / "config.json"
    try:
        cfg = adapter.read_config(as_if_float(hf_config))
    except ValueError as error:
        raise ValueError(f"{error} (read from {file})") from error
    except Exception as error:  # a value of another type than the adapter reads
        raise ValueError(f"{file} cannot be read as {architecture}: {type(error).__name__}: {error}") from error
    cfg = replace(cfg, architecture=architecture, model_name=str(name), casts=casts, dtype=kind)  # type: ignore[arg-type]
    return Checkpoint(folder.path, hf_config, adapter, cfg, folder.hub_id, folder.revision)


def read_config(folder: Path) -> tuple[Any, str]:
    """Return the Hugging Face config object and the architecture name of a folder.

    Raises: ValueError for a broken file, remote code, or a model type unknown to transformers."""
    import transformers

    file = folder / "config.json"
    raw = read_json(file)
    known = ", ".join(all_adapters())
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        automatic = raw.get("auto_map")
        if isinstance(automatic, dict) and (remote := automatic.get("AutoConfig")):
            raise ValueError(
                f"{folder} needs remote code ({remote}) for model_type {kind!r}, which is never executed. Convert the "
                f"checkpoint to one of: {known}."
            )
        raise ValueError(
            f"model_type {kind!r} of {file} is unknown to transformers {transformers.__version__}; adapters exist "
            f"for: {known}."
        )
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise ValueError(f"{file} does not name an architecture (field 'architectures'); known: {known}.")
    find_adapter(architectures[0])  # report an unknown architecture before its fields are read
    require_config(raw, str(file))
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"transformers cannot read {file}: {error}") from error
    return config, architectures[0]


def load_processor(path: str | Path) -> Any:
    """Return the checkpoint's processor, or the tokenizer of a text model; None if the folder has neither.

    Raises: ValueError for files that transformers cannot use, with the reason."""
    import transformers

    folder = Path(path)
    names = {p.name for p in folder.iterdir()}
    has_tokenizer = names & {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"}
    if not has_tokenizer:
        return None
    has_processor = names & {"processor_config.json", "preprocessor_config.json"}
    require_files(folder)
    require_processor(folder)
    kind = _image_only(folder) or transformers.AutoProcessor if has_processor else transformers.AutoTokenizer
    try:
        found = kind.from_pretrained(folder, trust_remote_code=False)
        if not any(hasattr(found, name) for name in COUNTED):
            return found
        return fill_processor(found, transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:
        what = "processor" if has_processor else "tokenizer"
        raise ValueError(f"The {what} of {folder} cannot be loaded: {error}") from error


def _image_only(folder: Path) -> Any:
    """Return a processor class without videos if the folder's class has a video part that cannot run; else None.

    The video parts need torchvision, and that of SmolVLM num2words as well."""
    from transformers.utils import is_num2words_available, is_torchvision_available

    from veena_lens.checkpoints import image_only

    missing = not is_torchvision_available()
    known = (
        {
            "LlavaOnevisionProcessor": image_only.ImageOnlyLlavaOnevisionProcessor,
            "Qwen2VLProcessor": image_only.ImageOnlyQwen2VLProcessor,
            "Qwen2_5_VLProcessor": image_only.ImageOnlyQwen2_5_VLProcessor,
            "Qwen3VLProcessor": image_only.ImageOnlyQwen3VLProcessor,
        }
        if missing
        else {}
    )
    if missing or not is_num2words_available():
        known["SmolVLMProcessor"] = image_only.ImageOnlySmolVLMProcessor
    by_model = {
        "llava_onevision": "LlavaOnevisionProcessor",
        "qwen2_vl": "Qwen2VLProcessor",
        "qwen2_5_vl": "Qwen2_5_VLProcessor",
        "qwen3_vl": "Qwen3VLProcessor",
        "smolvlm": "SmolVLMProcessor",
    }
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            name = read_json(folder / file).get("processor_class")
            if name is not None:
                return known.get(str(name))
    config = folder / "config.json"
    kind = read_json(config).get("model_type") if config.is_file() else None
    return known.get(by_model.get(str(kind), ""))


# Attributes of processors that determine how many tokens an image or tile takes.
COUNTED = ("image_seq_len", "num_image_tokens", "num_additional_image_tokens")


def fill_processor(processor: Any, config: Any) -> Any:
    """Set how many tokens an image takes from the model's configuration, and return the processor.

    Files from before transformers 4.46 lack these numbers, and later ones some of them."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return processor
    if hasattr(processor, "image_seq_len"):
        if scale := getattr(config, "scale_factor", None):
            processor.image_seq_len = (vision.image_size // vision.patch_size // scale) ** 2
        return processor
    if not hasattr(config, "vision_feature_select_strategy"):
        return processor
    further = int(vision.model_type == "clip_vision_model")
    counts = dict(vision_feature_select_strategy=config.vision_feature_select_strategy)
    if hasattr(processor, "num_image_tokens"):
        counts["num_image_tokens"] = (vision.image_size // vision.patch_size) ** 2 + further
        counts["vision_aspect_ratio"] = config.vision_aspect_ratio
    else:
        counts |= dict(patch_size=vision.patch_size, num_additional_image_tokens=further)
    for name, value in counts.items():
        setattr(processor, name, value)
    return processor


def complete_processor(processor: Any, config: Any) -> Any:
    """Return a processor in memory, with the numbers that it lacks set as for one that is loaded with its model."""
    counts = ("patch_size", "vision_feature_select_strategy", "num_image_tokens")
    lacks = any(getattr(processor, name, 0) is None for name in counts)
    return fill_processor(processor, config) if lacks else processor


def load_generation_config(path: str | Path, hf_config: Any) -> Any:
    """Return the settings of generation: generation_config.json, or else those in the model's config.

    Raises: ValueError for settings that transformers cannot use, with the reason."""
    import transformers

    file = Path(path) / "generation_config.json"
    if file.exists():
        read_json(file)
    try:
        if file.exists():
            return transformers.GenerationConfig.from_pretrained(path)
        return transformers.GenerationConfig.from_model_config(hf_config)
    except Exception as error:
        where = file if file.exists() else Path(path) / "config.json"
        raise ValueError(f"The settings of generation in {where} cannot be used: {error}") from error


def to_hf_state_dict(module: nn.Module, adapter: Adapter, cfg: HookedVLMConfig) -> dict[str, Tensor]:
    """Return the weights under the names of Hugging Face's `state_dict()`.

    A parameter that is stored alone shares storage with the model. Quantised weights are dequantised."""
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
    """Return a parameter's tensor, or a dequantised copy of a quantised weight."""
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf).detach()


def save_pretrained(model: Any, folder: str | Path, hf_config: Any) -> Path:
    """Write a folder that Hugging Face and `from_pretrained` load, and return its path.

    It has the config, the weights (in shards of 5 GB, under the names of transformers 5), the generation config and the
    processor.

    model: a native model that came from a checkpoint or a Hugging Face model.
    folder: where to write.
    hf_config: the config of that checkpoint (`open_checkpoint(...).hf_config`, or `hf_model.config`).

    Raises: ValueError for a model that did not come from a checkpoint."""
    if model.adapter is None:
        raise ValueError(
            "save_pretrained: this model came from no Hugging Face checkpoint, so its weights have no names there."
        )
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.cpu().contiguous() for k, v in to_hf_state_dict(model, model.adapter, model.cfg).items()}
    if model.cfg.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    save_torch_state_dict(tensors, path, max_shard_size="5GB")
    config = copy.deepcopy(as_if_float(hf_config))  # float weights are written
    config.architectures, config.dtype = [model.cfg.architecture], model.cfg.dtype
    config.save_pretrained(path)
    for part in (model.generation_config, model.processor):
        if part is not None:
            part.save_pretrained(path)
    return path
