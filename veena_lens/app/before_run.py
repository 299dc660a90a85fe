"""What `veena-lens run` does before it works: check the options, and say what the run will take.

Only light modules are imported here, so that `--dry-run` answers within seconds on any model.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veena_lens.checkpoints.files import resolve_folder
from veena_lens.emotion.estimates import dry_estimate
from veena_lens.emotion.pairs.loading import load_pairs
from veena_lens.emotion.pairs.parts import part_identities
from veena_lens.emotion.settings import Settings, settings_for

if TYPE_CHECKING:
    from veena_lens.emotion.pairs.pair_set import PairSet

DRAWN_STYLES = ("avataaars", "open-peeps", "micah", "emoji")  # images whose attributes are known


def checked_run(
    model: str,
    pairs: str | None,
    out: str,
    *,
    preset_name: str = "quick",
    dtype: str | None = None,
    device: str | None = None,
    seed: int | None = None,
    question: str | None = None,
    skip_unreadable: bool = False,
) -> tuple[PairSet, Settings]:
    """Return the pairs and settings of a run, after a look at every option: nothing is loaded, nothing written.

    model .. skip_unreadable: as `commands.run_command` takes them.
    Raises: ValueError for an unknown preset or dtype, a device that this machine lacks, pairs that cannot be parted;
    FileNotFoundError without that checkpoint or those pairs; NotADirectoryError or PermissionError for a folder that
    nothing can be written to; ImportError without scikit-learn."""
    from veena_lens import checkpoints

    settings_for(preset_name, seed, question)
    checkpoints.dtype_of(dtype)
    checkpoints.device_of(device)
    require_writable(out)
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError("A run fits linear probes with scikit-learn; install it: pip install 'veena-lens[demo]'.")
    if not checkpoints.is_lora_folder(model):
        resolve_folder(model)
    found = load_pairs(pairs, unreadable="skip" if skip_unreadable else "error")
    return found, settings_for(preset_name, seed, question, **drawn_questions(found))


def dry_run(model: str, pairs: str | None, out: str, **options: Any) -> str:
    """Return the estimate of a run's memory and time; the options are checked as the run checks them.

    model, pairs, out, options: as `checked_run` takes them."""
    found, settings = checked_run(model, pairs, out, **options)
    parts = part_identities(found, settings)
    return dry_estimate(model, parts, settings, options.get("dtype"), options.get("device"))


def require_writable(out: str | Path) -> None:
    """Require a folder that can be written, or made. Raises: NotADirectoryError; PermissionError."""
    folder = Path(out).expanduser().absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"--out {out}: {there} is a file; name a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out}: nothing can be written in {there}; name another folder.")


def drawn_questions(pairs: PairSet) -> dict[str, Any]:
    """Return questions about the attributes of drawn people, as `settings_for` takes them; none for other images."""
    from veena_lens.zoo.captions import ATTRIBUTE_QUESTIONS, EMOTION_QUESTIONS

    if any(e.style not in DRAWN_STYLES for e in pairs.examples):
        return {}
    return {
        "questions": {name: ATTRIBUTE_QUESTIONS[name][0] for name in ("hair", "background", "glasses")},
        "describe": EMOTION_QUESTIONS["caption"][0],
        "templates": {"hair": ["{} hair"], "background": ["{} background"]},
    }
