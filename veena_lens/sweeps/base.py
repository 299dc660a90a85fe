"""The run that rows of a sweep leave: what it computed, kept so that they need not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veena_lens.inputs import MultimodalInputs
from veena_lens.sweeps.rows import BaseRun
from veena_lens.sweeps.tower import names_to_keep, seen_pictures


@torch.no_grad()
def base_run(
    model: Any, inputs: MultimodalInputs, sites: Sequence[str] = (), on_pictures: Sequence[str] = ()
) -> BaseRun:
    """Run once and keep what rows (`on_pictures`: those that edit tower or connector) and metrics (`sites`) need.

    Images are encoded here, and again only where an edit changes them, from there on."""
    n = model.cfg.n_layers
    names = {f"blocks.{i}.{part}" for i in range(n) for part in ("hook_resid_pre", "attn.hook_rot_k", "attn.hook_v")}
    names |= set(sites)
    inner = [f"deepstack.{i}.hook_out" for i in range(model.cfg.n_deepstack) if inputs.pixel_values is not None]
    again = names_to_keep(model, on_pictures) if on_pictures else {}
    names |= {*inner, *again.values()}
    logits, cache = model.run_with_cache(inputs, names_filter=sorted(names))

    def layers(part: str) -> list[Tensor]:
        return [cache[f"blocks.{i}.{part}"][0] for i in range(n)]

    return BaseRun(
        inputs,
        layers("hook_resid_pre"),
        layers("attn.hook_rot_k"),
        layers("attn.hook_v"),
        logits[0, -1],
        {site: cache[site][0] for site in sites},
        {i + 1: model.scatter_deepstack(cache[name], inputs) for i, name in enumerate(inner)},
        seen_pictures(model, {key: cache[name] for key, name in again.items()}) if again else None,
    )
