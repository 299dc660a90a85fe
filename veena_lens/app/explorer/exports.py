"""What a tab exports: files that say themselves which model, question and answer, layer and head they are of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veena_lens import __version__
from veena_lens.app.view import save_cache
from veena_lens.app.view.opening import MEAN, head_name
from veena_lens.app.view.shown import shown_map

if TYPE_CHECKING:
    import gradio as gr
    import pandas as pd
    from matplotlib.figure import Figure

    from veena_lens.app.explorer.look import Question
    from veena_lens.app.explorer.state import Explorer, Session
    from veena_lens.app.view import ExplorerView

NUMBERS = ("query", "layer", "head", "patch", "word", "direction")


def keep_pinned(session: Session, slot: str, event: gr.EventData) -> None:
    """Keep what is chosen in a view, so that it is what is exported.

    Raises: ValueError for anything that a view does not send."""
    sent = event._data if isinstance(event._data, dict) else json.loads(event._data)
    found: dict[str, Any] = {name: sent[name] for name in NUMBERS if sent.get(name) is not None}
    view: ExplorerView | None = session.kept.get(slot)
    if view is None or any(type(value) is not int for value in found.values()):
        raise ValueError(f"A view says what is chosen in numbers; got {sent!r:.80}.")
    header = view.header
    most = {"query": header["positions"], "layer": header["layers"], "head": header["heads"]}
    if any(not MEAN <= found[name] < n for name, n in most.items() if name in found):
        raise ValueError(f"This view has no such place: {found}.")
    mode = sent.get("mode")
    session.pinned[slot] = {**found, "mode": mode if mode in header["modes"] else header["modes"][0]}


def about(model: str, question: str = "", answer: str = "", **more: Any) -> dict[str, Any]:
    """Return what every exported file says of itself."""
    return {"model": model, "question": question, "answer": answer, **more, "veena_lens": __version__}


def captioned(figure: Figure, told: Mapping[str, Any]) -> Figure:
    """Write below a figure what it is of."""
    text = " · ".join(f"{name}: {value}" for name, value in told.items() if value not in ("", None))
    figure.supxlabel("\n".join(_lines(text.replace("\n", " "))), fontsize=7, x=0.01, ha="left", color="#555b64")
    return figure


def _lines(text: str, width: int = 110, most: int = 4) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, max_lines=most, placeholder=" …")


def table_files(frame: pd.DataFrame, session: Session, name: str, told: Mapping[str, Any] | None = None) -> list[Path]:
    """Write a table as CSV and as Parquet into the session's folder, what it is of in its first columns."""
    for column, value in reversed(list((told or {}).items())):
        if column not in frame.columns:
            frame = frame.copy(deep=False)
            frame.insert(0, column, value)
    paths = [session.folder / f"{name}.csv", session.folder / f"{name}.parquet"]
    frame.to_csv(paths[0], index=False)
    frame.to_parquet(paths[1], index=False)
    return paths


def look_files(explorer: Explorer, session: Session, view: ExplorerView, asked: Question | None) -> list[str]:
    """Write a view as it is pinned: a page, and where a model was asked, map, table and cache. Return the paths."""
    from veena_lens import plots
    from veena_lens.circuits import image_attention

    pinned = {"mode": view.header["modes"][0], "query": view.header["query"], "layer": view.header["layer"]}
    pinned |= {"head": MEAN} | session.pinned.get("look", {})
    query, layer, head = pinned["query"], pinned["layer"], pinned["head"]
    told = about(view.title, "" if asked is None else asked.prompt, "" if asked is None else asked.answer)
    page = replace(view, header={**view.header, "open": pinned, "about": told})
    files = [page.save(session.folder / "view.html")]
    if asked is None:
        return [str(f) for f in files]
    with explorer.using(asked.model) as model:
        parts = ("attn.hook_rot_q", "attn.hook_rot_k", "hook_resid_post")
        names = [n for n in model.hook_dict if n.startswith("blocks.") and n.endswith(parts)]
        _, cache = model.run_with_cache(asked.inputs, names_filter=names)
        windows = [model.cfg.window(layer) for layer in range(model.cfg.n_layers)]
        scores = image_attention(model, asked.inputs, [query]) if asked.pictures else None
        values, name = shown_map(view, pinned)
    files.append(
        save_cache(
            cache,
            session.folder / "cache.safetensors",
            pictures=[p.image for p in asked.pictures],
            tokenizer=model.tokenizer,
            model_name=asked.model,
            windows=windows if any(windows) else None,
            about=told,
        )
    )
    if scores is not None:
        told |= {"position": query, "token": view.word_at(query)}
        rows = scores.select(batch=0)
        if "look" in session.pinned and layer != MEAN:
            rows = rows.select(layer=[layer])
            rows = rows if head == MEAN else rows.select(head=[head])
        files += table_files(rows.to_frame(), session, "attention", told)
        told |= {"layer": "mean" if layer == MEAN else layer, "head": "mean" if head == MEAN else head}
        grid = values[asked.inputs.grid_tokens(0, 0).cpu()]
        title = f"{name}, {head_name(layer, head)}, at {view.place_of(query)}"
        boxes = cell_boxes_of(asked.inputs)
        figure = plots.overlay(asked.pictures[0].image, grid, patch_boxes=boxes, title=title, name=name)
        files.append(plots.save(captioned(figure, told), session.folder / "attention.png"))
    return [str(f) for f in files]


def cell_boxes_of(inputs: Any, image: int = 0) -> Any:
    """Return the boxes of the grid's cells row by row, in pixels of the image; None where they are not known."""
    boxes = None if inputs.patch_boxes is None else inputs.patch_boxes[0][image]
    if boxes is None or not inputs.grid_places:
        return boxes
    return boxes[list(inputs.grid_places[0][image])]
