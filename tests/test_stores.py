"""Files that were cut short, or are something else, are named with what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from veena_lens.activation_cache import ActivationCache
from veena_lens.emotion import Directions
from veena_lens.interventions import Circuit, Steer
from veena_lens.scores import ReferenceRuns, Scores


def cache() -> Any:
    return ActivationCache({"blocks.0.hook_resid_post": torch.ones(1, 3, 50)})


def circuit() -> Any:
    return Circuit([Steer(layer=0, vector=torch.ones(50))])


def scores() -> Any:
    return Scores(torch.ones(50), ("layer",))


def sweep() -> Any:
    return Scores(torch.ones(2, 30), ("layer", "head"), reference=ReferenceRuns(torch.ones(1), torch.zeros(1)))


def directions() -> Any:
    two = torch.ones(2, 50)
    kept = {"norms": torch.ones(2), "neutral_mean": two, "emotional_mean": two}
    return Directions(overall=two, per_emotion=two[None], emotions=("sad",), counts={"sad": 1}, **kept)


@pytest.mark.parametrize("made", [cache, circuit, scores, sweep, directions], ids=lambda made: made.__name__)
def test_file_cut_short_is_named_with_the_remedy(made: Callable[[], Any], tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    thing = made()
    thing.save(path)
    type(thing).load(path)
    whole = path.read_bytes()
    for size in (0, 7, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"kept\.safetensors \({size:,} bytes\) .* cut short .* copy it again"):
            type(thing).load(path)
    path.write_bytes(b"PK" + whole)
    with pytest.raises(ValueError, match=r"kept\.safetensors .* another kind of file"):
        type(thing).load(path)
    with pytest.raises(FileNotFoundError, match=r"No .* at .*none\.safetensors"):
        type(thing).load(tmp_path / "none.safetensors")
