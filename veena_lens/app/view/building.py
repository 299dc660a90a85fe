"""The steps from a run or a cache to a view's header and arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from veena_lens.activation_cache import ActivationCache
from veena_lens.app.view.opening import content_place
from veena_lens.app.view.panels import Panel, lens_of, norms_of, panels_of, resid_names, words_of
from veena_lens.app.view.rows import CachedRows, Rows, cached_sinks, sink_queries
from veena_lens.circuits import attention_sinks
from veena_lens.images.files import open_image
from veena_lens.inputs import MultimodalInputs
from veena_lens.plots import theme

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

ENTERING = ("hook_embed", "blocks.0.hook_resid_pre")


def prepared(model: HookedVLM, source: Any, pictures: Any) -> tuple[MultimodalInputs, list[Image.Image] | None]:
    """Prepare inputs of one row; return them with its images. Raises: ValueError for several rows."""
    if isinstance(source, MultimodalInputs):
        if len(source) != 1:
            raise ValueError(f"A view shows one row; these inputs have {len(source)}. Choose one: inputs[0].")
        return model.as_inputs(source), None if pictures is None else [open_image(p) for p in pictures]
    try:
        shown, prompt = source
    except (TypeError, ValueError):
        raise ValueError(
            f"from_run takes prepared inputs, or (image or images, prompt), not {type(source).__name__}."
        ) from None
    found = [open_image(p) for p in (shown if isinstance(shown, (list, tuple)) else [shown])]
    return model.prepare(text=prompt, images=found), found


def twin_of(
    model: HookedVLM, inputs: MultimodalInputs, other: Any, pictures: Any, prompt: str | None
) -> tuple[MultimodalInputs, list[Image.Image] | None]:
    """Prepare the second run: other images under the same text and answer.

    Raises: ValueError where grids or text differ, for nothing is resampled."""
    if isinstance(other, MultimodalInputs):
        twin, found = prepared(model, other, pictures)
    else:
        found = [open_image(p) for p in (other if isinstance(other, (list, tuple)) else [other])]
        twin = _asked_again(model, inputs, found) if prompt is None else model.prepare(text=prompt, images=found)
    answer = inputs.spans[0].answer
    if answer is not None and twin.spans[0].answer is None:
        twin = twin.with_answer([inputs.tokens[0, answer].tolist()])
    if twin.grids != inputs.grids or not torch.equal(twin.tokens, inputs.tokens):
        raise ValueError(
            f"The second image's grids are {list(twin.grids[0])}, the first's {list(inputs.grids[0])}, or their text "
            "differs: only runs with the same cells and the same tokens compare cell by cell. Resize it to the first."
        )
    return twin, found


def _asked_again(model: HookedVLM, inputs: MultimodalInputs, pictures: list[Image.Image]) -> MultimodalInputs:
    """Prepare the prompt of prepared inputs with other images: every image's tokens become one image token again."""
    if model.tokenizer is None:
        raise ValueError("A second image needs the model's processor; give other= as prepared inputs.")
    spans, kept = inputs.spans[0], inputs.attention_mask[0].clone()
    kept[spans.last + 1 :] = False
    for span in spans.images:
        kept[span.start + 1 : span.stop] = False
    text = model.tokenizer.decode(inputs.tokens[0, kept].tolist(), skip_special_tokens=False)
    return model.prepare(text=text, images=pictures, chat=False)


def modes_of(modes: Sequence[str] | None, known: Sequence[str], has_other: bool, has_directions: bool) -> list[str]:
    """Return the modes that are asked for, or all.

    Raises: ValueError for an unknown one, or one that lacks what it needs."""
    lacks = {"difference": not has_other, "push": not has_directions}
    if modes is None:
        return [mode for mode in known if not lacks.get(mode, False)]
    for mode in modes:
        if mode not in known:
            raise ValueError(f"Unknown mode {mode!r}; there are: {', '.join(known)}.")
        if lacks.get(mode, False):
            need = "other=, a second image" if mode == "difference" else "directions="
            raise ValueError(f"The mode {mode!r} needs {need}.")
    return [mode for mode in known if mode in modes]


def name_of(model: HookedVLM) -> str:
    """Return what to call a model on a page."""
    return str(model.cfg.model_name).rstrip("/").rsplit("/", 1)[-1] or model.cfg.architecture or "model"


