"""Circuits: which heads and neurons carry a direction, from where, how surely, and what the stream says on the way.

Names resolve on first use, so that one tool does not import the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Public name -> the module that holds it; a row a name, sorted by module.
_HOMES = {
    "attribution_patching": "attribution",
    "check_attribution": "attribution",
    "image_attribution": "attribution",
    "direct_attribution": "heads",
    "copying_strength": "heads",
    "head_intention": "heads",
    "attention_knockout": "knockout",
    "logit_lens_grid": "lens",
    "logit_lens": "lens",
    "max_activating_tokens": "neurons",
    "classify_neurons": "neurons",
    "neuron_trace": "neurons",
    "promoted_tokens": "neurons",
    "top_neurons": "neurons",
    "rank_agreement": "occlusion",
    "occlude_features": "occlusion",
    "occlude_pixels": "occlusion",
    "path_patching": "paths",
    "Probes": "probes",
    "linear_probes": "probes",
    "attention_by_source": "routing",
    "image_attention_share": "routing",
    "direct_attribution_map": "routing",
    "causal_specificity": "specificity",
    "class_means": "specificity",
    "most_selective_class": "specificity",
    "specificity_index": "specificity",
    "specificity_labels": "specificity",
    "specificity_test": "specificity",
    "benjamini_hochberg": "statistics",
    "bootstrap": "statistics",
    "significant": "statistics",
    "sign_consistency": "statistics",
    "sign_flip_test": "statistics",
    "attention_sinks": "attention_maps",
    "image_attention": "attention_maps",
    "attention_difference": "attention_maps",
    "mask_sinks": "attention_maps",
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"veena_lens.circuits.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'veena_lens.circuits' has no attribute {name!r}")
