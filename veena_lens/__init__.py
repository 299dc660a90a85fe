"""veena_lens: activation caches, patching and steering for vision-language models.

Names resolve on first use, so that `import veena_lens` and light submodules cost no torch import. What most notebooks
need is here: the model, edits, sweeps, the embedded images and `plots`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from veena_lens._lazy import homes_of

if TYPE_CHECKING:
    from veena_lens.activation_cache import ActivationCache
    from veena_lens.app.view import ExplorerView
    from veena_lens.checkpoints.files import bundled_names, bundled_pairs, bundled_path, bundled_pictures
    from veena_lens.config import ConnectorConfig, HookedVLMConfig, RopeConfig, VisionConfig
    from veena_lens.inputs import MultimodalInputs
    from veena_lens.interventions import (
        Ablate,
        BoostAttention,
        Box,
        Circuit,
        Intervention,
        KnockOutAttention,
        Patch,
        ScaleNeurons,
        Steer,
        SteerKeepingNorm,
        SuppressHeads,
        Tile,
    )
    from veena_lens.model.model import HookedVLM
    from veena_lens.scores import Scores
    from veena_lens.spans import Spans
    from veena_lens.sweeps import generation_sweep, patch_sweep, steer_sweep
    from veena_lens.sweeps.metrics import logit_diff
    from veena_lens.weight_map import Adapter, WeightMap

__version__ = "0.1.0"

_HOMES = homes_of(
    __name__,
    {
        "activation_cache": "ActivationCache",
        "app.view": "ExplorerView",
        "checkpoints.files": "bundled_names bundled_pairs bundled_path bundled_pictures",
        "config": "ConnectorConfig HookedVLMConfig RopeConfig VisionConfig",
        "inputs": "MultimodalInputs",
        "interventions": "Ablate BoostAttention Box Circuit Intervention KnockOutAttention Patch ScaleNeurons Steer "
        "SteerKeepingNorm SuppressHeads Tile",
        "model.model": "HookedVLM",
        "scores": "Scores",
        "spans": "Spans",
        "sweeps": "generation_sweep patch_sweep steer_sweep",
        "sweeps.metrics": "logit_diff",
        "weight_map": "Adapter WeightMap",
    },
)
_MODULES = (
    "benchmarks", "checkpoints", "circuits", "emotion", "interventions", "plots", "positions", "sweeps", "zoo",
)  # fmt: skip
__all__ = [
    "Ablate",
    "ActivationCache",
    "Adapter",
    "BoostAttention",
    "Box",
    "Circuit",
    "ConnectorConfig",
    "ExplorerView",
    "HookedVLM",
    "HookedVLMConfig",
    "Intervention",
    "KnockOutAttention",
    "MultimodalInputs",
    "Patch",
    "RopeConfig",
    "ScaleNeurons",
    "Scores",
    "Spans",
    "Steer",
    "SteerKeepingNorm",
    "SuppressHeads",
    "Tile",
    "VisionConfig",
    "WeightMap",
    "__version__",
    "bundled_names",
    "bundled_pairs",
    "bundled_path",
    "bundled_pictures",
    "generation_sweep",
    "logit_diff",
    "patch_sweep",
    "steer_sweep",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"veena_lens.{name}")
    raise AttributeError(f"module 'veena_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
