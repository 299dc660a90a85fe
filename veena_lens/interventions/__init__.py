"""Interventions as data: what to edit, where, at which positions. A model applies them: `model.intervene([...])`."""

from __future__ import annotations

from veena_lens.interventions.base import Intervention
from veena_lens.interventions.steer import Steer

__all__ = ["Intervention", "Steer"]
