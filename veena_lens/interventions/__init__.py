"""Interventions as data: what to edit, where, at which positions. A model applies them: `model.intervene([...])`."""

from __future__ import annotations

from veena_lens.interventions.attention import BoostAttention, KnockOutAttention, SuppressHeads
from veena_lens.interventions.base import Intervention
from veena_lens.interventions.circuit import Circuit
from veena_lens.interventions.neurons import ScaleNeurons
from veena_lens.interventions.patch import Ablate, Patch
from veena_lens.interventions.steer import Steer, SteerKeepingNorm
from veena_lens.positions import Box, Tile

__all__ = [
    "Ablate",
    "BoostAttention",
    "Box",
    "Circuit",
    "Intervention",
    "KnockOutAttention",
    "Patch",
    "ScaleNeurons",
    "Steer",
    "SteerKeepingNorm",
    "SuppressHeads",
    "Tile",
]
