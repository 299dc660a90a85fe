"""The bundled models, loaded once, and three images with questions of unequal length."""

from __future__ import annotations

from functools import cache
from typing import Any

from veena_lens.checkpoints.files import bundled_pictures
from veena_lens.emotion.judge.side_effects import Asked

NAMES = ("tiny-llava-emotion", "tiny-qwen2vl-emotion")
QUESTIONS = ("How does this person feel?", "What do you see?", "Is this person happy or sad?")


@cache
def bundled(name: str) -> Any:
    from veena_lens import HookedVLM

    return HookedVLM.from_pretrained(name)


@cache
def examples() -> tuple[Asked, ...]:
    return tuple(Asked(picture=p.path, prompt=q) for p, q in zip(bundled_pictures()[:3], QUESTIONS, strict=True))
