"""veena_lens: activation caches, patching and steering for vision-language models.

Names resolve on first use, so that `import veena_lens` and light submodules cost no torch import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veena_lens.activation_cache import ActivationCache
    from veena_lens.config import ConnectorConfig, HookedVLMConfig, RopeConfig, VisionConfig
    from veena_lens.inputs import MultimodalInputs
    from veena_lens.model.model import HookedVLM
    from veena_lens.scores import Scores
    from veena_lens.spans import Spans
    from veena_lens.weight_map import Adapter, WeightMap

__version__ = "0.1.0"

_HOMES = {
    "HookedVLM": "veena_lens.model.model",
    "ActivationCache": "veena_lens.activation_cache",
    "MultimodalInputs": "veena_lens.inputs",
    "Spans": "veena_lens.spans",
    "Scores": "veena_lens.scores",
    "HookedVLMConfig": "veena_lens.config",
    "VisionConfig": "veena_lens.config",
    "ConnectorConfig": "veena_lens.config",
    "RopeConfig": "veena_lens.config",
    "Adapter": "veena_lens.weight_map",
    "WeightMap": "veena_lens.weight_map",
}
_MODULES = ("benchmarks", "checkpoints", "interventions", "plots", "positions", "sweeps", "zoo")
__all__ = [
    "ActivationCache",
    "Adapter",
    "ConnectorConfig",
    "HookedVLM",
    "HookedVLMConfig",
    "MultimodalInputs",
    "RopeConfig",
    "Scores",
    "Spans",
    "VisionConfig",
    "WeightMap",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"veena_lens.{name}")
    raise AttributeError(f"module 'veena_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
