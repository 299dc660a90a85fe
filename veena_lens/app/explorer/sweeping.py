"""Patching a pair of pictures layer by layer: progress, cancelling between layers, and an estimate before the start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.app.explorer.code import program
from veena_lens.app.explorer.pictures import Shown
from veena_lens.app.explorer.state import Explorer, Session
from veena_lens.sweeps import patch_sweep
from veena_lens.sweeps.metrics import logit_diff
from veena_lens.sweeps.plan import Plan
from veena_lens.sweeps.result import SweepResult

TOGETHER = 512  # rows of a sweep that travel together unless memory asks for fewer
STEPS = 32  # a sweep of more layers takes several a step


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepAsked:
    """A pair, what is patched and where, and the two words whose logits are compared."""

    model: str
    clean: Shown
    corrupted: Shown
    prompt: str
    words: tuple[str, str]
    sites: str = "heads"
    positions: str = "last"
    direction: str = "denoising"
    max_rows: int = TOGETHER


@dataclass(frozen=True, kw_only=True, eq=False)
class Swept:
    """What is done so far: effects [layer column], NaN where nothing ran yet."""

    asked: SweepAsked
    effects: Float[Tensor, "layer column"]
    done: int
    result: SweepResult | None = None


class TooLarge(ValueError):
    """A sweep over the memory limit, and the smaller one that would fit (None: none would)."""

    def __init__(self, text: str, smaller: SweepAsked | None) -> None:
        super().__init__(text)
        self.smaller = smaller


def word_token(model: Any, word: str) -> int:
    """The first token of a word as it follows a space."""
    if not word.strip():
        raise ValueError("Name two words whose logits are compared, for example happy and neutral.")
    ids = model.tokenizer(f" {word.strip()}", add_special_tokens=False)["input_ids"]
    return int(ids[0])


def check(explorer: Explorer, asked: SweepAsked) -> Plan:
    """The sweep's plan. Raises: TooLarge, with the estimate and a smaller sweep; ValueError for one that cannot be."""
    with explorer.using(asked.model) as model:
        clean, corrupted, _ = _prepared(model, asked)
        plan = _sweep(model, clean, corrupted, asked, plan_only=True)
        limit = explorer.limits.sweep_bytes
        needed = plan.row_bytes * min(plan.n_rows, asked.max_rows)
        if needed <= limit:
            return plan
        fitting = limit // plan.row_bytes
        told = (
            f"This sweep has {plan.n_rows:,} rows and would hold about {size(needed)} at once; the limit here is "
            f"{size(limit)}."
        )
        if fitting >= 1:
            smaller = _with(asked, max_rows=int(fitting))
            raise TooLarge(f"{told} In batches of {fitting:,} rows it fits, and takes longer.", smaller)
        if asked.positions != "last":
            last = _with(asked, positions="last")
            one = _sweep(model, clean, corrupted, last, plan_only=True)
            if one.row_bytes <= limit:
                rows = int(min(one.n_rows, TOGETHER, limit // one.row_bytes))
                smaller = _with(last, max_rows=rows)
                raise TooLarge(
                    f"{told} At the last position alone it needs about {size(one.row_bytes * rows)}.", smaller
                )
        raise TooLarge(f"{told} A single row needs {size(plan.row_bytes)}: use a shorter prompt.", None)


def size(n: float | int) -> str:
    """Bytes in words."""
    for unit, scale in (("GB", 2**30), ("MB", 2**20), ("KB", 2**10)):
        if n >= scale:
            return f"{n / scale:.1f} {unit}"
    return f"{n:.0f} bytes"


def sweep(explorer: Explorer, session: Session, asked: SweepAsked) -> Iterator[Swept]:
    """The effects as they come, layer by layer from the first; the last one has the whole result.

    Whoever stops reading stops the sweep: the model is used within a step only. What was run is kept on the server, so
    the same sweep goes on where it stopped. Raises: as `check`, before anything runs."""
    check(explorer, asked)
    parts: list[SweepResult] = []
    n = 0
    while True:
        with explorer.using(asked.model) as model:
            layers = model.cfg.n_layers
            step = list(range(n, min(layers, n + max(1, layers // STEPS))))
            clean, corrupted, metric = _prepared(model, asked)
            parts.append(
                _sweep(model, clean, corrupted, asked, metric=metric, layers=step, out=explorer.folder / "sweeps")
            )
        n = step[-1] + 1
        result = joined(parts)
        found = result.scores if result.scores.ndim == 2 else result.scores[:, None]
        effects = torch.full((layers, found.shape[1]), torch.nan)
        effects[:n] = found.float().cpu()
        swept = Swept(asked=asked, effects=effects, done=n, result=result)
        session.kept["swept"] = swept
        yield swept
        if n == layers:
            return


def joined(parts: list[SweepResult]) -> SweepResult:
    """Sweeps of some layers each as one."""
    first = parts[0]
    labels = {**first.labels, "layer": [layer for part in parts for layer in part.labels["layer"]]}
    values = torch.cat([part.values for part in parts])
    return SweepResult(values, first.axes, labels, first.clean, first.corrupted, first.direction, first.meta)


def _with(asked: SweepAsked, **changed: Any) -> SweepAsked:
    return SweepAsked(**{**vars(asked), **changed})


def _prepared(model: Any, asked: SweepAsked) -> tuple[Any, Any, logit_diff]:
    clean, corrupted = (
        model.prepare(text=asked.prompt, images=shown.image) for shown in (asked.clean, asked.corrupted)
    )
    right, wrong = (word_token(model, word) for word in asked.words)
    if right == wrong:
        raise ValueError(f"{asked.words[0]!r} and {asked.words[1]!r} begin with the same token; choose other words.")
    return clean, corrupted, logit_diff(right, wrong)


def _sweep(model: Any, clean: Any, corrupted: Any, asked: SweepAsked, **settings: Any) -> Any:
    return patch_sweep(
        model,
        clean,
        corrupted,
        sites=asked.sites,
        positions=asked.positions,
        direction=asked.direction,
        max_rows=asked.max_rows,
        progress=False,
        **settings,
    )


def sweep_code(asked: SweepAsked, right: int, wrong: int) -> str:
    """The program behind the Patch tab."""
    where = f"sites={asked.sites!r}, positions={asked.positions!r}, direction={asked.direction!r}"
    body = [
        f"model = HookedVLM.from_pretrained({asked.model!r})",
        f"question = {asked.prompt!r}",
        f"clean = model.prepare(text=question, images={asked.clean.code})",
        f"corrupted = model.prepare(text=question, images={asked.corrupted.code})",
        f"metric = logit_diff({right}, {wrong})  # {asked.words[0]!r} against {asked.words[1]!r}",
        f"result = patch_sweep(model, clean, corrupted, {where}, metric=metric)",
        "print(result.top(10))",
        'plots.save(result.plot(), "patching.png")',
    ]
    imports = [
        "from veena_lens import HookedVLM, plots",
        "from veena_lens.sweeps import patch_sweep",
        "from veena_lens.sweeps.metrics import logit_diff",
    ]
    return program(imports, body, [asked.clean, asked.corrupted])


def export_sweep(session: Session) -> list[str]:
    """The sweep so far as a picture, a table and its own file. Raises: ValueError before one ran."""
    from veena_lens import plots

    swept: Swept = session.need("swept", "Run a sweep first; then there is something to export.")
    assert swept.result is not None
    frame = swept.result.to_frame()
    frame.to_csv(session.folder / "patching.csv", index=False)
    frame.to_parquet(session.folder / "patching.parquet", index=False)
    figure = plots.save(swept.result.plot(), session.folder / "patching.png")
    own = swept.result.save(session.folder / "patching.safetensors")
    return [str(f) for f in (figure, session.folder / "patching.csv", session.folder / "patching.parquet", own)]
