"""A sweep that was killed goes on in another process, and only where it is the same sweep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, time, torch
from tests.cases import BY_NAME, counted, native_model, raw_inputs
from veena_lens.sweeps import patch_sweep
from veena_lens.sweeps import engine as running
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
