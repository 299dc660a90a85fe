"""Adapters by architecture: found through the entry-point group `veena_lens.adapters`, ours and others' alike.

A third party adds one in its own package's metadata; an entry point that fails to import is told of when its
architecture is asked for, and does not stop the others. Imports neither torch nor transformers.
"""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from veena_lens.hook_table import near_names
from veena_lens.weight_map import Adapter

GROUP = "veena_lens.adapters"
# What this distribution registers itself, for a checkout whose metadata is not installed.
BUILT_IN = {
    "LlavaForConditionalGeneration": "model_adapters.llava:ADAPTER",
    "LlavaNextForConditionalGeneration": "model_adapters.llava_next:ADAPTER",
    "LlavaOnevisionForConditionalGeneration": "model_adapters.llava_onevision:ADAPTER",
    "Idefics3ForConditionalGeneration": "model_adapters.idefics3:ADAPTER",
    "SmolVLMForConditionalGeneration": "model_adapters.idefics3:SMOLVLM",
    "Qwen2VLForConditionalGeneration": "model_adapters.qwen2_vl:ADAPTER",
    "Qwen2_5_VLForConditionalGeneration": "model_adapters.qwen2_5_vl:ADAPTER",
    "Qwen3VLForConditionalGeneration": "model_adapters.qwen3_vl:ADAPTER",
    "Gemma3ForConditionalGeneration": "model_adapters.gemma3:ADAPTER",
    "Gemma3ForCausalLM": "model_adapters.gemma3_text:ADAPTER",
    "LlamaForCausalLM": "model_adapters.text_only:LLAMA",
    "MistralForCausalLM": "model_adapters.text_only:MISTRAL",
    "Qwen2ForCausalLM": "model_adapters.text_only:QWEN2",
    "Qwen3ForCausalLM": "model_adapters.text_only:QWEN3",
}

# Relatives of known architectures that no adapter alone can read: what the model would have to compute, by a pattern
# of the name; the first that fits is told.
_GEMMA_3N = (
    "four residual streams mixed around every block, embeddings a layer, keys and values shared between layers, sparse "
    "MLPs of nested widths, a MobileNet tower and an audio encoder"
)
WOULD_NEED = {
    "^Idefics2For": "a perceiver resampler, whose latent queries attend to a picture's patches",
    "^IdeficsFor": "gated cross-attention blocks between the decoder's own, and a perceiver resampler",
    "^AriaFor": "a mixture of experts in each decoder block, and a projector that attends",
    "Gemma3n": _GEMMA_3N,
    "Moe": "a mixture of experts in its decoder blocks: a router, and many MLPs a layer",
    "Omni|Audio": "a tower that hears: sound and its tokens beside pictures and text",
}


def _registered() -> dict[str, EntryPoint]:
    found = {name: EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}
    for point in entry_points(group=GROUP):
        if point.value.startswith("model_adapters.") and point.name in BUILT_IN:
            continue  # ours, perhaps from older metadata than this code
        found[point.name] = point
    return found


def _load(point: EntryPoint) -> Adapter:
    module, _, attribute = point.value.partition(":")
    adapter = getattr(import_module(module), attribute)
    if not isinstance(adapter, Adapter):
        raise TypeError(f"{point.value} is a {type(adapter).__name__}, not an Adapter.")
    return adapter


def find_adapter(architecture: str) -> Adapter:
    """The adapter of a Hugging Face architecture such as "LlavaForConditionalGeneration".

    Raises: ValueError for an unknown one, naming those that are known and how to add one; or for an entry
    point that does not import, with the reason."""
    points = _registered()
    if architecture not in points:
        needs = next((what for name, what in WOULD_NEED.items() if re.search(name, architecture)), None)
        raise ValueError(
            f"No adapter for architecture {architecture!r}{near_names(architecture, points)}. "
            f"{f'It would need {needs}. ' if needs else ''}Known: "
            f"{', '.join(sorted(points))}. Another package can add one through the entry-point group {GROUP!r}: "
            "see docs/adapters.md."
        )
    point = points[architecture]
    try:
        return _load(point)
    except Exception as error:
        raise ValueError(f"The adapter of {architecture!r} ({point.value}) cannot be used: {_said(error)}") from error


def all_adapters() -> dict[str, Adapter]:
    """Every adapter that imports, by architecture."""
    return {name: found for name, found in _all().items() if isinstance(found, Adapter)}


def broken_adapters() -> dict[str, str]:
    """Why the others do not, by architecture."""
    return {name: _said(found) for name, found in _all().items() if isinstance(found, Exception)}


def adapter_sources() -> dict[str, str]:
    """Where each adapter comes from: "module:attribute"."""
    return {name: point.value for name, point in sorted(_registered().items())}


def _all() -> dict[str, Adapter | Exception]:
    """Each adapter, or what stopped it."""
    out: dict[str, Adapter | Exception] = {}
    for name, point in sorted(_registered().items()):
        try:
            out[name] = _load(point)
        except Exception as error:  # another package's fault must not hide the rest
            out[name] = error
    return out


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
