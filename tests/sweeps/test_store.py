"""A sweep that was killed goes on in another process, and only where it is the same sweep."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import BY_NAME, native_model, raw_inputs
from veena_lens.interventions import Steer
from veena_lens.sweeps import patch_sweep

SCRIPT = """
import sys, time, torch
from tests.cases import BY_NAME, counted, native_model, raw_inputs
from veena_lens.sweeps import patch_sweep
from veena_lens.sweeps import engine
from veena_lens.sweeps.metrics import logit_diff
torch.set_num_threads(1)
model = native_model(BY_NAME["clip-llama"], casts="none")
torch.manual_seed(3)
raw = counted(raw_inputs(BY_NAME["clip-llama"]))
clean, corrupted = (model.inputs_from_hf(**dict(raw, pixel_values=s * raw["pixel_values"])) for s in (1, -1))
scale, calls, real = 2.0, [], engine.run_staircase
def slow(*args):
    calls.append(1)
    if sys.argv[2] == "dies" and len(calls) == 3:
        print("half", flush=True)
        time.sleep(60)
    return real(*args)
engine.run_staircase = slow
metrics = {"difference": logit_diff(5, 6), "own": lambda logits: scale * logits[:, 7]}
kw = dict(positions="query", metric=metrics, progress=False, max_rows=4)
kept = patch_sweep(model, clean, corrupted, **kw, out=sys.argv[1])
n_kept = len(calls)
fresh = patch_sweep(model, clean, corrupted, **kw)
same = all(torch.equal(kept[name].values, fresh[name].values) for name in metrics)
print(n_kept, len(calls) - n_kept, same, bool(fresh["own"].scores.abs().max() > 0), flush=True)
"""


def run(folder: Path, how: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "random"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), how], stdout=subprocess.PIPE, text=True, env=env
    )


@pytest.mark.slow
def test_a_killed_sweep_goes_on_in_another_process(tmp_path: Path) -> None:
    with run(tmp_path, "dies") as first:
        assert first.stdout is not None and first.stdout.readline().strip() == "half"
        first.send_signal(signal.SIGKILL)
    kept = list(tmp_path.rglob("*.safetensors"))
    assert len(kept) == 2
    written = {path: path.stat().st_mtime_ns for path in kept}
    n_again, n_fresh, same, acts = run(tmp_path, "lives").communicate()[0].split()
    assert int(n_again) == int(n_fresh) - 2, "what was kept ran again"
    assert (same, acts) == ("True", "True")
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())


SCALE = 1.0


def scaled(logits: Any) -> Any:
    return SCALE * (logits[:, 5] - logits[:, 6])


class Slotted:
    __slots__ = ("token",)

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, logits: Any) -> Any:
        return logits[:, self.token]


@pytest.fixture
def swept(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that sweeps with a kept folder, and checks that the result is that of a fresh sweep."""
    model = native_model(BY_NAME["rope-llama3"])
    raw = raw_inputs(BY_NAME["rope-llama3"])
    clean, corrupted = (model.inputs_from_hf(**dict(raw, pixel_values=s * raw["pixel_values"])) for s in (1, -1))
    kw: dict[str, Any] = {"positions": "last", "progress": False, "sites": "attn_out"}

    def run(metric: Any = scaled, on: Any = clean, **more: Any) -> Any:
        found = patch_sweep(model, on, corrupted, metric=metric, **kw, **more, out=tmp_path)
        fresh = patch_sweep(model, on, corrupted, metric=metric, **kw, **more)
        assert torch.equal(found.values, fresh.values) and torch.equal(found.clean, fresh.clean)
        return found.values

    run.model, run.clean = model, clean  # type: ignore[attr-defined]
    return run


def test_kept_results_of_another_model_are_not_taken(swept: Any) -> None:
    model = swept.model
    before = [swept()]
    for name, index in (
        ("blocks.0.mlp.down.weight", (slice(None), 3)),  # what one neuron writes
        ("blocks.1.attn.o.weight", (slice(None), slice(0, 2))),
        ("unembed.weight", (5,)),
    ):
        model.get_parameter(name).data[index] += 0.5
        before.append(swept())
    with model.intervene([Steer(1, torch.ones(model.cfg.d_model), 3.0)]):
        before.append(swept(engine="naive"))
    with model.hooks([("blocks.1.hook_resid_post", lambda tensor, hook: 2 * tensor)]):
        before.append(swept(engine="naive"))
    before.append(swept(engine="naive"))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(before))


def test_kept_results_of_other_inputs_are_not_taken(swept: Any) -> None:
    clean = swept.clean
    before = [swept()]
    mask = clean.attention_mask.clone()
    mask[:, 1] = False
    moved = dataclasses.replace(clean, position_ids=2 * clean.position_ids)
    for other in (moved, dataclasses.replace(clean, attention_mask=mask)):
        before.append(swept(on=other))
    assert len({str(values.tolist()) for values in before}) == 3


def test_kept_results_of_another_metric_are_not_taken(swept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [swept(), swept(Slotted(5)), swept(Slotted(6))]
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 2.0)
    before.append(swept())
    assert len({str(values.tolist()) for values in before}) == 4


def test_a_metric_whose_content_cannot_be_told_is_refused_before_anything_runs(swept: Any, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:

        def logged(logits: Any) -> Any:
            file.write("measured\n")
            return logits[:, 5]

        with pytest.raises(ValueError, match="cannot be told. Give it an attribute `fingerprint`"):
            swept(logged)
        logged.fingerprint = "logit of token 5"  # type: ignore[attr-defined]
        swept(logged)
