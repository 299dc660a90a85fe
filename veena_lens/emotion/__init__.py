"""VEENA: locate the emotion circuit, enhance it, and judge it honestly (Zhang et al. 2026, arXiv 2605.21980).

Names resolve on first use, so that one tool does not import the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Public name -> the module that holds it; a row a name, sorted by module.
_HOMES = {
    "conditions": "contexts",
    "context_sentence": "contexts",
    "RandomUnits": "controls",
    "neuron_sizes": "controls",
    "random_directions": "controls",
    "random_heads": "controls",
    "random_neurons": "controls",
    "noise_directions": "direction_controls",
    "person_directions": "direction_controls",
    "shuffled_directions": "direction_controls",
    "swapped_directions": "direction_controls",
    "Directions": "directions",
    "TooFewPairs": "directions",
    "directions_from": "directions",
    "extract_directions": "directions",
    "select_pairs": "directions",
    "extract": "extraction",
    "string_to_list": "extraction",
    "Judge": "judge",
    "Lexicon": "lexicon",
    "Wheel": "mapping",
    "Method": "methods",
    "answers": "methods",
    "next_logits": "methods",
    "hit_rate": "metrics",
    "open_vocabulary_score": "metrics",
    "sample_hit": "metrics",
    "sample_hits": "metrics",
    "sentiment_score": "metrics",
    "token_hit_rate": "metrics",
    "Example": "pairs",
    "Pair": "pairs",
    "PairProblems": "pairs",
    "PairSet": "pairs",
    "load_pairs": "pairs",
    "pairs_from_dataset": "pairs",
    "pairs_from_folders": "pairs",
    "pairs_from_records": "pairs",
    "save_pairs": "pairs",
    "write_manifest": "pairs",
    "Family": "rivals",
    "adaptvis": "rivals",
    "families": "rivals",
    "pai": "rivals",
    "plain_steering": "rivals",
    "prompt_only": "rivals",
    "scalingvis": "rivals",
    "spin": "rivals",
    "vaf": "rivals",
    "vcd": "rivals",
    "vista": "rivals",
    "visual_directions": "rivals",
    "Asked": "side_effects",
    "SideEffects": "side_effects",
    "attribute_accuracy": "side_effects",
    "described_accuracy": "side_effects",
    "drift": "side_effects",
    "latency_ratio": "side_effects",
    "measure_side_effects": "side_effects",
    "perplexity": "side_effects",
    "EmotionWheels": "wheels",
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"veena_lens.emotion.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'veena_lens.emotion' has no attribute {name!r}")
