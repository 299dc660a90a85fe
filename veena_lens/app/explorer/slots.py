"""The page's own components: a view, a grid of cells to click, and a figure with its alt text."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from veena_lens.app.view.building import colours
from veena_lens.plots import theme

VIEW = """
const slot = () => element.querySelector('.veena-slot');
const base = new URL('veena/', document.baseURI);
let loaded = null, number = 0;
const say = (text) => { slot().textContent = text; };
const load = async () => {
  const value = props.value ? JSON.parse(props.value) : null;
  const mine = ++number;
  if (!value) { loaded?.destroy(); loaded = null; say(element.dataset.empty || 'Nothing to show yet.'); return; }
  try {
    const { mount } = await import(new URL('view.js', base));
    const answer = await fetch(new URL('view/' + value.token, base));
    if (!answer.ok) throw new Error(await answer.text());
    const buffer = await answer.arrayBuffer();
    if (mine !== number) return;
    loaded?.destroy();
    slot().textContent = '';
    loaded = mount(slot(), buffer, {
      open: value.open,
      pinned: (state) => trigger('select', state),
      fetch: async (key) => {
        const found = await fetch(new URL('maps/' + value.token + '?' + new URLSearchParams(key), base));
        if (!found.ok) throw new Error(await found.text());
        return found.arrayBuffer();
      },
    });
  } catch (error) { if (mine === number) { loaded = null; say(error.message); } }
};
watch('value', load);
load();
"""
CELLS = """
const base = new URL('veena/', document.baseURI);
const draw = async () => {
  const { cells } = await import(new URL('cells.js', base));
  const data = props.value ? JSON.parse(props.value) : null;
  cells(element.querySelector('.veena-slot'), data, (at) => trigger('select', at));
};
watch('value', draw);
draw();
"""


def view_slot(name: str) -> gr.HTML:
    """An empty place for a view; its "select" tells what was pinned."""
    return gr.HTML(
        value="", html_template='<div class="veena-slot"></div>', js_on_load=VIEW, elem_id=name, apply_default_css=False
    )


def cells_slot(name: str) -> gr.HTML:
    """An empty place for a grid of cells; its "select" tells the row and column that was clicked."""
    return gr.HTML(
        value="",
        html_template='<div class="veena-slot"></div>',
        js_on_load=CELLS,
        elem_id=name,
        apply_default_css=False,
    )


def view_value(token: str, **opened: Any) -> str:
    """What a view slot shows; `opened`: layer and head to begin with."""
    return json.dumps({"token": token, **({"open": opened} if opened else {})})


def cells_value(
    values: Float[Tensor, "row column"],
    rows: Sequence[Any],
    columns: Sequence[Any],
    *,
    row_name: str,
    column_name: str,
    title: str,
    done: int | None = None,
) -> str:
    """What a grid of cells shows; NaN is a cell that is not there yet."""
    numbers = [[None if v != v else round(v, 5) for v in row] for row in values.tolist()]
    return json.dumps(
        {
            "values": numbers,
            "rows": [str(r) for r in rows],
            "columns": [str(c) for c in columns],
            "rowName": row_name,
            "columnName": column_name,
            "title": title,
            "done": len(rows) if done is None else done,
            "colours": _signed(),
            "missing": theme.MISSING,
        }
    )


def _signed() -> list[str]:
    return colours()["signed"]


def figure_html(figure: Figure, alt: str) -> str:
    """A figure as a picture in the page."""
    data = base64.b64encode(theme.encode(figure, "png")).decode("ascii")
    return f'<img class="veena-figure" src="data:image/png;base64,{data}" alt="{escape(alt, quote=True)}">'
