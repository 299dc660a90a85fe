"""How long a run will take: from eight timed answers, or from a checkpoint's configuration alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from veena_lens.emotion import methods
from veena_lens.emotion.settings import Settings

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

N_OWN, N_BASELINES = 4, 8  # families that are tuned; of baselines about so many
DRY_TOKENS_PER_SECOND = 2.0e12  # multiply-adds a second assumed for an estimate without a run: a modest GPU


def estimate(model: HookedVLM, parts: Mapping[str, Any], settings: Settings) -> str:
    """Return in words how many answers a run will take and how long, by timing eight answers.

    Args:
        model: the model that will be studied.
        parts: pairs by the part of the run (`part_identities`).
        settings: the sizes of the run."""
    some = [p.emotional for p in list(parts["validation"])[:8]]
    methods.generate_answers(model, some[:2], max_new_tokens=2)
    began = time.perf_counter()
    methods.generate_answers(model, some, batch_size=8, max_new_tokens=settings.max_new_tokens)
    each = (time.perf_counter() - began) / max(1, len(some))
    n_conditions = 2 + len(settings.strengths)

    def bounded(n: int, most: int | None) -> int:
        return n if most is None else min(n, most)

    n_families = N_OWN + (N_BASELINES if settings.baselines else 0)
    counts = {
        "directions": 2 * bounded(len(parts["directions"]), settings.direction_pairs),
        "key layers": bounded(len(parts["mechanism"]), settings.layer_pairs)
        * 2 * model.cfg.n_layers * len(settings.alphas) // 4,
        "choosing": bounded(8 * len(parts["validation"]) // 7, settings.validation_pictures)
        * n_conditions * len(settings.ways) * len(settings.modes),
        "tuning": bounded(8 * len(parts["validation"]) // 7, settings.validation_pictures)
        * n_conditions * (n_families * settings.trials + 1),
        "test": bounded(8 * len(parts["test"]) // 7, settings.test_pictures)
        * (n_conditions * (n_families + 1) + settings.random_draws * 2 * len(settings.strengths)),
    }  # fmt: skip
    total = sum(counts.values())
    detail = ", ".join(f"{name} {n}" for name, n in counts.items())
    seconds = 1.5 * total * each  # patching takes about half as long again
    long = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
    return (
        f"Preset {settings.preset}: about {long} on this machine, {total} answers ({detail}) at {each:.3f} s each and "
        "half as long again for patching. A run that is stopped goes on where it was when it is started again."
    )


def dry_estimate(path: str, parts: Mapping[str, Any], settings: Settings, dtype: str) -> str:
    """Return in words the memory and time of a run, from a checkpoint's configuration alone.

    Args:
        path: the checkpoint; the model is built on the meta device, and no weights are read.
        parts: pairs by the part of the run (`part_identities`).
        settings: the sizes of the run.
        dtype: the name of the type of the weights, such as "bfloat16"."""
    from veena_lens.checkpoints.loading import open_checkpoint
    from veena_lens.model.model import HookedVLM

    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = HookedVLM(checkpoint.cfg)
    cfg = model.cfg
    n = sum(p.numel() for p in model.parameters())
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    prompt = 640  # tokens: an image of 576 and a question
    kv = 2 * cfg.n_layers * cfg.n_key_value_heads * cfg.d_head * size
    staircase = settings.max_rows * (4 * cfg.d_model + 2 * cfg.d_mlp) * size
    conditions = 2 + len(settings.strengths)
    n_test = len(parts["test"].examples) if settings.test_pictures is None else settings.test_pictures
    n_validation = settings.validation_pictures or len(parts["validation"].examples)
    families = N_OWN + (N_BASELINES if settings.baselines else 0)
    answers = n_validation * conditions * (families * settings.trials + 1)
    answers += n_test * (conditions * (families + 1) + 2 * settings.random_draws * len(settings.strengths))
    answers += 2 * (settings.direction_pairs or len(parts["directions"]))
    work = answers * 2.0 * n * (prompt + settings.max_new_tokens)
    gib = 2.0**30
    return "\n".join(
        [
            f"{path}: {n / 1e9:.2f} billion parameters, {cfg.n_layers} layers, {cfg.n_heads} heads",
            f"  weights, {dtype}: {n * size / gib:.1f} GiB",
            f"  keys and values of {settings.batch_size} prompts of {prompt} tokens: "
            f"{kv * prompt * settings.batch_size / gib:.1f} GiB",
            f"  rows of a sweep ({settings.max_rows}): {staircase / gib:.2f} GiB at each position",
            f"  about {answers} answers of {settings.max_new_tokens} tokens (preset {settings.preset}): "
            f"{work:.2g} multiply-adds, {work / DRY_TOKENS_PER_SECOND / 3600:.1f} hours at 2e12 a second, "
            f"{work / 1e14 / 3600:.1f} hours at 1e14 (a large GPU, batched)",
            "Nothing was loaded. The run itself times eight answers and prints a closer estimate.",
        ]
    )
