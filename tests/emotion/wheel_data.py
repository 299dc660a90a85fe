"""MER-UniBench's wheels and golden scores: not part of the project, read where a checkout has them beside it."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from veena_lens.emotion.words.wheels import EmotionWheels

FOLDER = Path(__file__).parents[2].parent / "shared" / "data"
needs_original = pytest.mark.skipif(
    not (FOLDER / "mer_metric_cases.json").is_file(), reason=f"the original wheels are not at {FOLDER}"
)


@cache
def original() -> EmotionWheels:
    return EmotionWheels.from_affectgpt(FOLDER)


@cache
def golden() -> dict[str, Any]:
    return json.loads((FOLDER / "mer_metric_cases.json").read_text(encoding="utf-8"))