def require_own_cache(cache: ActivationCache, model: HookedVLM | None) -> None:
    """Check that a cache is the model's. Raises: ValueError for another shape, other tokens or other embeddings."""
    if model is None:
        return
    found: dict[str, int] = {"layers": cache._n_layers()}
    for name, value in cache.cache_dict.items():
        if name.endswith("hook_resid_post") and name.startswith("blocks."):
            found["d_model"] = value.shape[-1]
        elif name.startswith("blocks.") and name.endswith("attn.hook_pattern"):
            found["heads"] = value.shape[-3]
    wanted = {"layers": model.cfg.n_layers, "d_model": model.cfg.d_model, "heads": model.cfg.n_heads}
    wrong = [f"{what} {n} (the model: {wanted[what]})" for what, n in found.items() if n != wanted[what]]
    if cache.inputs is not None:
        wrong += _other_words(cache, cache.inputs, model)
    if wrong:
        raise ValueError(
            f"This cache is of another model than {name_of(model)}: it has {', '.join(wrong)}. Open it without "
            "a model, or with the one that made it."
        )


def _other_words(cache: ActivationCache, inputs: MultimodalInputs, model: HookedVLM) -> list[str]:
    """Return what of a cache's tokens cannot come from the model."""
    top, own = int(inputs.tokens.max()), model.cfg.image_token_id
    if top >= model.cfg.d_vocab:
        return [f"a token {top} (the model's vocabulary: {model.cfg.d_vocab})"]
    if None not in (own, inputs.image_token_id) and own != inputs.image_token_id:
        return [f"the image token {inputs.image_token_id} (the model: {own})"]
    entering = next((cache.cache_dict[n] for n in ENTERING if n in cache.cache_dict), None)
    if entering is None:
        return []
    text = inputs.attention_mask & ~inputs.image_mask
    found = (entering if cache.has_batch_dim else entering[None])[text]
    wanted = model.embed(inputs.tokens[text][None].to(model.cfg.device))[0].detach().to(found)
    # An edit may have changed some of them, another model's embedding changes all.
    is_same = torch.isclose(found, wanted, rtol=1e-2, atol=1e-3).all(-1)
    return [] if bool(is_same.any()) else ["other embeddings of its tokens (the model: those of its weights)"]


