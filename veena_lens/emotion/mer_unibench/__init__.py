"""Work with MER-UniBench on disk: load its published layout, show its clips to a model, score answer files.

Labels and scores need numpy alone; nothing of the nine sets is part of this project. Source: Lian et al. 2025,
AffectGPT (ICML).
"""

from __future__ import annotations

from veena_lens._lazy import homes_of, resolver

# Module -> its public names.
_HOMES = homes_of(
    __name__,
    {
        "answering": "AnswerRun answer_set",
        "answers": "Answers read_answers",
        "data_sets": "SETS SetInfo find_set",
        "loading": "Benchmark LoadedSet Sample load_benchmark load_set",
        "media": "Seen frame_places read_faces see",
        "scoring": "BenchmarkScore RootCheck SetScore benchmark_mean check_root score_answers",
    },
)
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__ = resolver(__name__, _HOMES)
