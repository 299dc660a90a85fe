"""Sweeps: many patched or steered runs of one input, at the cost of what each can change.

A sweep returns `Scores`; `SweepResult` is another name of that class.
"""

from __future__ import annotations

from veena_lens.scores import Scores
from veena_lens.sweeps.generating import generation_sweep
from veena_lens.sweeps.patching import patch_sweep
from veena_lens.sweeps.steering import steer_sweep

SweepResult = Scores

__all__ = ["generation_sweep", "patch_sweep", "steer_sweep"]
