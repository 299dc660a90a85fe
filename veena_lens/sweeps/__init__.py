"""Sweeps: many patched or steered runs of one input, at the cost of what each can change."""

from __future__ import annotations

from veena_lens.sweeps.generating import GenerationSweep, generation_sweep
from veena_lens.sweeps.patching import patch_sweep
from veena_lens.sweeps.result import SweepResult
from veena_lens.sweeps.steering import steer_sweep

__all__ = ["GenerationSweep", "SweepResult", "generation_sweep", "patch_sweep", "steer_sweep"]