def within(max_bytes: int, n_queries: int, n_layers: int, n_heads: int, length: int) -> int:
    """Return how many tokens, at least one, can have every head's map in a budget; the others have the mean."""
    mean = n_layers * (length + 8)
    whole = n_heads * mean
    left = max_bytes - n_queries * mean
    return max(1, min(n_queries, left // max(1, whole - mean)))


@dataclass(kw_only=True, eq=False)
class Parts:
    """Collects a view's header and arrays."""

    inputs: MultimodalInputs
    pictures: Sequence[Image.Image] | None
    model: HookedVLM | None
    modes: list[str]
    second: tuple[MultimodalInputs, Sequence[Image.Image] | None] | None = None
    texts: Sequence[str] | None = None
    header: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokenizer = getattr(self.model, "tokenizer", None)

    def queries(self) -> list[int]:
        """Return text positions, the most informative first: that where the view opens, last, answer, query backwards,
        the rest; and at the end those within images that predict a token of text."""
        spans, text = self.inputs.spans[0], self.inputs.attention_mask[0] & ~self.inputs.image_mask[0]
        there = text.nonzero().flatten().tolist()
        answer = range(0) if spans.answer is None else range(spans.answer.start, spans.answer.stop)
        query = range(spans.query.stop - 1, spans.query.start - 1, -1)
        order = dict.fromkeys([self.opening(), spans.last, *answer, *query, *there])
        predicting = [p - 1 for p in there if p and bool(self.inputs.image_mask[0, p - 1])]
        return [p for p in order if p in set(there)] + predicting

    def opening(self) -> int:
        """Return the position that predicts the answer's content word; without an answer the prompt's last."""
        spans = self.inputs.spans[0]
        if spans.answer is None or (self.texts is None and self.tokenizer is None):
            return spans.last
        at = content_place([self._text(p) for p in range(spans.answer.start, spans.answer.stop)])
        return spans.last if at is None else spans.answer.start + at - 1

    def measure_run(self, model: HookedVLM, words: Sequence[str | int] | None) -> None:
        """Measure sinks, norms and lens, from one run of the model."""
        if "sinks" in self.modes:
            found = attention_sinks(model, self.inputs, sink_queries(self.inputs.attention_mask[0])).meta["positions"]
            self.header["sinks"] = [found[str(layer)][0] for layer in range(model.cfg.n_layers)]
        if not {"lens", "norms"} & set(self.modes):
            return
        with torch.no_grad():
            names = resid_names(model.cfg.n_layers)
            logits, cache = model.run_with_cache(self.inputs, names_filter=names)
        self._measure_residuals(cache, words, logits[0])

    def measure_cache(self, cache: ActivationCache, rows: CachedRows, words: Sequence[str | int] | None) -> None:
        """Measure the same from what a cache holds; modes that it cannot give are dropped."""
        n = rows.n_layers
        entering = norms_of(cache, 0, n, "hook_resid_pre")
        if entering is None:
            leaving = norms_of(cache, 0, n, "hook_resid_post")
            if leaving is not None:  # what leaves a layer enters the next; of the first nothing is known
                entering = torch.cat([torch.zeros_like(leaving[:1]), leaving[:-1]])
        if "sinks" in self.modes and entering is not None:
            self.header["sinks"] = cached_sinks(rows, entering, self.inputs.attention_mask[0].cpu())
        logits = None
        if self.model is not None and f"blocks.{n - 1}.hook_resid_post" in cache.cache_dict:
            last = cache.cache_dict[f"blocks.{n - 1}.hook_resid_post"]
            with torch.no_grad():
                logits = self.model.unembed_resid(last if cache.has_batch_dim else last[None])[0]
        self._measure_residuals(cache, words, logits)
        has = {"sinks": "sinks" in self.header, "lens": "lens" in self.header, "norms": "norms" in self.arrays}
        self.modes = [mode for mode in self.modes if has.get(mode, True)]

    def _measure_residuals(self, cache: ActivationCache, words: Sequence[str | int] | None, logits: Any) -> None:
        norms = norms_of(cache, 0, cache._n_layers(), "hook_resid_post")
        if norms is None:
            return
        if "norms" in self.modes:
            self.arrays["norms"] = norms.numpy()
        if "lens" in self.modes and self.model is not None:
            chosen = words_of(self.model, self.inputs, 0, logits) if words is None else words
            self.header["lens"], arrays = lens_of(self.model, cache, self.inputs, 0, chosen)
            self.arrays |= arrays

    def finished(
        self, rows: Rows, queries: list[int], directions: list[str], title: str
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return header and arrays."""
        panels = [(0, panel) for panel in panels_of(self.inputs, 0, self.pictures)]
        if self.second is not None:
            panels += [(1, panel) for panel in panels_of(self.second[0], 0, self.second[1])]
        self.arrays["is_image"] = self.inputs.image_mask[0].cpu().to(torch.uint8).numpy()
        header = {
            **self.header,
            "title": title,
            "layers": rows.n_layers,
            "heads": rows.n_heads,
            "positions": self.inputs.shape[1],
            "modes": self.modes,
            "directions": directions,
            "query": queries[0],
            "tokens": self._tokens(),
            "panels": [self._panel(i, run, panel) for i, (run, panel) in enumerate(panels)],
            "colours": colours(),
        }
        return header, self.arrays

    def _panel(self, number: int, run: int, panel: Panel) -> dict[str, Any]:
        self.arrays[f"boxes{number}"] = panel.boxes.float().numpy()
        self.arrays[f"cells{number}"] = panel.positions.to(torch.int32).numpy()
        kept = {name: getattr(panel, name) for name in ("image", "name", "width", "height", "grid", "source")}
        return {**kept, "run": run, "boxes": f"boxes{number}", "cells": f"cells{number}"}

    def _tokens(self) -> list[dict[str, Any]]:
        """Return the strip: one entry per token of text, and one for all tokens of an image."""
        inputs, spans = self.inputs, self.inputs.spans[0]
        image_of = {p: i for i, s in enumerate(spans.images) for p in range(s.start, s.stop)}
        answer = range(0) if spans.answer is None else range(spans.answer.start, spans.answer.stop)
        out: list[dict[str, Any]] = []
        for p in inputs.attention_mask[0].nonzero().flatten().tolist():
            image = image_of.get(p)
            if image is not None:
                if not out or out[-1].get("image") != image:
                    out.append({"image": image, "n": 0})
                out[-1]["n"] += 1
                continue
            out.append({"at": p, "text": self._text(p), "part": "answer" if p in answer else "prompt"})
        return out

    def _text(self, position: int) -> str:
        if self.texts is not None:
            return self.texts[position]
        token = int(self.inputs.tokens[0, position])
        return f"#{token}" if self.tokenizer is None else self.tokenizer.decode([token])


def colours() -> dict[str, list[str]]:
    """Return the figures' colour maps, 256 steps each, for the page to look up."""
    import matplotlib

    def steps(name: str) -> list[str]:
        from matplotlib.colors import to_hex

        return [to_hex(matplotlib.colormaps[name](i)) for i in range(256)]

    return {"cells": steps(theme.UNSIGNED), "signed": steps(theme.SIGNED), "picture": steps(theme.ON_PICTURE)}
