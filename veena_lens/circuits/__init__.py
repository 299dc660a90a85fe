"""Circuits: which heads and neurons carry a direction, from where, how surely, and what the stream says on the way.

Names resolve on first use, so that one tool does not import the others.
"""

from __future__ import annotations

from veena_lens._lazy import homes_of, resolver

# Module -> its public names.
_HOMES = homes_of(
    __name__,
    {
        "attention_maps": "attention_difference attention_sinks image_attention mask_sinks",
        "attribution": "attribution_patching check_attribution image_attribution",
        "heads": "copying_strength direct_attribution head_intention",
        "knockout": "attention_knockout",
        "lens": "logit_lens logit_lens_grid",
        "neurons": "classify_neurons max_activating_tokens neuron_trace promoted_tokens top_neurons",
        "occlusion": "occlude_features occlude_pixels rank_agreement",
        "paths": "path_patching",
        "probes": "Probes linear_probes",
        "routing": "attention_by_source direct_attribution_map image_attention_share",
        "specificity": (
            "causal_specificity class_means most_selective_class specificity_index specificity_labels specificity_test"
        ),
        "statistics": "benjamini_hochberg bootstrap sign_consistency sign_flip_test significant",
    },
)
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__ = resolver(__name__, _HOMES)
