"""MER-UniBench on disk: load its published layout, show its clips to a model, score answer files.

Labels and scores need numpy alone; nothing of the nine sets is part of this project. Source: Lian et al. 2025,
AffectGPT (ICML).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Public name -> the module that holds it.
_HOMES = {
    "AnswerRun": "answering",
    "answer_set": "answering",
    "Answers": "answers",
    "read_answers": "answers",
    "RootCheck": "scoring",
    "check_root": "scoring",
    "read_faces": "media",
    "Benchmark": "loading",
    "LoadedSet": "loading",
    "Sample": "loading",
    "load_benchmark": "loading",
    "load_set": "loading",
    "Seen": "media",
    "frame_places": "media",
    "see": "media",
    "BenchmarkScore": "scoring",
    "SetScore": "scoring",
    "benchmark_mean": "scoring",
    "score_answers": "scoring",
    "SETS": "data_sets",
    "SetInfo": "data_sets",
    "find_set": "data_sets",
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"veena_lens.emotion.mer_unibench.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'veena_lens.emotion.mer_unibench' has no attribute {name!r}")
